"""Spikes are detected, false alarms are rare, and every rank takes the same decision."""

import json
import math
from typing import Any

import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

from echolab.errors import ConfigError, DivergedError
from echolab.training.callbacks.loss_spikes import (
    NOTHING,
    ActionKind,
    clipped,
    decide,
    event_details,
    without_checkpoint,
)
from echolab.training.guards.events import Event, History
from echolab.training.guards.spikes import (
    MIN_DEVIATION,
    Spike,
    SpikeConfig,
    SpikeDetector,
    deviations,
)
from echolab.training.schedule import Skip

STEPS = 50_000
AT_MOST = 1e-5  # false alarms a value, at the usual limit


def detector_after(values: list[float], kind: str = "sft", **options: Any) -> SpikeDetector:
    """Return a detector that has seen these losses, and gradient norms twice as large."""
    result = SpikeDetector(**options)
    for step, value in enumerate(values):
        result.observe(kind, value, 2 * abs(value), step=step)
    return result


def noise(count: int, sigma: float = 0.2, seed: int = 0) -> list[float]:
    values: list[float] = np.random.default_rng(seed).lognormal(0, sigma, count).tolist()
    return values


@pytest.mark.slow
def test_stationary_noise_raises_no_alarm() -> None:
    detector = SpikeDetector()
    narrow, wide = noise(STEPS, 0.3, 1), noise(STEPS, 1.0, 2)
    pairs = enumerate(zip(narrow, wide, strict=True))
    alarms = [s for step, (a, b) in pairs if (s := detector.observe("sft", a, b, step=step))]
    assert len(alarms) <= AT_MOST * 2 * STEPS, [spike.reason for spike in alarms]


@given(
    sigma=st.floats(0.02, 0.3), seed=st.integers(0, 99), factor=st.floats(20, 1e9),
    of_gradient=st.booleans(),
)  # fmt: skip
def test_a_spike_is_detected_and_named(
    sigma: float, seed: int, factor: float, of_gradient: bool
) -> None:
    detector = detector_after(noise(60, sigma, seed))
    before = detector.state_dict()
    values = (1.0, 2.0 * factor) if of_gradient else (factor, 2.0)
    spike = detector.observe("sft", *values, step=60)
    assert spike and spike.finite and spike.step == 60 and spike.deviations > 8
    assert spike.measure == ("gradient_norm" if of_gradient else "loss")
    assert "step 60 (sft): " in spike.reason and "robust deviations above" in spike.reason
    detector.load_state_dict(before)
    assert detector.observe("sft", 1.0, 2.0, step=60) is None
    assert detector.observe("sft", 1 / factor, 2 / factor, step=61) is None  # low is no spike


def rounded(limit: float) -> st.SearchStrategy[float]:
    """Draw numbers up to `limit` with nothing below 1e-6 but zero, so that scaling them is
    exact.
    """
    return st.floats(-limit, limit).map(lambda value: round(value, 6))


@given(
    st.lists(rounded(1e3), min_size=3, max_size=40), rounded(1e4), st.integers(-40, 40),
)  # fmt: skip
def test_detection_does_not_depend_on_units(window: list[float], value: float, power: int) -> None:
    factor = 2.0**power
    scaled = deviations(factor * value, [factor * one for one in window])
    assert scaled == pytest.approx(deviations(value, window), rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(0.1, 10), min_size=48, max_size=60), st.floats(0, 1e6), st.floats(1, 9))
def test_a_larger_value_is_at_least_as_suspect(
    window: list[float], value: float, factor: float
) -> None:
    assert deviations(factor * value, window) >= deviations(value, window)


def test_preference_losses_near_and_below_zero_are_no_spikes() -> None:
    rng = np.random.default_rng(3)
    near_zero = [float(math.log1p(math.exp(-x))) for x in rng.normal(4, 1, 400)]
    signed = rng.normal(-0.1, 0.5, 400).tolist()
    for values in (near_zero, signed):
        detector = SpikeDetector()
        result = [detector.observe("dpo", v, 1.0, step=i, epoch=1) for i, v in enumerate(values)]
        assert not any(result)
        spike = detector.observe("dpo", 50.0, 1.0, step=400, epoch=1)
        assert spike and spike.measure == "loss" and spike.deviations > 8
    # A hinge that is mostly satisfied says nothing of how large it may be.
    assert deviations(5.0, [0.0] * 30 + [1.0] * 20) == 0.0


def test_small_moves_of_a_quiet_loss_are_no_spikes() -> None:
    quiet = [0.5] * 50
    assert deviations(0.5 * 1.5, quiet) < 8 < deviations(0.5 * 1.7, quiet)
    assert deviations(0.5, quiet) == 0 and MIN_DEVIATION == 0.05


def test_kinds_and_preference_epochs_have_separate_histories() -> None:
    detector = detector_after(noise(60))
    assert detector.observe("dpo", 1e3, 1e3, step=60, epoch=1) is None  # the first of its kind
    for step in range(61, 121):
        detector.observe("dpo", 0.01, 1.0, step=step, epoch=1)
    assert detector.observe("dpo", 0.69, 1.0, step=121, epoch=1)
    assert detector.observe("dpo", 0.69, 1.0, step=122, epoch=3) is None  # a new reference
    spike = detector.observe(
        "sft", 1e3, 1.0, step=123, epoch=4
    )  # supervised epochs keep their history
    assert spike and spike.kind == "sft"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_always_a_spike(value: float) -> None:
    spike = SpikeDetector().observe("ndpo", value, 1.0, step=0)
    assert spike and not spike.finite and "not finite" in spike.reason
    json.dumps(spike.details(), allow_nan=False)
    detector = detector_after(noise(60))
    before = detector.state_dict()
    spike = detector.observe("sft", 1e9, value, step=60)
    assert spike and spike.measure == "gradient_norm"  # it comes before one that is finite
    after = detector.state_dict()["sft"]
    assert after["gradient_norm"] == before["sft"]["gradient_norm"]


def test_a_lasting_change_becomes_normal() -> None:
    detector = detector_after(noise(128), window=64)
    alarms = [detector.observe("sft", 50 * v, 2 * v, step=i) for i, v in enumerate(noise(128))]
    assert alarms[0] and not any(alarms[64:])


@given(seed=st.integers(0, 99), cut=st.integers(0, 150))
def test_decisions_are_the_same_after_a_resume(seed: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.standard_t(2, 150)).tolist()  # heavy tails: many alarms
    kinds = rng.choice(["sft", "dpo"], 150).tolist()
    complete, cut_one = (
        SpikeDetector(threshold=3, min_history=8),
        SpikeDetector(threshold=3, min_history=8),
    )
    decisions = []
    for step, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        if step == cut:
            state = json.loads(json.dumps(cut_one.state_dict(), allow_nan=False))
            cut_one = SpikeDetector(threshold=3, min_history=8)
            cut_one.load_state_dict(state)
        epoch = step // 70
        decisions.append(
            [d.observe(kind, value, value**2, step=step, epoch=epoch) for d in (complete, cut_one)]
        )
    assert all(one == other for one, other in decisions) and any(one for one, _ in decisions)


# -- what is done ---------------------------------------------------------------------------------

PLAN = runs.schedule(("sft", 200), ("dpo", 50), ("sft", 1000))
HIGH = Spike(700, "sft", "loss", 9.0, 1.0, 20.0)
BROKEN = HIGH._replace(value=math.nan, deviations=math.inf)


def event(kind: str, step: int, **about: Any) -> Event:
    return Event(1, 0.0, step, kind, about)


def test_record_continues_except_at_nan() -> None:
    guards = SpikeConfig("record")
    assert decide(None, guards, [], PLAN) == NOTHING
    assert decide(HIGH, guards, [], PLAN)[:2] == (ActionKind.RECORD, "spike")
    with pytest.raises(DivergedError, match="step 700 .*not finite; .*loss_spike.policy=recompute"):
        decide(BROKEN, guards, [], PLAN)


def test_recompute_repeats_a_step_once() -> None:
    guards = SpikeConfig("recompute")
    for spike in (HIGH, BROKEN):
        action = decide(spike, guards, [event("recompute", 699), event("spike", 700)], PLAN)
        assert action[:4] == (ActionKind.GO_BACK, "recompute", 700, None)
    again = [event("recompute", 700)]
    assert decide(HIGH, guards, again, PLAN)[:2] == (ActionKind.RECORD, "reproducible")
    with pytest.raises(DivergedError, match="twice from the same state"):
        decide(BROKEN, guards, again, PLAN)
    assert without_checkpoint(HIGH)[:2] == (ActionKind.RECORD, "spike")
    with pytest.raises(DivergedError, match="no checkpoint before it"):
        without_checkpoint(BROKEN)


def test_rollback_skips_the_batches_around_the_spike() -> None:
    guards = SpikeConfig("rollback", rollback_steps=100, skip_batches=200, max_rollbacks=2)
    action = decide(HIGH, guards, [], PLAN)
    # Step 700 is the 650th supervised one.
    assert action == (ActionKind.GO_BACK, "rollback", 600, Skip("sft", 550, 200))
    preferred = decide(HIGH._replace(step=210, kind="dpo"), guards, [], PLAN)
    assert preferred == (ActionKind.GO_BACK, "rollback", 110, Skip("preference", 0, 200))
    assert decide(HIGH, guards._replace(skip_batches=0), [], PLAN).skip is None
    by_hand = event("rollback", 700, by="command")
    own = event("rollback", 700, by="guard")
    assert decide(BROKEN, guards, [by_hand, by_hand, own], PLAN).kind is ActionKind.GO_BACK
    with pytest.raises(DivergedError, match="rolled back 2 times already"):
        decide(BROKEN, guards, [own, by_hand, own], PLAN)


@given(step=st.integers(0, 1249), back=st.integers(0, 300), count=st.integers(1, 500))
def test_a_clipped_skip_always_fits_the_schedule(step: int, back: int, count: int) -> None:
    kind = PLAN.locate(step).epoch.kind
    spike = HIGH._replace(step=step, kind=kind)
    action = decide(
        spike, SpikeConfig("rollback", rollback_steps=back, skip_batches=count), [], PLAN
    )
    assert action.skip and action.to_step <= step
    # The checkpoint that there is may be older, or, where none is old enough, newer.
    for to in (action.to_step // 2, action.to_step, step):
        skip = clipped(action.skip, PLAN, to)
        plan = PLAN.skipping(skip, to)
        assert skip.batches == count
        if to == step:
            assert plan.place(step).batch >= skip.stop
        batch = PLAN.place(step).batch
        assert batch not in [plan.place(s).batch for s in range(to, plan.steps) if
                             (plan.locate(s).epoch.kind == "sft") == (kind == "sft")]  # fmt: skip


def test_decisions_are_read_back(tmp_path: Any) -> None:
    history = History(tmp_path)
    action = decide(BROKEN, SpikeConfig("rollback"), history.events, PLAN)
    assert action.skip
    history.add(BROKEN.step, action.event, **event_details(BROKEN, 500, action.skip))
    for count in (1, 2):
        with pytest.raises(DivergedError, match=f"rolled back {count} times"):
            decide(
                BROKEN, SpikeConfig("rollback", max_rollbacks=count), History(tmp_path).events, PLAN
            )
        history.add(BROKEN.step, action.event, **event_details(BROKEN, 500))
    assert history.events[0].details["skip"] == ["sft", 550, 200]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "hope"}, "loss_spike.policy=hope: unknown"),
        ({"threshold": 0}, "loss_spike.threshold=0: must be above 0"),
        ({"threshold": math.nan}, "loss_spike.threshold=nan"),
        ({"min_history": 1}, "loss_spike.min_history=1"),
        ({"window": 10}, "at most loss_spike.window=10"),
        ({"max_rollbacks": -1}, "loss_spike.max_rollbacks=-1: must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SpikeConfig(**settings).check()
    SpikeConfig().check()
