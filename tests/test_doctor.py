"""`echolab doctor metrics`: present, wrong and missing networks, and nothing else in the output."""

import hashlib
import json
from pathlib import Path

import pytest

from echolab.cli.__main__ import main
from echolab.cli.doctor import needed_networks
from echolab.metrics import weights


def states(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, dict[str, str]]:
    assert main(["doctor", "metrics", f"networks={folder}", "format=json"]) == 0
    return {state["network"]: state for state in json.loads(capsys.readouterr().out)["networks"]}


def test_each_network_is_present_wrong_or_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "networks"
    folder.mkdir()
    content = b"weights"
    monkeypatch.setattr(
        weights, "I3D", weights.I3D._replace(sha256=hashlib.sha256(content).hexdigest())
    )
    (folder / weights.I3D.name).write_bytes(content)
    (folder / weights.SYNCNET.name).write_bytes(content)
    shown = states(capsys, folder)
    assert shown[weights.I3D.name]["state"] == "present"
    assert shown[weights.I3D.name]["path"] == str(folder / weights.I3D.name)
    assert shown[weights.SYNCNET.name]["state"] == "wrong"
    assert weights.SYNCNET.sha256[:16] in shown[weights.SYNCNET.name]["problem"]
    rest = {name for name, state in shown.items() if state["state"] == "missing"}
    assert rest == set(shown) - {weights.I3D.name, weights.SYNCNET.name}
    assert all(state["address"].startswith("https://") for state in shown.values())
    # The text says the same.
    assert main(["doctor", "metrics", f"networks={folder}"]) == 0
    text = capsys.readouterr().out
    assert f"present  {weights.I3D.name}: fvd" in text and f"1 of {len(shown)} networks" in text


def test_every_released_network_of_the_scores_is_listed() -> None:
    listed = {model.name for _, model in needed_networks()}
    unlisted = {model.name for model in weights.RELEASED} - listed
    assert unlisted == {weights.LIGHT_ASD.name}  # an oracle of the tests
