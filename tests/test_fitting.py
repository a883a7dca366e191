"""Fitting a small network: a stop changes nothing, and its files say what they are."""

import math
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echolab import fitting
from echolab.errors import CheckpointError, DiskFullError, WeightsError
from echolab.fitting import fit, load_net, save_net

STEPS = 12


class Stop(Exception):
    """Stands for Ctrl-C."""


class Other(nn.Linear):
    """A network of another name."""


def fresh() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def fitted(progress: Path, stop_at: int | None = None, seed: int = 5, steps: int = STEPS,
           reports: list[tuple[int, int, float]] | None = None) -> dict[str, Tensor]:  # fmt: skip
    """Return the state after all steps; raise Stop after `stop_at` losses."""
    net, taken = fresh(), 0

    def loss_of(generator: torch.Generator) -> Tensor:
        nonlocal taken
        if taken == stop_at:
            raise Stop
        taken += 1
        points = torch.randn(16, 4, generator=generator)
        error: Tensor = (net(points) - points.sum(1, keepdim=True)).square().mean()
        return error

    lines = [] if reports is None else reports
    fit(net, loss_of, steps=steps, learning_rate=1e-2, seed=seed, progress=progress,
        report=lambda *line: lines.append(line))  # fmt: skip
    assert not net.training
    progress.unlink(missing_ok=True)  # its caller, who keeps the net, removes it
    return net.state_dict()


@pytest.fixture
def saves_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SAVE_SECONDS", -1.0)


@pytest.mark.usefixtures("saves_each_step")
@pytest.mark.parametrize("stops", [(1,), (5,), (4, 3), (STEPS - 1,)])
def test_a_stopped_fit_resumes_bit_for_bit(stops: tuple[int, ...], tmp_path: Path) -> None:
    unbroken = fitted(tmp_path / "unbroken")
    for stop in stops:
        with pytest.raises(Stop):
            fitted(tmp_path / "state", stop_at=stop)
        assert (tmp_path / "state").exists()
    actual = fitted(tmp_path / "state", stop_at=STEPS - sum(stops))  # no step is done twice
    assert actual.keys() == unbroken.keys()
    for name, value in unbroken.items():
        assert torch.equal(value, actual[name]), name
    assert list(tmp_path.iterdir()) == []  # neither state nor a partial file stays


def test_a_fit_depends_on_the_seed_alone(tmp_path: Path) -> None:
    one = fitted(tmp_path / "state")
    torch.manual_seed(99)
    again, other = fitted(tmp_path / "state"), fitted(tmp_path / "state", seed=6)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_decreases_and_is_reported_every_twentieth_step(tmp_path: Path) -> None:
    reports: list[tuple[int, int, float]] = []
    fitted(tmp_path / "state", steps=210, reports=reports)
    assert [step for step, *_ in reports] == [*range(20, 201, 20), 210]
    assert {steps for _, steps, _ in reports} == {210}
    assert reports[-1][2] < 0.7 * reports[0][2] and math.isfinite(reports[-1][2])


@pytest.mark.usefixtures("saves_each_step")
def test_a_state_of_another_fit_is_refused(tmp_path: Path) -> None:
    save_file({"net.unknown": torch.zeros(1)}, tmp_path / "none", {"step": "1"})
    save_file({"net.unknown": torch.zeros(1)}, tmp_path / "unnumbered")
    (tmp_path / "rubbish").write_bytes(b"not a state")
    for name in ("none", "unnumbered", "rubbish"):
        with pytest.raises(CheckpointError, match=f"{name}: not a state of this fit .*remove it"):
            fitted(tmp_path / name)


def test_a_network_is_read_back_frozen(tmp_path: Path) -> None:
    net, path = nn.Linear(3, 2), tmp_path / "new" / "net.safetensors"
    save_net(path, net, {"in_features": 3, "out_features": 2})
    actual = load_net(path, nn.Linear)
    assert not actual.training and not any(p.requires_grad for p in actual.parameters())
    assert all(torch.equal(v, actual.state_dict()[k]) for k, v in net.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_not_the_network_is_named_with_its_remedy(tmp_path: Path) -> None:
    good, config = tmp_path / "good", {"in_features": 3, "out_features": 2}
    save_net(good, nn.Linear(3, 2), config)
    with pytest.raises(WeightsError, match="good: holds Linear, need Other"):
        load_net(good, Other)
    with pytest.raises(WeightsError, match="missing: not there; fit it"):
        load_net(tmp_path / "missing", nn.Linear)
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-5])
    with pytest.raises(WeightsError, match="cut: damaged"):
        load_net(tmp_path / "cut", nn.Linear)
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "foreign")
    with pytest.raises(WeightsError, match="foreign: holds no network of echolab's"):
        load_net(tmp_path / "foreign", nn.Linear)
    for name, settings in (("sizes", {**config, "in_features": 4}), ("words", {"inputs": 3})):
        save_net(tmp_path / name, nn.Linear(3, 2), settings)
        with pytest.raises(WeightsError, match=f"{name}: of another version"):
            load_net(tmp_path / name, nn.Linear)


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: Python ignores its signal."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskFullError, match=r"net: could not be written .*another folder"):
            save_net(tmp_path / "net", nn.Linear(50, 50), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(tmp_path.iterdir()) == []
