"""The server of ranks that other tests use."""

import signal
from pathlib import Path

import pytest
from forked import ForkServer

pytestmark = pytest.mark.slow


def test_ranks_meet_and_return_their_exit_codes(fork_server: ForkServer, tmp_path: Path) -> None:
    fork_server.run("forked:add_up", world=3, arguments={"to": str(tmp_path / "sum")})
    assert (tmp_path / "sum").read_text() == "6.0"
    failed = fork_server.start("forked:fail", world=2)
    assert failed.wait() == [0, 1]
    assert "rank 1 has had enough" in failed.output(1)


def test_one_rank_can_be_killed_and_a_hang_shows_the_stacks(fork_server: ForkServer) -> None:
    ranks = fork_server.start("forked:stay", world=2)
    while "here" not in ranks.output(0) or "here" not in ranks.output(1):
        pass
    ranks.signal(signal.SIGKILL, rank=1)
    with pytest.raises(TimeoutError, match="in stay"):
        ranks.wait(1)
    assert ranks.codes() == [-signal.SIGABRT, -signal.SIGKILL]


def test_no_rank_outlives_the_server() -> None:
    server = ForkServer()
    ranks = server.start("forked:stay", world=2)
    server.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.pids)
