"""Goodput on a scripted timeline: every second belongs to a category."""

import math
from pathlib import Path

import pytest
from attempt_records import attempt, saved

from echolab.launch.attempts import attempts_of
from echolab.launch.explain import checkpoint_interval, measure_goodput, summarize
from echolab.launch.launch_records import NodeRecord

# 1. 0 -> 10 steps of 10 s, saved at 6, killed; 2. resumes at 6, hangs at 8 for 60 s;
# 3. resumes at 6 again (no checkpoint was made) and ends at 20.
FIRST = saved(
    "killed", -1, 6, started=0.0, ended=150.0, first_step=0, last_step=10,
    seconds={"init": 30.0, "forward": 40.0, "backward": 50.0, "vote": 10.0, "save": 5.0,
             "data_wait": 5.0, "teardown": 0.0},
)  # fmt: skip
SECOND = saved(
    "hang", 6, 6, started=200.0, ended=312.0, first_step=6, last_step=8,
    last_section="vote", last_stay=60.0,
    seconds={"init": 30.0, "forward": 8.0, "backward": 10.0, "vote": 62.0},
)  # fmt: skip
THIRD = saved(
    "done", 6, 20, started=400.0, ended=590.0, first_step=6, last_step=20,
    seconds={"init": 30.0, "forward": 60.0, "backward": 70.0, "optimizer": 10.0, "eval": 8.0,
             "save": 7.0, "teardown": 5.0},
)  # fmt: skip


def test_every_second_belongs_to_a_category() -> None:
    goodput = measure_goodput([FIRST, SECOND, THIRD])
    assert goodput.allocated == 150 + 112 + 190  # the queue between them is nobody's
    assert goodput.losses == pytest.approx({
        "waiting": 0, "init": 90, "data_wait": 5, "eval": 8, "save": 12, "pause": 0,
        "rework": 0.4 * 100 + 20,  # steps 7 to 10 of the first, both of the second
        "hang": 60,
        "other": 10 + 2 + 5,
    })  # fmt: skip
    assert goodput.useful == pytest.approx(60 + 140)
    assert goodput.useful + sum(goodput.losses.values()) == pytest.approx(goodput.allocated)
    assert goodput.share == pytest.approx(200 / 452)
    # A wait for the launch before is part of an attempt's time.
    later = measure_goodput([FIRST, SECOND, THIRD._replace(elapsed=220.0, waited=30.0)])
    assert later.losses == pytest.approx(goodput.losses | {"waiting": 30})
    assert later.useful == goodput.useful and later.allocated == goodput.allocated + 30


def test_steps_without_a_checkpoint_count_as_lost() -> None:
    assert measure_goodput([FIRST]).losses["rework"] == pytest.approx(40)
    assert measure_goodput([attempt("killed", seconds={"forward": 50.0})]).useful == 0
    # not while it is at work, nor when it is done
    assert measure_goodput([attempt("running", seconds={"forward": 50.0})]).useful == 50
    assert measure_goodput([]).share == 0


def test_the_suggested_interval_between_checkpoints() -> None:
    # BLOOM: 40 s a save, a failure a week
    week, day = 7 * 24 * 3600.0, 24 * 3600.0
    run = attempt("killed", started=0.0, ended=2 * week - day, save_seconds=40.0)
    interval = checkpoint_interval([run])
    assert interval == pytest.approx(math.sqrt(2 * 40 * week)) and 1.8 < interval / 3600 < 2.0
    assert checkpoint_interval([attempt("done")]) == 300
    assert checkpoint_interval([attempt("done", save_seconds=3600.0)]) == 4 * 3600


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0, 30 * 365 * 86_400.0, -1e9])
def test_setting_the_clock_changes_no_figure(tmp_path: Path, jump: float) -> None:
    """The clock is set during the first of two launches; their order stays too."""

    def record(name: str, epoch: int, started: float, ended: float) -> None:
        node_record = NodeRecord(
            name, 0, 1, "host", 1, [0], 1, "", started, epoch=epoch, elapsed=100.0, ended=ended,
            cause="done", exit_code=0, seconds={"forward": 90.0}, last_step=epoch,
        )  # fmt: skip
        (tmp_path / "attempts" / name).mkdir(parents=True)
        node_record.write(tmp_path / "attempts" / name)

    record("first", 1, 1e9, 1e9 + 100 + jump)
    record("second", 2, 1e9 + 200 + jump, 1e9 + 300 + jump)
    attempts = attempts_of(tmp_path)
    assert [attempt.launch for attempt in attempts] == ["first", "second"]
    goodput = measure_goodput(attempts)
    assert (goodput.allocated, goodput.useful) == (200.0, 180.0)
    rows = summarize(tmp_path, attempts, 3)["history"]
    assert [row["seconds"] for row in rows] == [100.0, 100.0]
