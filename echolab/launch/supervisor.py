"""Supervisor: start the ranks of this node, monitor them, end them, and record the cause.

The supervisor is a small process that imports no torch, communicates with its ranks only by signals
and small files, and joins no collective.  It can therefore report any failure of a rank.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from echolab.atomic_io import retry, write_error
from echolab.errors import BusyError, StorageError
from echolab.heartbeat import (
    LOCAL_DIR,
    HeartbeatState,
    RunningClock,
    SectionTimeouts,
    allowed_seconds,
    longest_stays,
    overdue_ranks,
    stop_timeout,
)
from echolab.launch import exit_codes, launch_records, lease, processes
from echolab.launch.diagnosis import Verdict, find_root_cause
from echolab.launch.exit_codes import CAUSES
from echolab.launch.explain import failure_message
from echolab.launch.launch_records import NodeRecord, newest_checkpoint, record_earlier_launches
from echolab.launch.lease import Lease
from echolab.launch.rank_process import (
    Rank,
    is_planned,
    make_local_folder,
    observe,
    read_end_file,
)
from echolab.launch.run_dir import ATTEMPTS
from echolab.launch.topology import Topology
from echolab.training.signals import SIGNALS, caught, leave_terminal

POLL_SECONDS = 0.05
CHECK_SECONDS = 0.5  # between two checks of the heartbeats and of the other supervisors
GRACE_SECONDS = 2.0  # after the failure of a rank, for the others to write their error files
KILL_SECONDS = 5.0  # for the kernel to end killed processes
END_SECONDS = 45.0  # for the stack traces, the record, and the records of other supervisors
OTHERS_SECONDS = 15.0  # after a failure, for other supervisors to write their records
JOIN_SECONDS = 600.0  # for the first supervisor of a launch to take the lease
FAILED = "over"  # file by which a supervisor announces that the launch failed
ENDED = "ended-"  # prefix of the files by which supervisors announce that their record is complete


class Supervisor:
    """One launch on one node; `watch` runs it to its end."""

    record: NodeRecord

    def __init__(
        self,
        topology: Topology,
        command: Sequence[str],
        run: Path,
        timeouts: SectionTimeouts,
        grace: Mapping[int, float] | None = None,
    ) -> None:
        """Store the settings; `grace`: seconds from a signal to the kill, by signal number."""
        self.topology, self.command, self.run, self.timeouts = topology, command, run, timeouts
        self.grace = dict(grace or {})
        self.clock = RunningClock()
        self.folder = run.absolute() / ATTEMPTS / topology.launch
        self.ranks: list[Rank] = []
        # Signals that were received.
        self.stop_signal = 0  # the first signal that was forwarded
        self.stop_signal_at = 0.0
        self.second_interrupt_at = 0.0  # time of the second Ctrl-C, 0 if none
        self._steps_at_signal: dict[int, int] | None = None
        # Why the launch failed.
        self.overdue: dict[int, float] = {}  # timeout in seconds that a rank exceeded, by rank
        self.exceeded_stop_timeout = 0.0  # seconds after a signal in which no step ended
        self.suspended_since: dict[int, float] = {}
        self.followed = False  # another supervisor announced the failure
        self.lease: Lease | None = None
        self.fenced = False  # a later launch took over the run
        self._renewed_at = time.monotonic()
        self.exit_code = exit_codes.RETRYABLE  # until the end is known
        self._end_of_updates = threading.Event()

    def watch(self) -> int:
        """Supervise until all ranks have ended; return an exit code of `exit_codes`.

        Forward stop signals to the ranks.  On return all ranks have ended.  Raise BusyError, before
        anything is written, while another launch uses the run.
        """
        # From here on stop signals are forwarded; those before the start of the ranks are kept.
        handlers = {number: signal.signal(number, self._forward) for number in caught()}
        try:
            if self._take_run():
                self._begin_record()
                if self._wait_for_previous_launch():
                    self._run_ranks()
                else:
                    self._give_up()
            else:
                self.exit_code = exit_codes.STOPPED_UNSAVED
            return self.exit_code
        finally:
            if self.lease and self.topology.supervisor == 0:
                self.lease.leave()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    # -- the start ----------------------------------------------------------------------------

    def _take_run(self) -> bool:
        """Take the lease, or wait until the first supervisor did; return False after a signal."""
        # One lease for all nodes: the first supervisor takes it, the others read it.
        began, launch = time.monotonic(), self.topology.launch
        if self.topology.supervisor == 0:
            self.lease = lease.take(self.run, lease.this_process(launch))
        while self.lease is None and not self.stop_signal:
            self.lease = lease.lease_of(self.run, launch)
            if time.monotonic() - began > JOIN_SECONDS:
                raise BusyError(
                    f"{self.run}: the first node of the launch did not take the run folder "
                    f"within {JOIN_SECONDS:.0f} s; see the log of that node"
                )
            time.sleep(POLL_SECONDS)
        return self.lease is not None

    def _begin_record(self) -> None:
        """Write the first record, which makes this launch known to `echolab why`."""
        assert self.lease
        topology = self.topology
        if topology.launch.startswith("torchrun"):  # torchrun gives every start the same name
            launch = f"{topology.launch}-{self.lease.epoch}"
            topology = self.topology = topology._replace(launch=launch)
        # Retry while the file system fails temporarily.
        self.folder = self.run.absolute() / ATTEMPTS / topology.launch
        try:
            retry(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        except OSError as error:
            raise write_error(self.folder, error) from error
        self.record = NodeRecord(
            topology.launch, topology.supervisor, topology.num_supervisors, topology.host,
            topology.world_size, list(topology.ranks), os.getpid(),
            processes.process_identity(os.getpid()), time.time(),
            epoch=self.lease.epoch, checkpoint_before=newest_checkpoint(self.run),
        )  # fmt: skip
        self._began = self._written = time.monotonic()
        self._write_record()
        if topology.supervisor == 0:
            record_earlier_launches(self.run, topology.launch)

    def _wait_for_previous_launch(self) -> bool:
        """Wait until the previous launch of the run has left; return False after a signal."""
        assert self.lease
        began, wait = time.monotonic(), lease.handover(self.lease)
        if wait and not wait.is_over() and self.topology.supervisor == 0:
            holder = lease.describe(wait.previous)
            print(
                f"echolab: {self.run}: waiting for {holder} to leave", file=sys.stderr, flush=True
            )
        while wait and not wait.is_over():
            self._renew_lease()
            if self.stop_signal or self.fenced:
                return False
            time.sleep(POLL_SECONDS)
        self.record.waited = time.monotonic() - began
        self.record.checkpoint_before = newest_checkpoint(self.run)
        return True

    def _give_up(self) -> None:
        """End before any rank was started."""
        if self.fenced:
            self.exit_code = CAUSES["fenced"].exit_code
            return
        self.exit_code = self.record.exit_code = exit_codes.STOPPED_UNSAVED
        self.record.cause, self.record.stop_signal = "preempted_unsaved", self.stop_signal
        self.record.detail = f"{signal.Signals(self.stop_signal).name} before the ranks started"
        self.record.ended = time.time()
        self._write_record()

    def _run_ranks(self) -> None:
        self.local_folder = make_local_folder(self.topology.ranks)
        remover = processes.remove_at_exit(self.local_folder)
        try:
            self._start_ranks()
            failed = self._wait_until_end()
            self._end_of_updates.set()
            self._end_within_bounds(failed)
        finally:
            self._kill_ranks()
            processes.remove_now(*remover)

    def _start_ranks(self) -> None:
        early_signal = self.stop_signal
        self.record.local_folder = str(self.local_folder)
        # Ranks start with signals blocked until they have handlers, so that no signal is lost or
        # ends a rank unnoticed.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for rank in self.topology.ranks:
                self._start_rank(rank)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if early_signal:  # it arrived before there were ranks to forward it to
            self._signal_ranks(early_signal)
        self.record.pids = [rank.pid for rank in self.ranks]
        self._update_record()
        self._updater = threading.Thread(target=self._keep_updating, name="record", daemon=True)
        self._updater.start()

    def _start_rank(self, rank: int) -> None:
        assert self.lease
        topology = self.topology
        env = {**os.environ, **topology.environment(rank - topology.first_rank)}
        env |= {LOCAL_DIR: str(self.local_folder), lease.EPOCH: str(self.lease.epoch)}
        if rank == 0:  # rank 0 prints to the terminal, the other ranks to log files
            process = processes.start(self.command, env, None)
        else:
            with (self.folder / f"rank-{rank}.log").open("ab") as log:
                process = processes.start(self.command, env, log)
        self.ranks.append(Rank(rank, process, self.local_folder))

    # -- during training ----------------------------------------------------------------------

    def _renew_lease(self) -> None:
        """Renew the lease, if this is the first supervisor, and check for a later launch."""
        assert self.lease
        with suppress(OSError):  # the next check may succeed
            self.fenced = self.lease.fenced()
        is_due = time.monotonic() - self._renewed_at > lease.RENEW_SECONDS
        if self.topology.supervisor == 0 and is_due:
            self._renewed_at = time.monotonic()
            self.lease.renew()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        # The first signal counts, except for a second Ctrl-C outside of Slurm.
        in_slurm = "SLURM_PROCID" in os.environ
        if not self.stop_signal:
            self.stop_signal, self.stop_signal_at = number, time.monotonic()
        elif self.stop_signal == number == signal.SIGINT and not in_slurm:
            self.second_interrupt_at = self.second_interrupt_at or time.monotonic()
        # Slurm signals every process of a step; a rank would read two SIGINTs as a second Ctrl-C.
        if number == signal.SIGINT and in_slurm:
            number = signal.SIGTERM
        self._signal_ranks(number)

    def _signal_ranks(self, number: int) -> None:
        for rank in self.ranks:
            if rank.exit_code is None:
                processes.send(rank.pid, number)

    def _keep_updating(self) -> None:
        """Update the record and the lease; a hung file system blocks only this thread."""
        while not self._end_of_updates.wait(CHECK_SECONDS):
            self._renew_lease()
            if self.fenced:
                return
            self.followed = os.access(self.folder / FAILED, os.F_OK)
            new_signal = self.stop_signal != self.record.stop_signal
            if new_signal or time.monotonic() - self._written > launch_records.SECONDS:
                self._update_record()

    def _wait_until_end(self) -> bool:
        """Return whether the launch failed; otherwise all ranks have ended as planned."""
        last_check = 0.0
        while any(rank.poll() is None for rank in self.ranks):
            # One failed rank ends the launch, since the others would wait for it in a collective.
            if any(rank.exit_code and not is_planned(rank.exit_code) for rank in self.ranks):
                self._wait_for_error_files()
                return True
            if self.fenced:
                return True
            second = self.second_interrupt_at
            if second and time.monotonic() - second > GRACE_SECONDS:
                return True  # a rank in a collective cannot react
            # Look for hung ranks, and for a failure on another node.
            if self.clock.tick() - last_check >= CHECK_SECONDS:
                last_check = self.clock.tick()
                self.overdue = self._find_overdue(last_check)
                if self.overdue or self.followed:
                    return True
            time.sleep(POLL_SECONDS)
        return any(not is_planned(rank.exit_code or 0) for rank in self.ranks)

    def _wait_for_error_files(self) -> None:
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and any(rank.poll() is None for rank in self.ranks):
            time.sleep(POLL_SECONDS)

    # -- timeouts -----------------------------------------------------------------------------

    def _find_overdue(self, now: float) -> dict[int, float]:
        """Return the ranks that exceeded a timeout, each with that timeout in seconds."""
        states = {rank.rank: rank.heartbeat() for rank in self.ranks if rank.exit_code is None}
        # Exclude the time in which this process was suspended.
        states = {
            rank: state._replace(since=now - self.clock.elapsed(state.since))
            for rank, state in states.items()
        }
        has_remote_ranks = self.topology.num_supervisors > 1
        return (
            overdue_ranks(states, now, self.timeouts, has_remote_ranks=has_remote_ranks)
            or self._find_ignoring_signal(states)
            or self._find_unable_to_stop(states)
            or self._find_suspended(now)
        )

    def _find_suspended(self, now: float) -> dict[int, float]:
        """Return ranks that have been suspended for longer than `min_step_timeout`."""
        allowed = self.timeouts.min_step_timeout
        suspended = [
            rank.rank
            for rank in self.ranks
            if rank.exit_code is None and processes.process_state(rank.pid).state == "T"
        ]
        self.suspended_since = {rank: self.suspended_since.get(rank, now) for rank in suspended}
        return {
            rank: allowed
            for rank, since in self.suspended_since.items()
            if self.clock.elapsed(since) > allowed
        }

    def _steps_since_signal(self, states: Mapping[int, HeartbeatState]) -> int:
        """Return how many steps every rank has finished since the stop signal."""
        steps = {rank: state.step for rank, state in states.items()}
        if self._steps_at_signal is None:
            self._steps_at_signal = steps
        return min(steps[rank] - self._steps_at_signal[rank] for rank in steps)

    def _find_ignoring_signal(self, states: Mapping[int, HeartbeatState]) -> dict[int, float]:
        """Return ranks that received a stop signal and keep training."""
        if not self.stop_signal or not states:
            return {}
        # Time to finish a step, save and end, at the pace so far.
        longest = longest_stays(states.values())
        sections = ("step", "save", "teardown")
        allowed = sum(allowed_seconds(self.timeouts, name, longest) for name in sections)
        exceeded = self.clock.elapsed(self.stop_signal_at) > allowed
        return (
            dict.fromkeys(states, allowed)
            if self._steps_since_signal(states) > 2 and exceeded
            else {}
        )

    def _find_unable_to_stop(self, states: Mapping[int, HeartbeatState]) -> dict[int, float]:
        """Return ranks that received a stop signal and do not finish their step."""
        if not self.stop_signal or not states or self._steps_since_signal(states):
            return {}
        # Ctrl-C has the same grace period as SIGTERM.
        number = signal.SIGTERM if self.stop_signal == signal.SIGINT else self.stop_signal
        allowed = stop_timeout(self.timeouts, self.grace.get(number), states.values())
        if allowed is None or self.clock.elapsed(self.stop_signal_at) <= allowed:
            return {}
        self.exceeded_stop_timeout = allowed
        return dict.fromkeys(states, allowed)

    # -- the end ------------------------------------------------------------------------------

    def _end_within_bounds(self, failed: bool) -> None:
        """Diagnose and record the end; give up if the run folder does not respond in time."""

        def end() -> None:
            self._updater.join()
            self._renew_lease()
            if self.fenced:
                self._kill_ranks()
                self.exit_code = CAUSES["fenced"].exit_code
                message = f"echolab: {self.run}: {CAUSES['fenced'].summary}"
                print(message, file=sys.stderr, flush=True)
                return
            self.exit_code = self._diagnose() if failed else self._finish()
            if self.exit_code:
                self._wait_for_others(OTHERS_SECONDS if failed else self.timeouts.teardown)

        # In a thread, so that a file system that hangs cannot keep this process alive.
        end_thread = threading.Thread(target=end, name="end", daemon=True)
        end_thread.start()
        end_thread.join(END_SECONDS + (0.0 if failed else self.timeouts.teardown))
        if end_thread.is_alive():
            message = (
                f"echolab: error: {self.folder}: the file system does not respond; check it, and "
                "run the same command again"
            )
            print(message, file=sys.stderr, flush=True)

    def _diagnose(self) -> int:
        """Record the root cause of a failure, kill the ranks, report; return the exit code."""
        # A second Ctrl-C is the cause, no matter what the ranks were doing.
        if self.second_interrupt_at:
            verdict: Verdict | None = Verdict(self.topology.first_rank, "interrupted", "")
        else:
            host = self.topology.host
            self.record.observations = observe(self.ranks, self.folder, host, self.overdue)
            verdict = find_root_cause(self.record.observations)
        # A hang after a stop signal is a stop without a checkpoint.
        if verdict and self.exceeded_stop_timeout and verdict.cause == "hang":
            name, seconds = signal.Signals(self.stop_signal).name, self.exceeded_stop_timeout
            detail = f"{name}, and no step ended within {seconds:.0f} s: {verdict.detail}"
            verdict = verdict._replace(cause="preempted_unsaved", detail=detail)
        if verdict is None:  # these ranks only waited for ranks of another node
            verdict = Verdict(self.topology.first_rank, "node_lost", "no rank of this node failed")
        self._announce_failure()
        exit_code = CAUSES[verdict.cause].exit_code
        self._close_record(verdict, exit_code)
        self._kill_ranks()
        if not self.followed:
            print(failure_message(self.run, self.record), file=sys.stderr, flush=True)
        return exit_code

    def _announce_failure(self) -> None:
        """Announce the failure to the other supervisors, unless another one did before."""
        try:
            (self.folder / FAILED).touch(exist_ok=False)
        except FileExistsError:
            self.followed = True
        except OSError as error:
            print(f"echolab: {write_error(self.folder / FAILED, error)}", file=sys.stderr)

    def _finish(self) -> int:
        """Record a planned end of all ranks; return the exit code."""
        # All ranks end for the same reason: one end file is enough.
        ends = [read_end_file(self.local_folder, rank.rank) for rank in self.ranks]
        exit_code = max(rank.exit_code or 0 for rank in self.ranks)
        end = next((end for end in ends if end), None)
        cause, detail = exit_codes.cause_of_code(exit_code), ""
        if end:
            cause = exit_codes.cause_of_result(end.reason, unsaved=end.unsaved)
            detail = signal.Signals(end.stopped_by).name if end.stopped_by else ""
        self._close_record(Verdict(self.topology.first_rank, cause, detail), exit_code)
        return exit_code

    def _wait_for_others(self, seconds: float) -> None:
        """Wait for the records of all supervisors.

        Slurm kills a job step as soon as one of its tasks exits with an error.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(OSError):
                ended = sum(name.startswith(ENDED) for name in os.listdir(self.folder))
                if ended >= self.topology.num_supervisors:
                    return
            time.sleep(CHECK_SECONDS)

    def _kill_ranks(self) -> None:
        for rank in self.ranks:
            if rank.exit_code is None:
                processes.kill_group(rank.pid)
        end = time.monotonic() + KILL_SECONDS
        while any(rank.poll() is None for rank in self.ranks) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    # -- the record ---------------------------------------------------------------------------

    def _update_record(self) -> None:
        """Write the record with the state of the first rank."""
        state = self.ranks[0].heartbeat()
        stay = time.monotonic() - state.since
        record = self.record
        record.seconds = dict(state.seconds)
        record.seconds[state.section] += stay
        record.longest = longest_stays(rank.heartbeat() for rank in self.ranks)
        record.first_step, record.last_step = state.first_step, state.step
        record.section, record.stay = state.section, stay
        record.checkpoint = newest_checkpoint(self.run)
        record.stop_signal = self.stop_signal
        self._write_record()

    def _write_record(self) -> None:
        self._written = time.monotonic()
        self.record.elapsed = self._written - self._began
        try:
            self.record.write(self.folder)
        except StorageError as error:  # a full disk must not end the supervision
            print(f"echolab: {error}", file=sys.stderr, flush=True)

    def _close_record(self, verdict: Verdict, exit_code: int) -> None:
        record = self.record
        record.rank, record.cause, record.detail = verdict
        record.exit_code, record.followed = exit_code, self.followed
        record.ended = time.time()
        self._update_record()
        with suppress(OSError):  # a full disk: reported above
            (self.folder / f"{ENDED}{record.supervisor}").touch()
