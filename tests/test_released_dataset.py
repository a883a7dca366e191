"""A dataset encoded by the released encoders, one after another."""

import json
from pathlib import Path

import pytest
import released
import torch
from safetensors.torch import load, save

from data_prep import encode
from data_prep.__main__ import encode as encode_action
from data_prep.draw import draw_dataset
from data_prep.encode import audio_of, boxes_of, caption_of, open_raw, pixels_of
from data_prep.options import DrawOptions
from echolab.data.collate import read_clip
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import Encoders, demo_encoders, encode_clip
from echolab.encoders.loading import Resident, find_released, released_encoders
from echolab.encoders.umt5 import as_written, cleaned
from echolab.errors import ConfigError, DataError, WeightsError
from echolab.tasks.table import TASKS

FRAMES, SIZE, CLIPS = 13, 32, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `release`, `pipeline`, `base`, `chinese` and a raw dataset `raw`."""
    folder = tmp_path_factory.mktemp("world")
    released.write_release(folder / "release")
    released.write_pipeline(folder / "pipeline")
    released.write_base_960h(folder / "base")
    released.write_chinese_base(folder / "chinese")
    draw_dataset(
        DrawOptions(folder / "raw", num_clips=CLIPS, frames=FRAMES, size=SIZE), lambda done: None
    )
    return folder


def made(world: Path, *, audio: str = "base", speech: str = "preview", **more: int) -> Encoders:
    files = find_released(world / "release", world / audio)
    return released_encoders(files, torch.device("cpu"), torch.float32, speech=speech, **more)


def command(world: Path, out: Path, *more: str) -> list[str]:
    return [str(world / "raw"), str(out), "encoders=released", f"encoder_dir={world / 'release'}",
            f"wav2vec={world / 'base'}", "dtype=fp32", *more]  # fmt: skip


@pytest.mark.parametrize(
    ("audio", "speech", "shape"),
    [("base", "preview", (2 * FRAMES, 16)), ("chinese", "flash", (FRAMES, 12, 16))],
)
def test_a_dataset_holds_the_output_of_each_encoder(
    world: Path, tmp_path: Path, audio: str, speech: str, shape: tuple[int, ...]
) -> None:
    encoders = made(world, audio=audio, speech=speech)
    assert encode.encode_in_stages(world / "raw", tmp_path / "out", encoders, {}) == CLIPS
    dataset, raw = open_dataset(tmp_path / "out"), open_raw(world / "raw")
    assert dataset.keys == raw.keys and dataset.encoders == encoders.fingerprints
    assert not (tmp_path / "out" / ".work").exists()
    members = raw.read(1)
    expected = encode_clip(made(world, audio=audio, speech=speech, resident=4), pixels_of(members),
                           audio_of(members), caption_of(members), *boxes_of(members))  # fmt: skip
    assert expected["audio"].shape == shape
    for task in TASKS:
        clip = read_clip(dataset, 1, task)
        assert clip.latents.shape[-4:] == (16, 4, SIZE // 8, SIZE // 8)
        assert torch.equal(clip.conditions.text.squeeze(0), expected["text"].half().float())
        assert torch.equal(clip.conditions.audio.squeeze(0), expected["audio"].half().float())
        torch.testing.assert_close(clip.latents.squeeze(0), expected["latents"].half().float())
        if task != "t2v":
            known = expected[f"known_latents.{task}"].half().float()
            torch.testing.assert_close(clip.conditions.known_latents.squeeze(0), known)


def test_the_command_encodes_and_prints_a_summary(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode_action(command(world, tmp_path / "out", "format=json", "clean=wan")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["clips"] == CLIPS and summary["encoders"]["text"].endswith(" cleaned")
    assert open_dataset(tmp_path / "out").description["dtype"] == "fp32"
    with pytest.raises(DataError, match="already holds a dataset"):
        encode_action(command(world, tmp_path / "out"))


def test_a_stopped_command_resumes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, out = tmp_path / "complete", tmp_path / "out"
    assert encode_action(command(world, complete)) == 0
    calls: list[str] = []

    def watched(stop_in: str | None) -> None:
        def stages_of(encoders: Encoders) -> dict[str, encode.Stage]:
            def stage(name: str, inner: encode.Stage) -> encode.Stage:
                def run(members: encode.Members) -> dict[str, torch.Tensor]:
                    calls.append(name)
                    if name == stop_in:
                        raise KeyboardInterrupt
                    return inner(members)

                return run

            return {name: stage(name, inner) for name, inner in original(encoders).items()}

        monkeypatch.setattr(encode, "stages_of", stages_of)

    original = encode.stages_of
    watched(stop_in="audio")
    with pytest.raises(KeyboardInterrupt):
        encode_action(command(world, out))
    assert calls == ["text"] * CLIPS + ["image"] * CLIPS + ["audio"]
    assert not (out / "dataset.json").exists()
    calls.clear()
    watched(stop_in=None)
    assert encode_action(command(world, out)) == 0
    assert calls == ["audio"] * CLIPS + ["video"] * CLIPS
    assert open_dataset(out).fingerprint == open_dataset(complete).fingerprint


def without_tasks(complete: Path, out: Path, tasks: tuple[str, ...]) -> Path:
    """Copy an encoded dataset without the known latents of some tasks."""
    dataset = open_dataset(complete)
    with ShardWriter(
        out, kind="encoded", encoders=dataset.encoders, description=dataset.description
    ) as writer:
        for i, key in enumerate(dataset.keys):
            members = dataset.read(i)
            tensors = load(members["safetensors"])
            kept = {n: t for n, t in tensors.items() if n.partition(".")[2] not in tasks}
            writer.write(key, {"safetensors": save(kept), "json": members["json"]})
    return out


def test_a_new_task_is_added_without_encoding_the_rest_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ("flf2v", "lip_sync")
    assert encode_action(command(world, tmp_path / "complete")) == 0
    old = without_tasks(tmp_path / "complete", tmp_path / "old", tasks)
    stages: list[str] = []
    original = encode._run_stage

    def watched(dataset: object, folder: Path, stage: encode.Stage, title: str) -> None:
        stages.append(title)
        original(dataset, folder, stage, title)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "_run_stage", watched)
    assert encode_action(command(world, tmp_path / "new", f"encoded={old}")) == 0
    assert stages == ["encoding known flf2v lip_sync"]
    complete, new = open_dataset(tmp_path / "complete"), open_dataset(tmp_path / "new")
    assert new.keys == complete.keys and new.fingerprint == complete.fingerprint
    check_same_files(tmp_path / "complete", tmp_path / "new")


def check_same_files(complete: Path, new: Path) -> None:
    """Compare all files of two datasets: shards and dataset.json."""
    assert sorted(path.name for path in new.iterdir()) == sorted(
        path.name for path in complete.iterdir()
    )
    for path in complete.iterdir():
        assert (new / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_new_task_is_added_to_a_dataset_of_the_demo(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoders = demo_encoders(CausalAutoencoder(width=8).eval())
    encode.encode_dataset(world / "raw", tmp_path / "complete", encoders, lambda done: None)
    old = without_tasks(tmp_path / "complete", tmp_path / "old", ("avatar_sync",))
    assert encode.add_tasks(world / "raw", old, tmp_path / "new", encoders, {}) == CLIPS
    for i in range(CLIPS):  # the demo's convolutions round by the number of clips in a batch
        expected, tensors = (
            load(open_dataset(tmp_path / name).read(i)["safetensors"])
            for name in ("complete", "new")
        )
        assert tensors.keys() == expected.keys()
        torch.testing.assert_close(tensors, expected)
        kept = [name for name in expected if not name.endswith(".avatar_sync")]
        assert all(torch.equal(tensors[name], expected[name]) for name in kept)


def test_tasks_are_added_only_to_a_dataset_of_the_same_source_and_encoders(
    world: Path, tmp_path: Path
) -> None:
    assert encode_action(command(world, tmp_path / "complete")) == 0
    with pytest.raises(DataError, match="has the known latents of all tasks"):
        encode_action(command(world, tmp_path / "new", f"encoded={tmp_path / 'complete'}"))
    old = without_tasks(tmp_path / "complete", tmp_path / "old", ("i2v",))
    with pytest.raises(DataError, match="is of other encoders"):
        encode_action(command(world, tmp_path / "new", f"encoded={old}", "clean=wan"))
    words = [word for word in command(world, tmp_path / "new") if not word.startswith("dtype=")]
    with pytest.raises(DataError, match="was made with dtype=fp32, not bf16; give the same dtype="):
        encode_action([*words, f"encoded={old}"])
    draw_dataset(
        DrawOptions(tmp_path / "raw", num_clips=1, seed=9, frames=FRAMES, size=SIZE),
        lambda done: None,
    )
    with pytest.raises(DataError, match="was not encoded from"):
        encode.add_tasks(tmp_path / "raw", old, tmp_path / "new", made(world), {})
    assert not (tmp_path / "new" / "dataset.json").exists()


def test_leftovers_of_another_command_are_not_used(world: Path, tmp_path: Path) -> None:
    one, other = made(world), made(world, audio="chinese", speech="flash")
    dataset = open_raw(world / "raw")
    names = {
        encode._work_hash(dataset, one, {"dtype": "fp32"}),
        encode._work_hash(dataset, one, {"dtype": "bf16"}),
        encode._work_hash(dataset, other, {"dtype": "fp32"}),
    }
    assert len(names) == 3
    assert encode._work_hash(dataset, made(world), {"dtype": "fp32"}) in names


def test_an_error_names_the_sample_and_leaves_no_dataset(world: Path, tmp_path: Path) -> None:
    draw_dataset(DrawOptions(tmp_path / "raw", num_clips=1, frames=9, size=SIZE), lambda done: None)
    flash = made(world, audio="chinese", speech="flash")
    key = open_dataset(tmp_path / "raw").keys[0]
    with pytest.raises(Exception, match=f"raw: sample {key}: audio of .* has no loudness"):
        encode.encode_in_stages(tmp_path / "raw", tmp_path / "out", flash, {})
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_values_beyond_fp16_are_refused() -> None:
    with pytest.raises(DataError, match="sample a: text is not finite in fp16"):
        encode.to_safetensors("a", {"text": torch.tensor([1e6])})


def test_the_number_of_networks_in_memory_is_bounded() -> None:
    alive: list[str] = []

    class Net:
        def __init__(self, name: str) -> None:
            self.name = name
            alive.append(name)
            most_alive.append(len(alive))

        def __del__(self) -> None:
            alive.remove(self.name)

    for limit in (1, 2):
        most_alive: list[int] = []
        networks = Resident({n: (lambda n=n: Net(n)) for n in "abc"}, limit)
        for name in "aabac":
            assert networks(name).name == name
        assert max(most_alive) == limit
        del networks
        assert alive == []


def test_no_network_is_loaded_before_it_is_used(world: Path) -> None:
    encoders = made(world)
    loaded = encoders.video.networks  # type: ignore[attr-defined]
    assert list(loaded.held) == []
    encoders.image(None)
    assert list(loaded.held) == ["image"]
    encoders.audio(torch.zeros(3200), 5)
    assert list(loaded.held) == ["audio"]


def test_fingerprints_depend_on_the_files_alone(world: Path, tmp_path: Path) -> None:
    one = made(world).fingerprints
    assert one == made(world, resident=4).fingerprints
    assert set(one) == {"video", "text", "image", "audio"}
    other = made(world, audio="chinese", speech="flash").fingerprints
    assert {name for name in one if one[name] != other[name]} == {"audio"}
    released.write_release(tmp_path / "release")
    changed = released.vae_original(released.vae())
    changed["conv1.bias"][0] += 1e-3
    torch.save(changed, tmp_path / "release" / released.VIDEO)
    files = find_released(tmp_path / "release", world / "base")
    again = released_encoders(files, torch.device("cpu"), torch.float32, speech="preview",
                              clean=cleaned).fingerprints  # fmt: skip
    assert {name for name in one if one[name] != again[name]} == {"video", "text"}
    assert again["text"].split()[0] == one["text"].split()[0] and cleaned is not as_written


def test_both_layouts_work_and_a_missing_part_is_named(world: Path, tmp_path: Path) -> None:
    release = find_released(world / "release", world / "base")
    assert release.video.name == "Wan2.1_VAE.pth" and release.tokenizer.name == "umt5-xxl"
    pipeline = find_released(world / "pipeline", world / "base")
    assert [path.name for path in pipeline] == [
        "vae", "text_encoder", "tokenizer", "image_encoder", "base"
    ]  # fmt: skip
    with pytest.raises(WeightsError, match="nowhere: not there"):
        find_released(tmp_path / "nowhere", world / "base")
    with pytest.raises(WeightsError, match="none: not there.*wav2vec2"):
        find_released(world / "release", tmp_path / "none")
    for part, name in (("video", "Wan2.1_VAE.pth"), ("image", released.IMAGE)):
        partial = tmp_path / part
        released.write_release(partial)
        (partial / name).unlink()
        with pytest.raises(WeightsError, match=f"no {part} .*need one of {name}") as summary:
            find_released(partial, world / "base")
        assert "\n" not in str(summary.value)


def test_conflicting_options_are_refused(world: Path, tmp_path: Path) -> None:
    raw, out = str(world / "raw"), str(tmp_path / "out")
    with pytest.raises(ConfigError, match="vae: needed with encoders=demo"):
        encode_action([raw, out])
    with pytest.raises(ConfigError, match="encoder_dir: needed with encoders=released"):
        encode_action([raw, out, "encoders=released", f"wav2vec={world / 'base'}"])
    with pytest.raises(ConfigError, match="wav2vec: needed"):
        encode_action([raw, out, "encoders=released", f"encoder_dir={world / 'release'}"])
    for device in ("cuda:63", "nonsense"):
        with pytest.raises(ConfigError, match=f"device={device}: not on this machine"):
            encode_action(command(world, tmp_path / "out", f"device={device}"))
    assert not (tmp_path / "out").exists()
