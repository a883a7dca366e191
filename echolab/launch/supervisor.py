"""Starts the ranks of a launch that are this machine's, watches them, and ends them with a verdict.

A thin process: it imports no torch, talks to no rank but by signals and small files, and takes part
in no collective.  So whatever happens to a rank, it is there to say what, and to end the job.
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

from echolab.atomic_io import retried, write_error
from echolab.errors import BusyError, StorageError
from echolab.heartbeat import FOLDER as BEATS
from echolab.heartbeat import Beat
from echolab.launch import error_files, evidence, exit_codes, launch_records, lease, processes
from echolab.launch.diagnosis import Verdict, culprit
from echolab.launch.exit_codes import CAUSES
from echolab.launch.launch_records import NodeRecord
from echolab.launch.lease import Lease
from echolab.launch.messages import last_words
from echolab.launch.rank_process import Rank, observe
from echolab.launch.run_dir import ATTEMPTS
from echolab.launch.section_timeouts import (
    Deadlines,
    RunningClock,
    limit,
    longest_of,
    overdue,
    unheard_limit,
)
from echolab.launch.topology import Layout
from echolab.training.signals import SIGNALS, caught, leave_terminal

POLL_SECONDS = 0.05
LOOK_SECONDS = 0.5  # between two looks at the sections, and at other supervisors
GRACE_SECONDS = 2.0  # after a rank failed, for the others to tell what they saw
KILL_SECONDS = 5.0  # for the kernel to end what was killed
END_SECONDS = 45.0  # for the stacks, the record, and others' records
OTHERS_SECONDS = 15.0  # after a failure, for other supervisors to see it and write their records
JOIN_SECONDS = 600.0  # that the first supervisor of a launch may take to take the run
OVER = "over"  # the file by which a supervisor tells others that the launch failed
ENDED = "ended-"  # the files by which each supervisor says that its record is whole


class Supervisor:
    """One launch, on one machine."""

    def __init__(
        self,
        layout: Layout,
        command: Sequence[str],
        run: Path,
        deadlines: Deadlines,
        grace: Mapping[int, float] | None = None,
    ) -> None:
        """`grace` is how many seconds a signal leaves until Slurm kills all, by its number."""
        self.layout, self.command, self.run, self.deadlines = layout, command, run, deadlines
        self.grace = dict(grace or {})
        self.clock = RunningClock()
        self.folder = run.absolute() / ATTEMPTS / layout.launch
        self.ranks: list[Rank] = []
        self.asked = 0  # the first signal that was passed on
        self.asked_at = 0.0
        self.impatient_since = 0.0  # the second Ctrl-C, 0 before
        self._steps_when_asked: dict[int, int] | None = None
        self.unheard = 0.0  # seconds after a signal in which no step ended, if that is the end
        self.late: dict[int, float] = {}
        self.stopped_since: dict[int, float] = {}
        self.followed = False
        self.lease: Lease | None = None
        self.fenced = False  # a later launch has taken the run
        self._beaten = time.monotonic()
        self.code = exit_codes.RETRYABLE  # until the end is known
        self._quiet = threading.Event()  # nothing is to be told any more

    def watch(self) -> int:
        """Until all ranks have ended; the exit code of `exit_codes`.

        SIGNALS are passed on.  However it ends, no rank is left.
        Raises BusyError, before anything is written, while another launch is at work in the run.
        """
        before = {number: signal.signal(number, self._pass_on) for number in caught()}
        try:
            if self._take_the_run():
                self._begin_record()
                if self._wait_for_the_one_before():
                    self._run_ranks()
                else:
                    self._give_up()
            else:
                self.code = exit_codes.STOPPED_UNSAVED
            return self.code
        finally:
            if self.lease and self.layout.supervisor == 0:
                self.lease.leave()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run_ranks(self) -> None:
        self.beats = error_files.make_folder(self.layout.numbers)
        remover = processes.remove_after(self.beats)
        try:
            self._start()
            failed = self._until_the_end()
            self._quiet.set()
            self._end_within_bounds(failed)
        finally:
            self._kill()
            processes.removed(*remover)

    def _take_the_run(self) -> bool:
        """Hold the run, or join the first supervisor in it; False where a signal came meanwhile."""
        began, launch = time.monotonic(), self.layout.launch
        if self.layout.supervisor == 0:
            self.lease = lease.take(self.run, lease.this_process(launch))
        while self.lease is None and not self.asked:
            self.lease = lease.joined(self.run, launch)
            if time.monotonic() - began > JOIN_SECONDS:
                raise BusyError(f"{self.run}: the launch's first supervisor did not take the run")
            time.sleep(POLL_SECONDS)
        return self.lease is not None

    def _begin_record(self) -> None:
        """From here on `echolab why` knows of this launch."""
        assert self.lease
        layout = self.layout
        if layout.launch.startswith("torchrun"):  # which gives every start the same name
            layout = self.layout = layout._replace(launch=f"{layout.launch}-{self.lease.epoch}")
        self.folder = self.run.absolute() / ATTEMPTS / layout.launch
        try:
            retried(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        except OSError as error:
            raise write_error(self.folder, error) from error
        self.record = NodeRecord(
            layout.launch, layout.supervisor, layout.supervisors, layout.host, layout.world,
            list(layout.numbers), os.getpid(),
            processes.birth(os.getpid()), time.time(),
            epoch=self.lease.epoch, checkpoint_before=launch_records.newest_checkpoint(self.run),
        )  # fmt: skip
        self._began = self._written = time.monotonic()
        self._write_record()
        if layout.supervisor == 0:
            evidence.note_earlier(self.run, layout.launch)

    def _wait_for_the_one_before(self) -> bool:
        """Until the launch from which the run was taken has left; False where a signal came."""
        assert self.lease
        began, wait = time.monotonic(), lease.leaving(self.lease)
        if wait and not wait.over() and self.layout.supervisor == 0:
            who = lease.described(wait.before)
            print(f"echolab: {self.run}: waits for {who} to leave", file=sys.stderr, flush=True)
        while wait and not wait.over():
            self._keep_the_run()
            if self.asked or self.fenced:
                return False
            time.sleep(POLL_SECONDS)
        self.record.waited = time.monotonic() - began
        self.record.checkpoint_before = launch_records.newest_checkpoint(self.run)
        return True

    def _give_up(self) -> None:
        """End before any rank was started."""
        if self.fenced:
            self.code = CAUSES["fenced"].exit_code
            return
        self.code = self.record.exit_code = exit_codes.STOPPED_UNSAVED
        self.record.cause, self.record.asked = "preempted_unsaved", self.asked
        self.record.detail = f"{signal.Signals(self.asked).name} before the ranks began"
        self.record.ended = time.time()
        self._write_record()

    def _keep_the_run(self) -> None:
        """Beat, where this supervisor is the first; and see whether a later launch came."""
        assert self.lease
        with suppress(OSError):  # the next look may succeed
            self.fenced = self.lease.fenced()
        if self.layout.supervisor == 0 and time.monotonic() - self._beaten > lease.BEAT_SECONDS:
            self._beaten = time.monotonic()
            self.lease.beat()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if not self.asked:
            self.asked, self.asked_at = number, time.monotonic()
        elif self.asked == number == signal.SIGINT and "SLURM_PROCID" not in os.environ:
            self.impatient_since = self.impatient_since or time.monotonic()
        # Slurm tells every process of a step: a second SIGINT would mean impatience.
        if number == signal.SIGINT and "SLURM_PROCID" in os.environ:
            number = signal.SIGTERM
        self._send(number)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.exit is None:
                processes.send(rank.pid, number)

    def _start(self) -> None:
        layout, early = self.layout, self.asked
        self.record.beats = str(self.beats)
        # Signals wait until a rank can take them: none is lost, and none ends it unheard.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for number in range(layout.ranks):
                self._start_rank(number)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if early:  # it came when there were no ranks to pass it on to
            self._send(early)
        self.record.pids = [rank.pid for rank in self.ranks]
        self._tell()
        self._talker = threading.Thread(target=self._talk, name="talk", daemon=True)
        self._talker.start()

    def _talk(self) -> None:
        """All that touches the run's folder meanwhile: a file system that hangs stops but this."""
        while not self._quiet.wait(LOOK_SECONDS):
            self._keep_the_run()
            if self.fenced:
                return
            self.followed = os.access(self.folder / OVER, os.F_OK)
            news = self.asked != self.record.asked
            if news or time.monotonic() - self._written > launch_records.SECONDS:
                self._tell()

    def _start_rank(self, number: int) -> None:
        env = {**os.environ, **self.layout.environment(number)}
        assert self.lease
        env |= {BEATS: str(self.beats), lease.EPOCH: str(self.lease.epoch)}
        rank = self.layout.first + number
        if rank == 0:  # has the terminal
            self.ranks.append(Rank(rank, processes.start(self.command, env, None), self.beats))
            return
        with (self.folder / f"rank-{rank}.log").open("ab") as log:
            self.ranks.append(Rank(rank, processes.start(self.command, env, log), self.beats))

    def _until_the_end(self) -> bool:
        """Whether the launch failed; otherwise all ranks have ended by themselves."""
        looked = 0.0
        while any(rank.look() is None for rank in self.ranks):
            if any(rank.exit and not error_files.expected(rank.exit) for rank in self.ranks):
                self._wait_for_words()
                return True
            if self.fenced:
                return True
            if self.impatient_since and time.monotonic() - self.impatient_since > GRACE_SECONDS:
                return True  # in a collective no rank can listen
            if self.clock.tick() - looked >= LOOK_SECONDS:
                looked = self.clock.tick()
                self.late = self._overdue(looked)
                if self.late or self.followed:
                    return True
            time.sleep(POLL_SECONDS)
        return any(not error_files.expected(rank.exit or 0) for rank in self.ranks)

    def _wait_for_words(self) -> None:
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and any(rank.look() is None for rank in self.ranks):
            time.sleep(POLL_SECONDS)

    def _overdue(self, now: float) -> dict[int, float]:
        written = {rank.number: rank.beat() for rank in self.ranks if rank.exit is None}
        beats = {
            n: beat._replace(since=now - self.clock.ran(beat.since)) for n, beat in written.items()
        }
        late = overdue(beats, now, self.deadlines, elsewhere=self.layout.supervisors > 1)
        return late or self._deaf(beats) or self._unheard(beats) or self._stopped(now)

    def _stopped(self, now: float) -> dict[int, float]:
        """Ranks that somebody stopped, and left so: in no section will they go on by themselves."""
        floor = self.deadlines.floor
        states = {r.number: processes.see(r.pid).state for r in self.ranks if r.exit is None}
        stopped = [number for number, state in states.items() if state == "T"]
        self.stopped_since = {n: self.stopped_since.get(n, now) for n in stopped}
        return {
            n: floor for n, since in self.stopped_since.items() if self.clock.ran(since) > floor
        }

    def _votes(self, beats: Mapping[int, Beat]) -> int:
        """Return how many steps have ended on all ranks since they were asked to stop."""
        steps = {number: beat.step for number, beat in beats.items()}
        if self._steps_when_asked is None:
            self._steps_when_asked = steps
        return min(steps[number] - self._steps_when_asked[number] for number in steps)

    def _deaf(self, beats: Mapping[int, Beat]) -> dict[int, float]:
        """Ranks that were asked to stop, and went on through vote after vote."""
        if not self.asked or not beats:
            return {}
        stays = longest_of(beats)
        allowed = sum(limit(self.deadlines, k, stays) for k in ("step", "save", "teardown"))
        late = self._votes(beats) > 2 and self.clock.ran(self.asked_at) > allowed
        return dict.fromkeys(beats, allowed) if late else {}

    def _unheard(self, beats: Mapping[int, Beat]) -> dict[int, float]:
        """Return ranks that were asked to stop and come to no vote in which they could hear it."""
        if not self.asked or not beats or self._votes(beats):
            return {}
        number = signal.SIGTERM if self.asked == signal.SIGINT else self.asked
        allowed = unheard_limit(self.deadlines, self.grace.get(number), beats.values())
        if allowed is None or self.clock.ran(self.asked_at) <= allowed:
            return {}
        self.unheard = allowed
        return dict.fromkeys(beats, allowed)

    # -- the end ------------------------------------------------------------------------------

    def _end_within_bounds(self, failed: bool) -> None:
        """The verdict and its record; where the run's folder does not answer, without."""

        def end() -> None:
            self._talker.join()
            self._keep_the_run()
            if self.fenced:
                self._kill()
                self.code = CAUSES["fenced"].exit_code
                print(f"echolab: {self.run}: {CAUSES['fenced'].says}", file=sys.stderr, flush=True)
                return
            self.code = self._judge() if failed else self._finish()
            if self.code:
                self._wait_for_others(OTHERS_SECONDS if failed else self.deadlines.teardown)

        ending = threading.Thread(target=end, name="end", daemon=True)
        ending.start()
        ending.join(END_SECONDS + (0.0 if failed else self.deadlines.teardown))
        if ending.is_alive():
            print(f"echolab: error: {self.folder}: does not answer", file=sys.stderr, flush=True)

    def _judge(self) -> int:
        if self.impatient_since:  # whatever the ranks were at
            verdict: Verdict | None = Verdict(self.layout.first, "interrupted", "")
        else:
            seen = observe(self.ranks, self.folder, self.layout.host, self.late)
            self.record.observations = seen
            verdict = culprit(seen)
        if verdict and self.unheard and verdict.cause == "hang":
            name = signal.Signals(self.asked).name
            words = f"{name}, and no step ended within {self.unheard:.0f} s: {verdict.detail}"
            verdict = verdict._replace(cause="preempted_unsaved", detail=words)
        if verdict is None:  # its ranks only wait for those of another supervisor
            verdict = Verdict(self.layout.first, "node_lost", "ended with the others")
        self._declare_over()
        code = CAUSES[verdict.cause].exit_code
        self._close(verdict.cause, verdict.rank, verdict.detail, code)
        self._kill()
        if not self.followed:
            print(last_words(self.run, self.record), file=sys.stderr, flush=True)
        return code

    def _declare_over(self) -> None:
        """Tell the other supervisors, unless another was the first."""
        try:
            (self.folder / OVER).touch(exist_ok=False)
        except FileExistsError:
            self.followed = True
        except OSError as error:
            print(f"echolab: {write_error(self.folder / OVER, error)}", file=sys.stderr)

    def _finish(self) -> int:
        """All ranks ended by themselves, as planned."""
        ends = [error_files.end_of(self.beats, rank.number) for rank in self.ranks]
        code = max(rank.exit or 0 for rank in self.ranks)
        end = next((end for end in ends if end), None)
        cause = exit_codes.cause_of_code(code)
        detail = ""
        if end:
            cause = exit_codes.cause_of_result(end.reason, unsaved=end.unsaved)
            detail = signal.Signals(end.stopped_by).name if end.stopped_by else ""
        self._close(cause, self.layout.first, detail, code)
        return code

    def _tell(self) -> None:
        first = self.ranks[0].beat()
        present = {first.section: time.monotonic() - first.since}
        record = self.record
        record.seconds = {k: v + present.get(k, 0.0) for k, v in first.seconds.items()}
        record.longest = longest_of({rank.number: rank.beat() for rank in self.ranks})
        record.first_step, record.last_step = first.first, first.step
        record.section, record.stay = first.section, present[first.section]
        record.checkpoint = launch_records.newest_checkpoint(self.run)
        record.asked = self.asked
        self._write_record()

    def _write_record(self) -> None:
        self._written = time.monotonic()
        self.record.ran = self._written - self._began
        try:
            self.record.write(self.folder)
        except StorageError as error:  # a full disk must not end the watch
            print(f"echolab: {error}", file=sys.stderr, flush=True)

    def _close(self, cause: str, rank: int, detail: str, code: int) -> None:
        record = self.record
        record.cause, record.rank, record.detail = cause, rank, detail
        record.exit_code, record.followed = code, self.followed
        record.ended = time.time()
        self._tell()
        try:
            (self.folder / f"{ENDED}{record.supervisor}").touch()
        except OSError:  # full: said above
            pass

    def _wait_for_others(self, seconds: float) -> None:
        """Slurm kills a step once one of its tasks ends with a code: until all have told theirs."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(OSError):
                ended = sum(name.startswith(ENDED) for name in os.listdir(self.folder))
                if ended >= self.layout.supervisors:
                    return
            time.sleep(LOOK_SECONDS)

    def _kill(self) -> None:
        for rank in self.ranks:
            if rank.exit is None:
                processes.kill_group(rank.pid)
        end = time.monotonic() + KILL_SECONDS
        while any(rank.look() is None for rank in self.ranks) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
