"""Which launch may write into a run folder: one at a time, in numbered epochs.

    RUN/.lease/000007.json    made once, by the launch that took the run: who and where it is; the
                              time of its last change is the holder's heartbeat
    RUN/.lease/000007.left    its holder has left

A number is taken by making its file, which every file system lets one process do.  A launch whose
number is not the highest is fenced: it leaves, and writes nothing any more.  A shared file system
may show it the later file only after a while: so the later launch waits until the earlier has left
or is silent, and a checkpoint that was not published by then never is (`writer`).  No lock of the
file system takes part: a process on a node that was cut off may hold one for ever, and some file
systems have none.
"""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from echolab.atomic_io import write_error
from echolab.errors import BusyError, FencedError
from echolab.launch import slurm
from echolab.launch.processes import birth
from echolab.launch.topology import this_host

LEASE = ".lease"
EPOCH = "ECHOLAB_EPOCH"  # in the environment of ranks: the number that their launch holds
BEAT_SECONDS = 5.0  # between two heartbeats
SILENT_SECONDS = 60.0  # without a heartbeat a holder is dead, or as good as dead
OBSERVE_SECONDS = 15.0  # of this machine's time without one, before clocks are believed
QUIET_SECONDS = 20.0  # without a heartbeat, after which a fenced holder is not waited for
LEAVE_SECONDS = 120.0  # the most that a fenced holder is waited for
NAME = re.compile(r"(\d{6})\.json")


class Holder(NamedTuple):
    """A launch, and the process that beats for it."""

    launch: str
    job: str = ""  # the id of its Slurm job
    restart: int = 0  # how often Slurm had started the job before
    host: str = ""
    machine: str = ""  # boot and process table: where `pid` means something
    pid: int = 0
    born: str = ""
    taken: float = 0.0  # seconds since 1970, by its own clock


def this_process(launch: str) -> Holder:
    """Return the holder that this process is, of a launch."""
    return Holder(
        launch=launch,
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        host=this_host(),
        machine=_machine(),
        pid=os.getpid(),
        born=birth(os.getpid()),
        taken=time.time(),
    )


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.readlink('/proc/self/ns/pid')}"


class Lease(NamedTuple):
    """One epoch of a run folder."""

    run: Path
    epoch: int

    @property
    def path(self) -> Path:
        """The file whose making took the epoch."""
        return self.run / LEASE / f"{self.epoch:06d}.json"

    @property
    def _left(self) -> Path:
        return self.path.with_suffix(".left")

    def fenced(self) -> bool:
        """Return whether a later launch has taken the run; one that cannot be seen has not."""
        return os.path.exists(Lease(self.run, self.epoch + 1).path)  # False where it cannot look

    def check(self) -> None:
        """Raise FencedError where a later launch has taken the run."""
        if self.fenced():
            later = newest(self.run)
            who = described(later) if later else "another launch"
            raise FencedError(
                f"{self.run}: {who} has taken the run; this launch leaves and writes nothing more"
            )

    def beat(self) -> None:
        """Tell that the holder is at work; a fenced one is silent."""
        if not self.fenced():
            with suppress(OSError):  # the next one may succeed
                os.utime(self.path)

    def leave(self) -> None:
        """Tell that the holder writes nothing any more."""
        with suppress(OSError):  # full or gone: the heartbeat ends all the same
            self._left.touch()

    def has_left(self) -> bool:
        """Return whether its holder told so, or is a process of this machine that has ended."""
        if os.path.exists(self._left):
            return True
        holder = holder_of(self)
        return holder is not None and holder.machine == _machine() and _gone(holder)

    def beaten(self) -> float:
        """Return the time of the last heartbeat by the clock of the file system; 0 if unknown."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0


def _gone(holder: Holder) -> bool:
    return birth(holder.pid) != holder.born


def newest(run: Path) -> Lease | None:
    """Return the highest epoch that was taken; None where none was."""
    try:
        names = os.listdir(run / LEASE)
    except FileNotFoundError:
        return None
    epochs = [int(match[1]) for match in map(NAME.fullmatch, names) if match]
    return Lease(run, max(epochs)) if epochs else None


def holder_of(lease: Lease) -> Holder | None:
    """Return who took an epoch; None while its file is being written, or was cut short."""
    try:
        told: dict[str, Any] = json.loads(lease.path.read_text())
        return Holder(**told)
    except (OSError, ValueError, TypeError):
        return None


def described(lease: Lease) -> str:
    """Return who holds a lease, in words."""
    holder = holder_of(lease)
    if holder is None:
        return f"the holder of {lease.path}"
    job = f" of Slurm job {holder.job}" if holder.job else ""
    return f"launch {holder.launch}{job} on {holder.host} (process {holder.pid})"


def take(run: Path, me: Holder) -> Lease:
    """Take the next epoch of a run folder, which is made where it is missing.

    Raises BusyError while another launch is at work there.  That it is over is proven by its own
    word, by the end of its process on this machine, by a later start of its Slurm job (this one),
    by Slurm, or by its silence.  Raises DataError where the folder cannot be written.
    """
    try:
        (run / LEASE).mkdir(parents=True, exist_ok=True)
        while True:
            last = newest(run)
            if last and not is_over(last, me):
                raise BusyError(
                    f"{run}: {described(last)} is at work there; wait for its end, or give "
                    "another folder by run_dir=..."
                )
            lease = Lease(run, last.epoch + 1 if last else 1)
            with suppress(FileExistsError):  # another was faster: look who
                with lease.path.open("x") as file:
                    file.write(json.dumps(me._asdict()))
                return lease
    except OSError as error:
        raise write_error(run / LEASE, error) from error


def is_over(lease: Lease, me: Holder) -> bool:
    """Return whether nobody holds `lease` any more, or nobody may beside `me`."""
    if lease.has_left():
        return True
    holder = holder_of(lease)
    if holder and holder.job and holder.job == me.job and holder.restart != me.restart:
        return holder.restart < me.restart
    if holder and holder.job and slurm.state_of(holder.launch) == "over":
        return True
    return _is_silent(lease)


def _is_silent(lease: Lease) -> bool:
    """Return whether the heartbeat is old, and stays so while this machine's own clock runs."""
    beaten = lease.beaten()
    if abs(_now(lease.run) - beaten) < SILENT_SECONDS:
        return False
    end = time.monotonic() + OBSERVE_SECONDS
    while time.monotonic() < end:
        if lease.beaten() != beaten or lease.has_left():
            break
        time.sleep(0.5)
    return lease.beaten() == beaten


def _now(run: Path) -> float:
    """Return the time by the clock that heartbeats are written with: the file system's."""
    probe = run / LEASE / f".now-{os.getpid()}-{threading.get_native_id()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now


class Leaving(NamedTuple):
    """The wait of a launch for the one before it, which is fenced and may not know yet."""

    before: Lease
    began: float  # time.monotonic()
    age: float  # seconds that its heartbeat was old then
    beaten: float

    def over(self) -> bool:
        """Return whether it has left, has been silent for long, or was waited for long enough."""
        waited = time.monotonic() - self.began
        if self.before.has_left() or waited > LEAVE_SECONDS:
            return True
        return self.before.beaten() == self.beaten and waited + self.age > QUIET_SECONDS


def leaving(lease: Lease) -> Leaving | None:
    """Return the wait for the launch before; None where there is none to wait for."""
    before = Lease(lease.run, lease.epoch - 1)
    if not before.path.exists() or before.has_left():
        return None
    beaten = before.beaten()
    return Leaving(before, time.monotonic(), max(_now(lease.run) - beaten, 0.0), beaten)


def joined(run: Path, launch: str) -> Lease | None:
    """Return the lease that the first supervisor of `launch` took; None while it has not."""
    try:
        lease = newest(run)
    except OSError:  # asked again
        return None
    holder = holder_of(lease) if lease else None
    return lease if lease and holder and holder.launch == launch and not lease.has_left() else None


@contextmanager
def held(run: Path, launch: str) -> Iterator[Lease]:
    """Hold a run folder, with a thread that beats; BusyError while another launch does."""
    lease = take(run, this_process(launch))
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            lease.beat()

    beating = threading.Thread(target=beat, name="lease", daemon=True)
    beating.start()
    try:
        if wait := leaving(lease):
            while not wait.over():
                time.sleep(0.1)
        yield lease
    finally:
        over.set()
        beating.join()
        lease.leave()


def of_environment(run: Path) -> Lease | None:
    """Return the lease that this rank's supervisor holds; None where none started it."""
    epoch = os.environ.get(EPOCH)
    return Lease(run, int(epoch)) if epoch else None
