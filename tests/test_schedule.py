"""The schedule: every step belongs to one epoch, and every batch of a dataset comes once."""

import itertools
import json
from contextlib import nullcontext
from typing import Any

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

from echolab.errors import ConfigError
from echolab.training.schedule import GROUPS, Epoch, Schedule, Skip, group_of

EPOCHS = st.lists(
    st.builds(Epoch, st.sampled_from(["sft", "ndpo", "dpo"]), st.integers(1, 5), st.just(1e-3)),
    min_size=1,
    max_size=4,
)


@given(EPOCHS, st.integers(1, 3))
def test_epochs_follow_each_other_without_gap(epochs: list[Epoch], cycles: int) -> None:
    plan = Schedule(epochs, cycles=cycles)
    expected = [
        (number, number // len(epochs), epoch, within)
        for number, epoch in enumerate(epochs * cycles)
        for within in range(epoch.steps)
    ]
    assert [tuple(plan.locate(step)) for step in range(plan.steps)] == expected


@given(EPOCHS, st.integers(1, 3))
def test_each_dataset_continues_at_its_last_batch(epochs: list[Epoch], cycles: int) -> None:
    plan = Schedule(epochs, cycles=cycles)
    step_plans = [plan.place(step) for step in range(plan.steps)]
    for supervised in (True, False):
        batches = [step.batch for step in step_plans if (step.kind == "sft") == supervised]
        assert batches == list(range(len(batches)))
    counted = [plan.supervised_steps(step) for step in range(plan.steps + 1)]
    assert counted[-1] == sum(step.kind == "sft" for step in step_plans) and counted[0] == 0


def test_the_learning_rate_warms_up_and_belongs_to_the_epoch() -> None:
    plan = Schedule([Epoch("sft", 4, 1.0), Epoch("dpo", 2, 0.1)], warmup=4)
    assert [plan.lr(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 0.1, 0.1]
    cosine = Schedule([Epoch("sft", 10, 1.0)], decay="cosine")
    rates = [cosine.lr(step) for step in range(10)]
    assert rates[0] == 1.0 and rates[5] == pytest.approx(0.5) and rates == sorted(rates)[::-1]


def test_boundaries_and_references_are_at_epoch_starts() -> None:
    plan = runs.schedule(("sft", 3), ("dpo", 2), ("sft", 1))
    assert [s for s in range(7) if plan.is_boundary(s)] == [3, 5, 6]
    assert [s for s in range(7) if plan.needs_reference(s)] == [3]


def test_only_future_steps_of_a_run_may_change() -> None:
    state = runs.schedule(("sft", 3), ("dpo", 2)).state_dict()
    runs.schedule(("sft", 3), ("dpo", 9), ("sft", 1)).check_continues(state, 4)
    runs.schedule(("sft", 30)).check_continues(state, 2)
    runs.schedule(("sft", 30)).check_continues(state, 3)
    with pytest.raises(ConfigError, match=r"schedule.epochs\[0\]"):
        runs.schedule(("sft", 4), ("dpo", 2)).check_continues(state, 4)
    with pytest.raises(ConfigError, match=r"schedule.epochs\[1\]"):
        runs.schedule(("sft", 3), ("ndpo", 2)).check_continues(state, 4)


@pytest.mark.parametrize(
    ("epochs", "words"),
    [([], "0 epochs"), ([("sfd", 1, 1.0)], "kind is one of"), ([("sft", 0, 1.0)], "steps 1")],
)
def test_an_impossible_schedule_is_refused(epochs: list[Epoch], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Schedule([Epoch(*epoch) for epoch in epochs])


SKIPS = st.lists(
    st.builds(Skip, st.sampled_from(GROUPS), st.integers(0, 30), st.integers(1, 9)), max_size=4
)


def batches(plan: Schedule, group: str, steps: int | None = None) -> list[int]:
    """Return the batches that a group's steps take, in order."""
    step_plans = [plan.place(step) for step in range(plan.steps if steps is None else steps)]
    return [step.batch for step in step_plans if group_of(step.kind) == group]


@given(EPOCHS, st.integers(1, 3), SKIPS)
def test_skipped_batches_never_come_and_all_others_come_once_in_order(
    epochs: list[Epoch], cycles: int, skips: list[Skip]
) -> None:
    plain = Schedule(epochs, cycles=cycles)
    plan = Schedule(epochs, cycles=cycles, skipped=skips)
    assert plan.steps == plain.steps
    for group in GROUPS:
        out = {b for s in skips if s.kind == group for b in range(s.first, s.stop)}
        allowed = (b for b in itertools.count() if b not in out)
        assert batches(plan, group) == list(itertools.islice(allowed, len(batches(plain, group))))
    for step in range(plan.steps):
        assert plan.place(step).batch - plan.place(step).skipped == plain.place(step).batch
        assert plan.supervised_steps(step) == plain.supervised_steps(step)


@given(EPOCHS, SKIPS, SKIPS, st.data())
def test_a_skip_may_only_concern_the_future(
    epochs: list[Epoch], old: list[Skip], new: list[Skip], data: st.DataObject
) -> None:
    before, after = Schedule(epochs, skipped=old), Schedule(epochs, skipped=new)
    step = data.draw(st.integers(0, before.steps))
    state = json.loads(json.dumps(before.state_dict()))
    same = all(batches(before, g, step) == batches(after, g, step) for g in GROUPS)
    with nullcontext() if same else pytest.raises(ConfigError, match="events.jsonl"):
        after.check_continues(state, step)
    for skip in new:
        early = skip.first < before.begun(skip.kind, step)
        with pytest.raises(ConfigError, match="trained on before") if early else nullcontext():
            after = before.skipping(skip, step)
            after.check_continues(state, step)
            assert set(after.skipped) == {*before.skipped, skip}
            assert not set(batches(after, skip.kind)) & set(range(skip.first, skip.stop))
            assert batches(before, "sft", step) == batches(after, "sft", step)
            before.check_continues(state, step)  # it has not changed


def test_a_checkpoint_without_skips_means_a_run_without_skips() -> None:
    plan = runs.schedule(("sft", 9))
    state = {"epochs": plan.state_dict()["epochs"]}
    Schedule(plan.epochs, skipped=[Skip("sft", 4, 2)]).check_continues(state, 4)
    with pytest.raises(ConfigError, match=r"left out sft batches \[\] up to step 5, now \[\(4, 5"):
        Schedule(plan.epochs, skipped=[Skip("sft", 4, 2)]).check_continues(state, 5)
    with pytest.raises(ConfigError, match="batches 1 or more"):
        Schedule(plan.epochs, skipped=[Skip("sft", 4, 0)])


RATES = st.lists(
    st.builds(Epoch, st.just("sft"), st.integers(1, 4), st.sampled_from([1e-3, 2e-3])),
    min_size=1,
    max_size=3,
)
SHAPES = st.fixed_dictionaries(
    {"warmup": st.integers(0, 3), "decay": st.sampled_from(["constant", "cosine"])}
)


@given(RATES, SHAPES, RATES, SHAPES, RATES, SHAPES, st.data())
def test_a_run_keeps_the_rates_that_it_was_trained_with(
    first: list[Epoch], a: dict[str, Any], second: list[Epoch], b: dict[str, Any],
    third: list[Epoch], c: dict[str, Any], data: st.DataObject,
) -> None:  # fmt: skip
    """After any accepted changes, lr(step) is the rate with which the step was trained."""
    run = Schedule(first, **a)
    trained: list[float] = []
    for epochs, shape in ((first, a), (second, b), (third, c)):
        given = Schedule(epochs, **shape)
        if trained:
            state = json.loads(json.dumps(run.state_dict()))
            try:
                given.check_continues(state, len(trained))
            except ConfigError:
                continue
            run = given.continuing(state, len(trained))
        else:
            run = given
        stop = data.draw(st.integers(len(trained), run.steps))
        trained += [run.lr(step) for step in range(len(trained), stop)]
        assert [given.lr(step) for step in range(stop, given.steps)] == [
            run.lr(step) for step in range(stop, run.steps)
        ]
        assert [run.lr(step) for step in range(stop)] == trained


@given(RATES, SHAPES, RATES, SHAPES)
def test_a_finished_schedule_may_only_be_extended(
    old: list[Epoch], a: dict[str, Any], new: list[Epoch], b: dict[str, Any]
) -> None:
    before, after = Schedule(old, **a), Schedule(new, **b)
    state = json.loads(json.dumps(before.state_dict()))
    try:
        after.check_continues(state, before.steps)
    except ConfigError:
        return
    same = (before.epochs, before.rates) == (after.epochs, after.rates)
    assert same or after.steps > before.steps
