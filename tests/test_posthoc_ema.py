"""Power averages: their profile, and averages of other widths made from snapshots."""

import json
from pathlib import Path

import pytest
import saved
import torch
from hypothesis import given
from hypothesis import strategies as st

from echolab.errors import CheckpointError, ConfigError
from echolab.training.checkpoints.checkpoint import latest_valid, open_checkpoint
from echolab.training.checkpoints.retention import average_of_width
from echolab.training.engine.ema import (
    Ema,
    Profile,
    coefficients,
    exponent_of,
    newest_share,
    width,
)
from echolab.training.engine.master_weights import masters_of

KEPT = (0.05, 0.1)


def test_widths_equal_those_of_the_paper() -> None:
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)  # section 3.1
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)


@given(st.floats(1e-4, 0.288))
def test_the_exponent_follows_from_the_width(sigma: float) -> None:
    assert width(exponent_of(sigma)) == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.29, float("nan")])
def test_impossible_widths_are_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match="must lie in"):
        exponent_of(sigma)


@given(st.floats(0, 20), st.floats(0, 20), st.floats(0.1, 3), st.floats(0.1, 3))
def test_the_integral_of_a_product_matches_the_closed_form(
    g: float, h: float, s: float, t: float
) -> None:
    end = min(s, t)  # beyond it one of them is zero
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * end
    curves = [(e + 1) * (grid / last) ** e / last for e, last in ((g, s), (h, t))]
    expected = (curves[0] * curves[1]).sum() * end / 20000
    assert Profile(g, s).dot(Profile(h, t)) == pytest.approx(float(expected), rel=1e-4)


def test_the_recursion_has_the_profile() -> None:
    """The weight of each step's value in the average after 400 steps is tau^g."""
    exponent, shares = exponent_of(0.1), torch.zeros(400, dtype=torch.float64)
    for step in range(400):
        share = newest_share(exponent, step + 1)
        shares *= 1 - share
        shares[step] += share
    times = torch.arange(1, 401, dtype=torch.float64) / 400
    mean = (shares * times).sum()
    assert shares.sum() == pytest.approx(1)
    assert ((shares * (times - mean) ** 2).sum().sqrt()) == pytest.approx(0.1, rel=0.01)


def test_a_tracked_average_is_reconstructed_from_itself() -> None:
    kept = [Profile(exponent_of(s), t) for t in (100, 200, 300) for s in KEPT]
    result = coefficients(kept, kept[-1])
    assert result[:-1] == pytest.approx([0] * 5, abs=1e-6) and result[-1] == pytest.approx(1)


def walk(folder: Path, steps: int, every: int, wanted: float) -> tuple[saved.Saver, torch.Tensor]:
    """Return wandering weights, and the average of the requested width, tracked from the start."""
    when = {"keep": lambda step: False, "snapshot": lambda step: step % every == 0}
    saver = saved.Saver(folder, widths=KEPT, **when)
    truth = Ema(0.0, (), (wanted,))
    truth.start(saver.masters)
    generator = torch.Generator().manual_seed(2)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for tensor in saver.masters.local:
                tensor.add_(torch.randn(tensor.shape, generator=generator))
        saver.ema.update(saver.masters)
        truth.update(saver.masters)
        if step % every == 0:
            saver.writer.begin(saved.state(step, saver.ema))
            saver.writer.finish()
    saver.writer.close()
    return saver, torch.cat([t.flatten() for t in truth.flats[f"power-{wanted}"]])


@pytest.mark.parametrize("wanted", [0.03, 0.08, 0.15])
def test_an_average_of_another_width_is_made_from_snapshots(tmp_path: Path, wanted: float) -> None:
    saver, truth = walk(tmp_path, 800, 50, wanted)
    newest, _ = latest_valid(tmp_path)
    assert newest and len(list((tmp_path / "snapshots").iterdir())) == 16
    assert len(list(tmp_path.glob("step-*"))) == 2  # the checkpoints are gone, the snapshots stay
    result = average_of_width(newest, wanted)
    made = torch.cat([result[name].flatten() for name in saver.masters.parameters])

    def error(other: torch.Tensor) -> float:
        return float((other - truth).square().mean().sqrt())

    own = [torch.cat([t.flatten() for t in saver.ema.flats[f"power-{s}"]]) for s in KEPT]
    assert error(made) < 0.2 * min(map(error, own))  # than the nearest that was followed
    kept = average_of_width(newest, 0.05)  # and one that was followed comes back
    again = torch.cat([kept[name].flatten() for name in saver.masters.parameters])
    torch.testing.assert_close(again, own[0], rtol=1e-3, atol=1e-3)


def test_a_snapshot_is_a_verified_checkpoint(tmp_path: Path) -> None:
    walk(tmp_path, 6, 2, 0.08)
    snapshot = open_checkpoint(tmp_path / "snapshots/step-000002")
    assert snapshot.parts == ["power-0.05", "power-0.1"]
    assert json.loads((snapshot.path / "state.json").read_bytes())["ema"]["updates"] == 2
    file = next(snapshot.path.glob("power-0.05-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    newest, _ = latest_valid(tmp_path)
    assert newest
    with pytest.raises(CheckpointError, match="snapshots/step-000002"):
        average_of_width(newest, 0.08)


def test_a_run_without_snapshots_says_how_to_get_them(tmp_path: Path) -> None:
    saved.Saver(tmp_path).save(1)
    newest, _ = latest_valid(tmp_path)
    assert newest
    with pytest.raises(CheckpointError, match="train with optim.posthoc_ema_stds"):
        average_of_width(newest, 0.08)


def test_constant_weights_are_a_fixed_point_of_all() -> None:
    net = torch.nn.Linear(3, 2)
    masters = masters_of(net, torch.optim.AdamW(net.parameters()))
    ema = Ema(0.9, (0.99,), KEPT)
    ema.start(masters)
    for _ in range(5):
        ema.update(masters)
    for flats in ema.flats.values():
        torch.testing.assert_close(flats, masters.local, rtol=0, atol=1e-7)
