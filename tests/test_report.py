"""The report as its reader uses it: in a real browser, from one file, with audio."""

import html.parser
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, Page

from echolab.cli import report as command
from echolab.data.media import write_video
from echolab.errors import DataError, MediaError
from echolab.tracking.metrics import MetricsLog
from echolab.tracking.report import Video, write_again, write_report
from echolab.tracking.score_table import averaged, best, score_table

TASKS = ("t2v", "i2v", "lip_sync")
SCORES = {
    "sft": (4.82, 182.4),
    "dpo": (5.44, 158.1),
    "sft_longer": (5.01, 171.0),
    "ground_truth": (7.91, 0.0),
    "shuffled_sound": (1.12, 4.2),
}
ROWS = [
    {"checkpoint": name, "seed": 0, "scores": {"sync_c_demo": sync, "fvd_demo": fvd}}
    for name, (sync, fvd) in SCORES.items()
]
HOSTILE = "<script>throw 1</script> {{body}} \"quoted\" & 'so'"


def write_metrics(path: Path, steps: range) -> None:
    log = MetricsLog(path, attempt=0)
    for step in steps:
        row = {"train/loss": 2.0 / (step + 1), "train/lr": 1e-4, "train/margin": step * 0.01}
        row |= {f"tasks/probability/{task}": 1 / len(TASKS) for task in TASKS}
        row |= {f"train/error/{task}": 1.0 + n for n, task in enumerate(TASKS)}
        log.log(step, row | {"val/error/sigma_0.5": 0.4, "train/error/chosen": 0.5})


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    """Return arguments of write_report, with two clips that have audio."""
    frames = np.zeros((25, 64, 48, 3), np.uint8)
    frames[:, 16:48, 12:36] = np.arange(0, 250, 10, dtype=np.uint8)[:, None, None, None]
    samples = np.sin(np.arange(16000) * 0.1).astype(np.float32) / 3
    videos = []
    (tmp_path / "samples").mkdir()
    for name in ("sft", "dpo"):
        path = tmp_path / "samples" / f"{name}.mp4"
        write_video(path, frames, samples, fps=25, rate=16000)
        videos.append(Video(path, name.upper(), caption=HOSTILE, group="Talker 7"))
    write_metrics(tmp_path / "sft" / "metrics.jsonl", range(60))
    write_metrics(tmp_path / "dpo" / "metrics.jsonl", range(60, 80))
    return {
        "title": f"A demo {HOSTILE}",
        "runs": {"sft": tmp_path / "sft", "dpo": tmp_path / "dpo" / "metrics.jsonl"},
        "scores": ROWS,
        "videos": videos,
        "summary": {"about": "What it is.", "Steps": 80},
    }


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `make packages` as root installs it")
def test_a_browser_plays_and_shows_the_full_report(tmp_path: Path, report: dict[str, Any]) -> None:
    # moved away from everything it was made from, to show that it needs nothing else
    out = tmp_path / "report.html"
    write_report(out, **report)
    alone = tmp_path / "elsewhere" / "page.html"
    alone.parent.mkdir()
    out.rename(alone)
    with Page(tmp_path / "profile") as page:
        page.open(alone)
        sounds = []
        for _ in range(100):  # decoding of sound starts a moment after playing
            videos = page.run(
                "[...document.querySelectorAll('video')].map(v => [v.duration, v.videoWidth,"
                " v.audioTracks.length, v.webkitAudioDecodedByteCount, v.currentTime])"
            )
            sounds = [video[3] for video in videos]
            if all(sounds) and all(video[4] for video in videos):
                break
            time.sleep(0.1)
        assert len(videos) == 2 and all(sounds)
        assert all(v[0] == pytest.approx(1.0, abs=0.1) and v[1:3] == [48, 1] for v in videos)
        assert page.run("getComputedStyle(document.querySelector('video')).imageRendering") == (
            "pixelated"
        )
        cells = page.run(
            "Object.fromEntries([...document.querySelectorAll('tr[data-checkpoint]')].map("
            "row => [row.dataset.checkpoint, [...row.cells].slice(1).map(c => +c.dataset.value)]))"
        )
        assert {name: tuple(values) for name, values in cells.items()} == SCORES
        shown = page.run("document.querySelector('[data-checkpoint=dpo]').innerText")
        assert "5.44" in shown and "158" in shown
        assert HOSTILE in page.run("document.querySelector('h1').innerText")
        assert page.run("document.querySelectorAll('.chart').length") >= 8
        assert page.messages == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `make packages` as root installs it")
def test_one_clip_plays_audio_at_a_time_and_charts_show_their_values(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    write_report(tmp_path / "report.html", **report)
    silent = "[...document.querySelectorAll('video')].map(v => v.muted)"
    with Page(tmp_path / "profile") as page:
        page.open(tmp_path / "report.html")
        assert page.run(silent) == [True, True]
        for clicked, expected in ((0, [False, True]), (1, [True, False]), (1, [True, True])):
            page.run(f"document.querySelectorAll('.frame')[{clicked}].click()")
            assert page.run(silent) == expected
        page.run("document.querySelector('[data-do=loop]').click()")
        assert page.run("document.querySelector('video').loop") is False
        page.run("document.querySelector('#loss').scrollIntoView({behavior: 'instant'})")
        x, y, width = page.run(
            "(box => [box.x, box.y, box.width])"
            "(document.querySelector('#loss svg').getBoundingClientRect())"
        )
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + width / 2, y=y + 40)
        tip = page.run("document.querySelector('.tip').innerText")
        assert tip.startswith("step ") and "SFT" in tip
        for theme in ("dark", "light"):
            feature = {"name": "prefers-color-scheme", "value": theme}
            page.call("Emulation.setEmulatedMedia", features=[feature])
            page.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
            assert page.run("document.documentElement.dataset.theme") == theme
        assert page.messages == []


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path, report: dict[str, Any]) -> None:
    write_report(tmp_path / "report.html", **report)
    page = (tmp_path / "report.html").read_text()
    for word in ("src=", "href="):
        for rest in page.split(word)[1:]:
            assert rest[1:].startswith(("data:", "#")), rest[:60]
    assert "url(" not in page and "@import" not in page and str(tmp_path) not in page
    assert "<script>throw" not in page


def test_a_report_can_be_written_again_after_more_steps(
    tmp_path: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(tmp_path / "report.html", **report)
    before = (tmp_path / "report.html").read_bytes()
    write_again(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    write_metrics(moved / "dpo" / "metrics.jsonl", range(80, 99))
    assert command.main([str(moved)]) == 0
    assert (moved / "report.html").read_bytes() != before
    assert "report.html" in capsys.readouterr().out


def test_a_run_folder_alone_gives_a_report(tmp_path: Path, report: dict[str, Any]) -> None:
    run = tmp_path / "run"
    write_metrics(run / "metrics.jsonl", range(9))
    (run / "scores.json").write_text(json.dumps({"rows": ROWS}))
    (run / "samples").mkdir()
    report["videos"][0].path.rename(run / "samples" / "one_clip.mp4")
    assert command.main([f"run={run}"]) == 0
    page = (run / "report.html").read_text()
    assert "one clip" in page and "5.44" in page and "Training loss" in page


def test_missing_input_is_named_and_nothing_is_written(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    out = tmp_path / "out" / "report.html"
    with pytest.raises(MediaError, match=r"gone\.mp4"):
        write_report(out, **report | {"videos": [Video(tmp_path / "gone.mp4", "gone")]})
    with pytest.raises(DataError, match=r"gone.*metrics|gone"):
        write_report(out, **report | {"runs": {"sft": tmp_path / "gone"}})
    assert not out.parent.exists()
    with pytest.raises(DataError, match="gone"):
        command.main([str(tmp_path / "gone")])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(DataError, match=r"report\.json"):
        write_again(tmp_path / "report.html")


def test_the_best_is_a_trained_checkpoint_by_the_metrics_direction() -> None:
    scores = averaged(ROWS)
    assert list(scores) == ["ground_truth", "sft", "sft_longer", "dpo", "shuffled_sound"]
    assert best("sync_c_demo", scores) == 5.44 and best("fvd_demo", scores) == 158.1
    table = score_table(ROWS, {})
    assert table.count('class="best"') == 2
    assert "DPO against SFT, longer" in table and "+0.43" in table and "−13" in table


def test_seeds_are_averaged_with_their_spread() -> None:
    rows = [
        {"checkpoint": "sft", "seed": seed, "scores": {"sync_c_demo": value, "odd": value}}
        for seed, value in enumerate((1.0, 2.0, 3.0, math.nan))
    ]
    assert averaged(rows)["sft"]["sync_c_demo"] == (2.0, 1.0, 3)
    assert "± 1.00" in score_table(rows, {}) and "3 seeds" in score_table(rows, {})


def test_without_scores_the_report_has_no_table() -> None:
    assert score_table([], {}) == ""


def outside(tmp_path: Path) -> Path:
    folder = tmp_path.with_name(f"{tmp_path.name}-outside")
    folder.mkdir(exist_ok=True)
    (folder / "secret.mp4").write_bytes(b"\0\0\0\x18ftypSECRET")
    (folder / "metrics.jsonl").write_text('{"step": 1, "attempt": 1, "train/loss": 1}\n')
    return folder


@pytest.mark.parametrize("way", ["absolute", "relative", "link"])
@pytest.mark.parametrize("what", ["videos", "runs"])
def test_a_report_over_untrusted_files_embeds_nothing_from_outside(
    tmp_path: Path, report: dict[str, Any], way: str, what: str
) -> None:
    write_report(tmp_path / "report.html", **report)
    name = {"videos": "secret.mp4", "runs": "metrics.jsonl"}[what]
    target = outside(tmp_path) / name
    (tmp_path / f"link-{name}").symlink_to(target)
    values = {"absolute": str(target), "relative": f"samples/../../{target.parent.name}/{name}",
            "link": f"link-{name}"}[way]  # fmt: skip
    given = json.loads((tmp_path / "report.json").read_text())
    if what == "videos":
        given["videos"][0]["path"] = values
    else:
        given["runs"]["sft"] = values
    (tmp_path / "report.json").write_text(json.dumps(given))
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(DataError, match=r"report\.json: .*lies outside.*delete it"):
        write_again(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before


def test_untrusted_samples_must_be_videos_and_not_links(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    write_metrics(tmp_path / "run" / "metrics.jsonl", range(3))
    (tmp_path / "run" / "samples").mkdir()
    clip = tmp_path / "run" / "samples" / "a.mp4"
    clip.symlink_to(outside(tmp_path) / "secret.mp4")
    with pytest.raises(DataError, match="a link out of the run folder"):
        command.main([str(tmp_path / "run")])
    clip.unlink()
    for content in (b"root:x:0:0", b""):
        clip.write_bytes(content)
        with pytest.raises(MediaError, match=r"a\.mp4: not an mp4 file"):
            command.main([str(tmp_path / "run")])
    clip.unlink()
    os.mkfifo(clip)  # would be read for ever
    with pytest.raises(MediaError, match=r"a\.mp4: not found"):
        command.main([str(tmp_path / "run")])
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_is_never_written_through_a_link(tmp_path: Path, report: dict[str, Any]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("report.html", "report.json", "report.html.partial", "report.json.partial"):
        (tmp_path / name).symlink_to(victim)
    write_report(tmp_path / "report.html", **report)
    assert victim.read_text() == "mine" and not (tmp_path / "report.html").is_symlink()


WORDS = ["title", "run", "checkpoint", "measure", "video", "caption", "group", "summary", "metric"]


def test_no_untrusted_text_becomes_markup(tmp_path: Path, report: dict[str, Any]) -> None:
    """The law holds for every field: text, attribute and the values of a chart."""
    evil = {word: f"{HOSTILE}<img src=x onerror=1>\"'><b>{word}" for word in WORDS}
    write_report(tmp_path / "report.html", **report)
    given = json.loads((tmp_path / "report.json").read_text())
    metrics = tmp_path / "m" / "metrics.jsonl"
    names = (evil["metric"], "train/error/" + evil["metric"], "val/error/sigma_" + evil["metric"],
             "tasks/probability/" + evil["metric"])  # fmt: skip
    for step in range(3):
        MetricsLog(metrics, 1).log(step, dict.fromkeys(names, 1.0 + step))
    given |= {"title": evil["title"], "runs": {evil["run"]: "m/metrics.jsonl"}}
    row = {"checkpoint": evil["checkpoint"], "scores": {evil["measure"]: 1, "sync_c": 2.5}}
    given["scores"] = [row, {"checkpoint": "sft", "scores": {"sync_c": 1}}]
    given["videos"][0] |= {
        "title": evil["video"],
        "caption": evil["caption"],
        "group": evil["group"],
    }
    given["summary"] = {evil["summary"]: evil["summary"], "about": evil["summary"]}
    (tmp_path / "report.json").write_text(json.dumps(given))
    write_again(tmp_path / "report.html")

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag != "img" and not any(name.startswith("on") for name, _ in attributes), (
                tag,
                attributes,
            )
            assert tag != "b" or not attributes

    page = (tmp_path / "report.html").read_text()
    Tags().feed(page)
    for word in WORDS:
        assert f"<b>{word}" not in page


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [{"checkpoint": "a", "scores": {"sync_c": "<b>"}}]},
        {"scores": [{"checkpoint": "a", "scores": ["x"]}]},
        {"scores": [3]},
        {"runs": {"a": 3}},
        {"videos": [{"path": "samples/sft.mp4"}]},
        {"videos": 3},
        {"summary": ["x"]},
    ],
)
def test_an_invalid_scores_file_is_named(
    tmp_path: Path, report: dict[str, Any], change: dict[str, Any]
) -> None:
    write_report(tmp_path / "report.html", **report)
    given = json.loads((tmp_path / "report.json").read_text()) | change
    (tmp_path / "report.json").write_text(json.dumps(given))
    with pytest.raises(DataError, match=r"report\.json: not the inputs of a report"):
        write_again(tmp_path / "report.html")
