"""Task probabilities: a function of the step, resumed bit for bit, with draws that follow them."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echolab.errors import ConfigError
from echolab.tasks.curriculum import Curriculum, Stage, draw_task, hard_to_easy

STAGES = [Stage(10, {"t2v": 1}), Stage(20, {"i2v": 3, "lip_sync": 1})]


def curriculum(min_prob: float = 0.05) -> Curriculum:
    return Curriculum(STAGES, ema_decay=0.9, min_prob=min_prob)


def test_probabilities_sum_to_one_at_every_step() -> None:
    live = curriculum()
    for step in range(0, 200, 7):
        shares = live.probabilities(step)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
        assert min(shares.values()) >= 0


def test_probabilities_follow_the_recursion_of_the_docstring() -> None:
    live = curriculum(min_prob=0.0)
    p = {"t2v": 1.0, "i2v": 0.0, "lip_sync": 0.0}
    for step in range(50):
        assert live.probabilities(step) == pytest.approx(p, abs=1e-12)
        target = {"t2v": 1.0} if step < 10 else {"i2v": 0.75, "lip_sync": 0.25}
        p = {task: 0.9 * share + 0.1 * target.get(task, 0.0) for task, share in p.items()}


def test_a_new_task_enters_smoothly_and_an_old_one_keeps_the_floor() -> None:
    live = curriculum()
    shares = [live.probabilities(step) for step in range(300)]
    assert all(share["i2v"] == 0 for share in shares[:11]) and shares[11]["i2v"] > 0
    changes = [abs(b[t] - a[t]) for a, b in zip(shares, shares[1:], strict=False) for t in a]
    assert max(changes) < 0.11
    assert all(share["t2v"] >= 0.05 for share in shares)
    own = 1 - 3 * 0.05
    settled = {"t2v": 0.05, "i2v": 0.05 + own * 0.75, "lip_sync": 0.05 + own * 0.25}
    assert shares[-1] == pytest.approx(settled)


def test_probabilities_do_not_depend_on_the_order_of_calls() -> None:
    forward, backward = curriculum(), curriculum()
    steps = [0, 3, 12, 40, 41, 100]
    ahead = [forward.probabilities(step) for step in steps]
    assert [backward.probabilities(step) for step in reversed(steps)] == ahead[::-1]


def test_a_curriculum_resumes_from_its_state_bit_for_bit() -> None:
    unbroken, resumed = curriculum(), curriculum()
    for stop in (0, 5, 10, 13, 77):
        resumed = curriculum()
        resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict(stop))))
        for step in range(stop, stop + 60):
            assert resumed.probabilities(step) == unbroken.probabilities(step)
        assert resumed.probabilities(stop) == unbroken.probabilities(stop), "and back to its start"


def test_steps_before_a_loaded_state_are_refused() -> None:
    resumed = curriculum()
    resumed.load_state_dict(curriculum().state_dict(20))
    with pytest.raises(ConfigError, match="step 19"):
        resumed.probabilities(19)


def test_a_resumed_curriculum_may_have_other_stages() -> None:
    """Tasks that both curricula have keep their share; new tasks start at 0."""
    other = Curriculum([Stage(100, {"i2v": 1, "flf2v": 1})], ema_decay=0.9)
    other.load_state_dict(curriculum().state_dict(40))
    assert other.probabilities(40) == {"i2v": 1.0, "flf2v": 0.0}
    foreign = Curriculum([Stage(1, {"continuation": 1})])
    with pytest.raises(ConfigError, match="none of its tasks"):
        foreign.load_state_dict(curriculum().state_dict(40))


def test_the_usual_stages_go_from_hard_to_easy() -> None:
    stages = hard_to_easy(100)
    assert [list(stage.targets) for stage in stages[:2]] == [["t2v"], ["t2v", "i2v"]]
    assert list(stages[-1].targets) == ["t2v", "i2v", "flf2v", "avatar_sync", "lip_sync"]
    live = Curriculum(stages, ema_decay=0.99, min_prob=0.02)
    assert live.probabilities(0)["t2v"] == 1.0
    assert live.probabilities(2000)["lip_sync"] == pytest.approx(0.2, abs=1e-3)


def test_draws_follow_the_probabilities() -> None:
    shares = {"t2v": 0.5, "i2v": 0.0, "flf2v": 0.3, "lip_sync": 0.2}
    counts = Counter(draw_task(shares, index / 10_000) for index in range(10_000))
    assert counts == {"t2v": 5000, "flf2v": 3000, "lip_sync": 2000}
    assert draw_task(shares, 1 - 2**-53) == "lip_sync"


@pytest.mark.parametrize(
    ("stages", "settings", "message"),
    [
        ([], {}, "stages: empty"),
        ([Stage(10, {"dance": 1})], {}, "no task 'dance'"),
        ([Stage(0, {"t2v": 1})], {}, "steps of 1 or more"),
        ([Stage(10, {"t2v": 0})], {}, "targets"),
        ([Stage(10, {})], {}, "targets"),
        (STAGES, {"ema_decay": 1.0}, "ema_decay=1"),
        (STAGES, {"min_prob": 0.4}, "min_prob=0.4"),
    ],
)
def test_an_impossible_curriculum_is_refused(stages, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Curriculum(stages, **settings)


def soup(steps: int, **more: float) -> Curriculum:
    return Curriculum(hard_to_easy(steps), **{"ema_decay": 0.9, "min_prob": 0.02, **more})


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 60))
def test_a_run_that_starts_from_another_continues_its_curriculum(
    stop: int, steps: int, more: int
) -> None:
    """One run of all steps equals two or three runs that each start from the one before."""
    unbroken, second = soup(steps), soup(steps).continued_from(soup(steps).state_dict(stop))
    assert second.probabilities(more) == unbroken.probabilities(stop + more)
    state = json.loads(json.dumps(second.state_dict(more)))
    third, resumed = soup(steps).continued_from(state), soup(steps)
    resumed.load_state_dict(state)
    assert third.probabilities(7) == unbroken.probabilities(stop + more + 7)
    assert resumed.probabilities(more + 7) == unbroken.probabilities(stop + more + 7)


def test_a_completed_curriculum_stays_completed_for_any_stage_lengths() -> None:
    done = soup(2).state_dict(200)
    before = soup(2).probabilities(200)
    long = soup(1000).continued_from(done)
    assert all(long.probabilities(k) == pytest.approx(before, abs=1e-6) for k in (0, 1, 4000))
    assert Curriculum([Stage(1, {"continuation": 1.0})]).continued_from(done).probabilities(0) == {
        "continuation": 1.0
    }
    joins = Curriculum([*hard_to_easy(1000), Stage(1000, {"continuation": 1.0})], ema_decay=0.9)
    assert joins.continued_from(done).probabilities(300)["continuation"] == pytest.approx(1.0)
