"""Wrong paths and missing devices are refused in one line before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import encoded
import pytest

from echolab.cli.__main__ import main
from echolab.config.compose import compose
from echolab.config.paths import check_gpus, check_paths, read_head
from echolab.errors import ConfigError, EcholabError
from echolab.launch import exit_codes


@pytest.fixture
def datasets(tmp_path: Path) -> tuple[Path, Path]:
    return encoded.write(tmp_path / "data", 2)


def test_existing_paths_pass(datasets: tuple[Path, Path], tmp_path: Path) -> None:
    clips, pairs = datasets
    (tmp_path / "file").touch()
    check_paths(
        compose([
            f"data.clips=[{clips},https://host/clips]", f"data.pairs={pairs}",
            f"data.val_clips={clips}", "ref_model=base", "lora=attention",
            f"init_from={tmp_path}", f"pretrained={tmp_path / 'file'}",
        ])
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.clips=TYPO"], "data.clips=TYPO: TYPO/dataset.json: not there (no such folder)"),
        (["data.clips=[{clips},TYPO]"], "data.clips=TYPO"),
        (["data.clips={empty}"], "there is no dataset.json in it"),
        (["data.clips={pairs}"], "is a dataset of the kind preference, this setting takes encoded"),
        (["data.pairs={clips}"], "is a dataset of the kind encoded, this setting takes preference"),
        (["data.val_clips=TYPO"], "data.val_clips=TYPO"),
        (["init_from=TYPO"], "init_from=TYPO: no such folder"),
        (["ref_model=TYPO"], "ref_model=TYPO: no such folder"),
        (["pretrained=TYPO"], "pretrained=TYPO: no such file or folder"),
        (["lora=attention", "lora.init_from=TYPO"], "lora.init_from=TYPO: no such file"),
    ],
)
def test_missing_paths_are_refused_in_one_line(
    datasets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    clips, pairs = datasets
    (tmp_path / "empty").mkdir()
    named = {"clips": clips, "pairs": pairs, "empty": tmp_path / "empty"}
    words = [f"data.clips={clips}", *(word.format(**named) for word in words)]
    run = tmp_path / "run"
    assert main(["train", *words, f"run_dir={run}"]) == exit_codes.FATAL
    said = capsys.readouterr().err
    assert said.startswith("echolab: error: ") and message in said and said.count("\n") == 1
    assert not run.exists()


def test_a_mistyped_path_of_a_large_run_builds_no_network(tmp_path: Path) -> None:
    """The settings ask for eight ranks and 1.7 billion parameters; no rank is started."""
    program = (
        "import sys; from echolab.cli.__main__ import main; "
        "code = main(['train', 'experiment=sft', 'data.clips=TYPO']); "
        "sys.exit('torch' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == exit_codes.FATAL and "data.clips=TYPO" in done.stderr
    assert "torch" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"format": 99, "kind": "encoded"}', "{}"])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(EcholabError, match="dataset.json"):
        check_paths(compose([f"data.clips={tmp_path}"]))


def test_the_head_of_any_json_is_read(datasets: tuple[Path, Path]) -> None:
    path = datasets[0] / "dataset.json"
    head = read_head(path)
    assert head["kind"] == "encoded" and "samples" not in head
    index = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(index.items())), indent=2))
    assert read_head(path)["kind"] == "encoded"


def test_gpus_are_detected_by_their_device_files(tmp_path: Path) -> None:
    check_gpus({"accelerator": "cpu"}, tmp_path)
    for wanted in ("gpu", "cuda"):
        with pytest.raises(ConfigError, match=f"trainer.accelerator={wanted}: no GPU here"):
            check_gpus({"accelerator": wanted}, tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    with pytest.raises(ConfigError):
        check_gpus({"accelerator": "gpu"}, tmp_path)
    (tmp_path / "dev/nvidia0").touch()
    check_gpus({"accelerator": "gpu"}, tmp_path)
