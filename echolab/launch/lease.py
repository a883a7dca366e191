"""Lease of a run folder: only one launch at a time may write, in numbered epochs.

    RUN/.lease/000007.json    created once, by the launch that took the run, with its identity; the
                              modification time is the holder's heartbeat
    RUN/.lease/000007.left    the holder has left

A launch takes an epoch by creating its file, in which only one process can succeed on any file
system.  A launch whose epoch is not the highest is fenced: it leaves and writes nothing more.  A
shared file system may show the later file with a delay.  The later launch therefore waits until the
earlier one has left or is silent; from then on the earlier one publishes no checkpoint (`writer`).
No file lock is used: a process on a disconnected node may hold a lock forever, and some file
systems do not support locks.
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
from echolab.launch.processes import process_identity
from echolab.launch.topology import this_host

LEASE = ".lease"  # folder of the epochs in the run folder
EPOCH = "ECHOLAB_EPOCH"  # environment variable of ranks: the epoch that their launch holds
# A silent holder is replaced after SILENT_SECONDS.  A fenced holder is waited for, because it may
# still be writing.
RENEW_SECONDS = 5.0  # between two heartbeats
SILENT_SECONDS = 60.0  # without a heartbeat, after which a holder counts as dead
OBSERVE_SECONDS = 15.0  # for which an old heartbeat must not change, by the monotonic clock
QUIET_SECONDS = 20.0  # without a heartbeat, after which the wait for a fenced holder ends
LEAVE_SECONDS = 120.0  # longest wait for a fenced holder
NAME = re.compile(r"(\d{6})\.json")


class Holder(NamedTuple):
    """A launch, and the process that renews its lease."""

    launch: str
    job: str = ""  # id of its Slurm job
    restart: int = 0  # number of earlier starts of the job
    host: str = ""
    machine: str = ""  # boot id and pid namespace in which `pid` is valid
    pid: int = 0
    identity: str = ""  # processes.process_identity of the holder, since pids are reused
    taken: float = 0.0  # seconds since 1970, by the holder's clock


def this_process(launch: str) -> Holder:
    """Return this process as the holder of a launch."""
    return Holder(
        launch=launch,
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        host=this_host(),
        machine=_machine(),
        pid=os.getpid(),
        identity=process_identity(os.getpid()),
        taken=time.time(),
    )


def _machine() -> str:
    # A pid is valid only within one boot and one pid namespace (container).
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.readlink('/proc/self/ns/pid')}"


class Lease(NamedTuple):
    """One epoch of a run folder."""

    run: Path
    epoch: int

    @property
    def path(self) -> Path:
        """File whose creation took the epoch."""
        return self.run / LEASE / f"{self.epoch:06d}.json"

    @property
    def _left_path(self) -> Path:
        return self.path.with_suffix(".left")

    def fenced(self) -> bool:
        """Return whether a later launch took the run; False if the folder cannot be read."""
        return os.path.exists(Lease(self.run, self.epoch + 1).path)

    def check(self) -> None:
        """Raise FencedError if a later launch took the run."""
        if self.fenced():
            later = newest(self.run)
            holder = describe(later) if later else "another launch"
            raise FencedError(
                f"{self.run}: {holder} took over the run; this launch leaves and writes no more"
            )

    def renew(self) -> None:
        """Write a heartbeat, unless the lease is fenced."""
        if not self.fenced():
            with suppress(OSError):  # the next one may succeed
                os.utime(self.path)

    def leave(self) -> None:
        """Record that the holder writes nothing more."""
        with suppress(OSError):  # a full or missing folder: the heartbeat ends in any case
            self._left_path.touch()

    def has_left(self) -> bool:
        """Return whether the holder recorded that it left, or its process on this machine ended."""
        if os.path.exists(self._left_path):
            return True
        # A holder that was killed records nothing; on this machine its process shows it.
        holder = holder_of(self)
        return holder is not None and holder.machine == _machine() and _has_ended(holder)

    def renewed_at(self) -> float:
        """Return the time of the last heartbeat by the file system's clock; 0 if unknown."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0


def _has_ended(holder: Holder) -> bool:
    return process_identity(holder.pid) != holder.identity


def newest(run: Path) -> Lease | None:
    """Return the highest epoch that was taken; None if there is none."""
    # Read only the names: the file of the newest epoch may still be empty.
    try:
        names = os.listdir(run / LEASE)
    except FileNotFoundError:
        return None
    epochs = [int(match[1]) for match in map(NAME.fullmatch, names) if match]
    return Lease(run, max(epochs)) if epochs else None


def holder_of(lease: Lease) -> Holder | None:
    """Return the holder of an epoch; None while its file is incomplete."""
    # The file appears empty and is filled afterwards.
    try:
        values: dict[str, Any] = json.loads(lease.path.read_text())
        return Holder(**values)
    except (OSError, ValueError, TypeError):
        return None


def describe(lease: Lease) -> str:
    """Return the holder of a lease in words."""
    holder = holder_of(lease)
    if holder is None:
        return f"the holder of {lease.path}"
    job = f" of Slurm job {holder.job}" if holder.job else ""
    return f"launch {holder.launch}{job} on {holder.host} (process {holder.pid})"


def take(run: Path, claimant: Holder) -> Lease:
    """Take the next epoch of a run folder, which is created if it is missing.

    Raises BusyError while another launch uses the folder.  That launch has ended if it left, if its
    process on this machine ended, if this is a later start of its Slurm job, if Slurm reports its
    end, or if it is silent.  Raises DataError if the folder cannot be written.
    """
    try:
        (run / LEASE).mkdir(parents=True, exist_ok=True)
        while True:
            last = newest(run)
            if last and not is_over(last, claimant):
                raise BusyError(
                    f"{run}: {describe(last)} is using this run folder; wait for its end, or give "
                    "another folder by run_dir=..."
                )
            # Creating the file decides between launches that start at the same time.
            lease = Lease(run, last.epoch + 1 if last else 1)
            # If another launch takes this epoch first, the loop checks that launch.
            with suppress(FileExistsError):
                with lease.path.open("x") as file:
                    file.write(json.dumps(claimant._asdict()))
                return lease
    except OSError as error:
        raise write_error(run / LEASE, error) from error


def is_over(lease: Lease, claimant: Holder) -> bool:
    """Return whether a lease has ended, or `claimant` may take it from its holder."""
    if lease.has_left():
        return True
    holder = holder_of(lease)
    # A later start of the same Slurm job replaces an earlier one, which Slurm has ended.
    if holder and holder.job and holder.job == claimant.job and holder.restart != claimant.restart:
        return holder.restart < claimant.restart
    if holder and holder.job and slurm.state_of(holder.launch) == "ended":
        return True
    return _is_silent(lease)


def _is_silent(lease: Lease) -> bool:
    """Return whether the heartbeat is old, and does not change for OBSERVE_SECONDS."""
    # Clocks may jump, so also observe an old heartbeat for a while by the monotonic clock.
    renewed_at = lease.renewed_at()
    if abs(_file_system_time(lease.run) - renewed_at) < SILENT_SECONDS:
        return False
    end = time.monotonic() + OBSERVE_SECONDS
    while time.monotonic() < end:
        if lease.renewed_at() != renewed_at or lease.has_left():
            break
        time.sleep(0.5)
    return lease.renewed_at() == renewed_at


def _file_system_time(run: Path) -> float:
    """Return the time by the clock of the file system, which also sets heartbeat times."""
    # The server sets the modification time of a new file by its own clock.
    probe = run / LEASE / f".now-{os.getpid()}-{threading.get_native_id()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now


class Handover(NamedTuple):
    """A launch's wait for the previous one, which is fenced but may not have noticed yet."""

    previous: Lease
    began: float  # time.monotonic() when the wait began
    age: float  # seconds at `began` since the last heartbeat of `previous`
    renewed_at: float  # time of that heartbeat, by the file system's clock

    def is_over(self) -> bool:
        """Return whether the previous launch left or is silent, or the wait took too long."""
        waited = time.monotonic() - self.began
        if self.previous.has_left() or waited > LEAVE_SECONDS:
            return True
        silent = self.previous.renewed_at() == self.renewed_at
        return silent and waited + self.age > QUIET_SECONDS


def handover(lease: Lease) -> Handover | None:
    """Return the wait for the previous launch; None if there is none to wait for."""
    previous = Lease(lease.run, lease.epoch - 1)
    if not previous.path.exists() or previous.has_left():
        return None
    renewed_at = previous.renewed_at()
    age = max(_file_system_time(lease.run) - renewed_at, 0.0)
    return Handover(previous, time.monotonic(), age, renewed_at)


def lease_of(run: Path, launch: str) -> Lease | None:
    """Return the lease that the first supervisor of `launch` took; None before then."""
    try:
        lease = newest(run)
    except OSError:  # the caller tries again
        return None
    holder = holder_of(lease) if lease else None
    return lease if lease and holder and holder.launch == launch and not lease.has_left() else None


@contextmanager
def held(run: Path, launch: str) -> Iterator[Lease]:
    """Hold a run folder, renewing its lease in a thread; raise BusyError if another launch does."""
    lease = take(run, this_process(launch))
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            lease.renew()

    # Renew in a thread, because the caller may be busy for longer than a lease lasts.
    renewer = threading.Thread(target=renew, name="lease", daemon=True)
    renewer.start()
    try:
        if wait := handover(lease):
            while not wait.is_over():
                time.sleep(0.1)
        yield lease
    finally:
        ended.set()
        renewer.join()
        lease.leave()


def from_environment(run: Path) -> Lease | None:
    """Return the lease that this rank's supervisor holds; None without a supervisor."""
    epoch = os.environ.get(EPOCH)
    return Lease(run, int(epoch)) if epoch else None
