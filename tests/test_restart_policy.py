"""The restart policy: whether a run is started again, by the ends of its attempts."""

import pytest
from attempt_records import attempt, saved

from echolab.launch.attempts import Attempt
from echolab.launch.exit_codes import CAUSES
from echolab.launch.restart_policy import decide

LONG = {"seconds": {"forward": 500.0, "backward": 500.0}}


@pytest.mark.parametrize(
    ("attempts", "restart", "reason"),
    [
        ([], False, "not started"),
        ([attempt("running")], False, "running"),
        ([attempt("done")], False, "all steps done"),
        ([attempt("stop")], False, "STOP"),
        ([attempt("pruned")], False, "sweep"),
        # preemption is free, but not for ever where nothing can be saved
        ([saved("preempted", n, n + 1) for n in range(50)], True, "not counted"),
        ([attempt("preempted_unsaved") for _ in range(50)], True, "not counted"),
        ([attempt("preempted_unsaved", **LONG)], True, "not counted"),
        ([attempt("preempted_unsaved", **LONG)] * 2, False, "2 attempts in a row"),
        # what would fail again
        ([attempt("config")], False, "setting"),
        ([saved("preempted", 0, 5), attempt("data")], False, "damaged"),
        ([saved("diverged", 0, 500)], False, "not finite"),
        # an exception: once
        ([saved("code", 0, 5)], True, "code failure 1 of 1"),
        ([attempt("code")], True, "code failure 1 of 1"),
        ([saved("code", 0, 5), attempt("code")], False, "2 code failures, 1 allowed"),
        ([saved("code", 0, 5), saved("code", 5, 9)], True, "1 of 1"),
        # machines: several times, while checkpoints are made
        ([attempt("hang")], True, "infrastructure failure 1 of 3"),
        ([saved("hang", n, n + 1) for n in range(9)], True, "1 of 3"),
        ([saved("hang", 0, 5), attempt("killed")], True, "2 of 3"),
        ([saved("hang", 0, 5), attempt("killed"), attempt("hang")], False, "2 attempts in a row"),
        ([attempt("node_lost")] * 2, False, "2 attempts in a row saved no checkpoint"),
        # a preemption in between, before there was a chance, hides nothing and counts for nothing
        ([attempt("hang"), attempt("preempted_unsaved"), attempt("hang")], False, "2 attempts"),
        ([attempt("hang"), attempt("preempted_unsaved")], True, "not counted"),
        # a setting was corrected in between
        ([attempt("config"), attempt("config"), attempt("hang")], True, "1 of 3"),
    ],
)  # fmt: skip
def test_each_history_leads_to_a_restart_or_a_stop(
    attempts: list[Attempt], restart: bool, reason: str
) -> None:
    decision = decide(attempts)
    assert decision.restart is restart and reason in decision.reason, decision


def test_the_budget_for_infrastructure_faults_is_a_setting() -> None:
    two = [saved("hang", 0, 5), attempt("killed")]
    assert decide(two, max_infrastructure=2).restart
    stopped = decide(two, max_infrastructure=1)
    assert not stopped.restart and stopped.reason == "2 infrastructure failures, 1 allowed"
    assert not decide([attempt("hang")], max_infrastructure=0).restart


def test_a_host_that_failed_twice_is_excluded() -> None:
    attempts = [
        saved("hang", 0, 5, host="n1"), saved("code", 5, 9, host="n3"),
        saved("killed", 9, 12, host="n2"), saved("code", 12, 14, host="n3"),
        saved("node_lost", 14, 16, host="n2"), saved("disk", 16, 17, host="n1"),
    ]  # fmt: skip
    assert decide(attempts).exclude == ("n2",)
    assert decide(attempts[:-2]).exclude == ()


def test_a_fault_of_unknown_rank_excludes_no_host() -> None:
    for host in ("n1", ""):
        nobody = [saved("replicas", n, n + 1, rank=-1, host=host) for n in range(2)]
        assert decide(nobody).exclude == ()
    known = [saved("replicas", n, n + 1, rank=3, host="n2") for n in range(2)]
    assert decide(known).exclude == ("n2",)


def test_every_cause_has_a_remedy() -> None:
    for name, cause in CAUSES.items():
        assert cause.summary and cause.next_action, name
        assert (cause.budget == "fatal") == (cause.exit_code == 1), name
