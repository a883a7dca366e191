"""Write checkpoints in a background thread: training waits only for the copy to host memory."""

import hashlib
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echolab.atomic_io import FULL, describe_error, fsync, retry
from echolab.errors import FencedError, SaveError, StorageError
from echolab.training import distributed
from echolab.training.checkpoints.checkpoint import REPLACED, folder_of
from echolab.training.checkpoints.manifest import FORMAT, MANIFEST, STATE, serialize
from echolab.training.checkpoints.retention import (
    PARTIAL,
    SNAPSHOTS,
    Retention,
    keep_snapshot,
    tidy,
)
from echolab.training.checkpoints.shard_plan import ITEM, File, gather, host_buffer, layout
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import MASTER, MOMENTS, Masters

SPARE = 1.05  # factor on required disk space, for headers, folders and other files of the run
FACTOR = 2  # checkpoints that must fit at the start: an old one is removed after a new one is saved
NICENESS = 10  # niceness of the writing thread
CHUNK = 1 << 24  # bytes hashed and written at once, without the GIL
Receipt = dict[str, Any]  # size and hash of a written file: {"bytes": ..., "sha256": ...}


class Fault(NamedTuple):
    """A failure on one rank, sent as JSON and raised on all ranks."""

    words: str  # message; empty: no failure
    passing: str  # "yes" if the failure may be temporary, else empty

    @property
    def remedy(self) -> str:
        """Remedy for the error message."""
        action = "see to that file system" if self.passing else "make room there"
        return f"{action} and run the same command again"

    def raise_together(self) -> None:
        """Raise the first rank's fault on every rank; collective."""
        for kind, raised in ((SaveError, not self.passing), (StorageError, self.passing)):
            distributed.raise_together(kind, self.words if raised else "")


def fault_of(error: Exception) -> Fault:
    """Convert an exception to a Fault; a file system error may be temporary, a full disk is not."""
    if isinstance(error, OSError) and error.errno and error.errno not in FULL:
        location = f"{error.filename}: " if error.filename else ""
        return Fault(f"{location}{describe_error(error)}", "yes")
    return Fault(str(error), "")


def write_file(path: Path, contents: Iterable[bytes | memoryview]) -> Receipt:
    """Write and fsync a file, with retries; return its size and the hash of `contents`."""
    parts = list(contents)
    return retry(lambda: _write_once(path, parts))


def _write_once(path: Path, contents: Iterable[bytes | memoryview]) -> Receipt:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for content in contents:
            for start in range(0, len(content), CHUNK):
                chunk = content[start : start + CHUNK]
                file.write(chunk)
                digest.update(chunk)
            size += len(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


class CheckpointWriter:
    """Saves with `begin` and, some steps later, `finish`; calling both in a row waits for the save.

    Each rank's thread writes the files that `layout` assigns to the rank; rank 0 publishes them.
    The `newest` valid checkpoints (at least two) are kept, and all those whose step passes `keep`.
    If a step passes `snapshot`, its power averages are kept too (`retention`).  The constructor is
    collective, and removes partial folders of killed attempts from `folder`.  `check` raises if
    rank 0 must not write.
    """

    def __init__(
        self,
        folder: Path,
        masters: Masters,
        ema: Ema,
        *,
        keep: Callable[[int], bool],
        newest: int = 2,
        shard_bytes: int = 1 << 30,
        snapshot: Callable[[int], bool] = lambda step: False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.masters, self.ema = folder, masters, ema
        self.seconds = 0.0  # duration of the longest save so far, including the background
        # Every rank computes the same plan, so the plan need not be sent.
        parts = [MASTER, *MOMENTS, *ema.parts]
        self.shapes = masters.shapes
        self.files = layout(self.shapes, parts, world=distributed.world(), shard_bytes=shard_bytes)
        self._snapshot = snapshot
        self._on_gpu = next(iter(masters.parameters.values())).is_cuda
        self._check = check
        # Each attempt writes into its own partial folders and removes those of earlier attempts, so
        # that a process left over from an earlier attempt cannot publish anything.
        self._attempt_id = distributed.gather_text(secrets.token_hex(4))[0]
        self._retention = Retention(folder, keep, newest, check)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._pruning = threading.Thread()
        self._path = folder
        self._receipts: dict[str, Receipt] = {}
        self._fault = Fault("", "")
        self._save_seconds = 0.0
        masters.check_complete()
        self._run_on_rank_0(self._tidy)

    def _tidy(self) -> None:
        self._check()
        tidy(self.folder)

    @property
    def size(self) -> int:
        """Bytes of the tensors of one checkpoint."""
        return ITEM * sum(file.numel for file in self.files)

    @property
    def pending(self) -> bool:
        """True if a save has begun but not finished."""
        return self._thread is not None

    def written(self) -> bool:
        """Return whether this rank has written its pending files, or failed; not collective."""
        return self._thread is not None and not self._thread.is_alive()

    def check_start(self) -> None:
        """Raise SaveError if two checkpoints do not fit on the disk; collective."""
        self._run_on_rank_0(lambda: check_room(self.folder, FACTOR * self.size, len(self.files)))

    def _run_on_rank_0(self, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 and raise its error on every rank; collective."""
        fault = Fault("", "")
        if distributed.rank() == 0:
            try:
                retry(work)
            except (OSError, SaveError) as error:
                fault = fault_of(error)
        fault.raise_together()

    # -- begin --------------------------------------------------------------------------------

    def begin(self, state: dict[str, Any]) -> None:
        """Copy `state` and all tensors, and write them in a thread; collective.

        Finish an earlier save first.  Raise SaveError on every rank, before writing anything, if
        disk space or host memory is insufficient.
        """
        self.finish()
        self.close()
        started = time.monotonic()
        # Check disk space and allocate host memory before writing anything.
        self._path = folder_of(self.folder, state["step"])
        self._receipts, self._fault = {}, Fault("", "")
        text = json.dumps(state, indent=1).encode()
        self._run_on_rank_0(lambda: self._make_room(len(text)))
        self._make_buffers()
        for file in self.files:
            # Training waits only for these copies.
            gather(self.masters, self._flats(file.part), file, self._buffers.get(file.name))
        if self._on_gpu:
            torch.cuda.synchronize()
        self._save_seconds = time.monotonic() - started
        # The thread uses the buffers until `finish`.
        self._thread = threading.Thread(target=self._write, args=(text,), daemon=True)
        self._thread.start()

    @property
    def _partial(self) -> Path:
        return self.folder / f"{PARTIAL}{self._attempt_id}-{self._path.name}"

    def _make_room(self, state_bytes: int) -> None:
        self._check()
        shutil.rmtree(self._partial, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        check_room(self.folder, self.size + state_bytes, len(self.files) + 3)
        self._partial.mkdir()

    def _make_buffers(self) -> None:
        fault = ""
        try:
            for file in self.files:
                if file.writer == distributed.rank() and file.name not in self._buffers:
                    self._buffers[file.name] = host_buffer(file, pinned=self._on_gpu)
        except RuntimeError as error:  # torch has no specific type for this error
            fault = f"rank {distributed.rank()}: no host memory to save from ({error})".split("\n")[
                0
            ]
        distributed.raise_together(SaveError, fault)

    def _flats(self, part: str) -> list[Tensor]:
        return self.ema.flats[part] if part in self.ema.flats else self.masters.flats(part)

    # -- in the background thread -------------------------------------------------------------

    def _write(self, state: bytes) -> None:
        """Write this rank's files; `finish` raises errors that occur here."""
        started = time.monotonic()
        try:
            # Niceness applies per thread on Linux: give priority to the training steps.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            for file in self.files:
                if file.writer == distributed.rank():
                    self._receipts[file.name] = self._write_tensors(file)
            if distributed.rank() == 0:
                self._receipts[STATE] = write_file(self._partial / STATE, [state])
        except Exception as error:
            fault = fault_of(error)
            self._fault = fault._replace(words=f"rank {distributed.rank()}: {fault.words}")
        self._save_seconds += time.monotonic() - started

    def _write_tensors(self, file: File) -> Receipt:
        values = memoryview(self._buffers[file.name].numpy()).cast("B")  # type: ignore[arg-type]
        return write_file(self._partial / file.name, [file.header(self.shapes), values])

    # -- finish -------------------------------------------------------------------------------

    def finish(self) -> Path | None:
        """Wait for the pending save and publish it; return its path, None if none is pending.

        Collective.  Raise SaveError or StorageError on every rank if a rank failed; earlier
        checkpoints are not changed.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        started = time.monotonic()
        report = {"files": self._receipts, "fault": self._fault, "spent": self._save_seconds}
        # Exchange faults and receipts, so that all ranks know of any fault.
        reports = [json.loads(text) for text in distributed.gather_text(json.dumps(report))]
        faults = [Fault(*report["fault"]) for report in reports]
        fault = next((fault for fault in faults if fault.words), Fault("", ""))
        if distributed.rank() == 0:
            try:
                if not fault.words:
                    files = [report["files"] for report in reports]
                    self._publish({name: r for by_name in files for name, r in by_name.items()})
            except OSError as error:
                fault = fault_of(error)
            # Remove the partial folder; earlier checkpoints are kept.
            if fault.words:
                shutil.rmtree(self._partial, ignore_errors=True)
                fault = fault._replace(
                    words=f"{self._path}: could not be written ({fault.words}); nothing was kept of"
                    f" it, earlier checkpoints are whole; {fault.remedy}"
                )
        fault.raise_together()
        duration = max(report["spent"] for report in reports) + time.monotonic() - started
        self.seconds = max(self.seconds, duration)
        return self._path

    def _publish(self, receipts: dict[str, Receipt]) -> None:
        """Check on rank 0 that all files exist, write the manifest, and rename the folder."""
        self._check()
        # Check that rank 0 sees the files of all ranks on the shared disk, in full size.
        if missing := {STATE, *(file.name for file in self.files)} - set(receipts):
            raise OSError(f"nobody wrote {', '.join(sorted(missing))}")
        for name, receipt in receipts.items():
            size = (self._partial / name).stat().st_size
            if size != receipt["bytes"]:
                raise OSError(f"{name} has {size} bytes here, {receipt['bytes']} were written")
        step = int(self._path.name.removeprefix("step-"))
        # Write the manifest last: without a manifest, the folder is not a checkpoint.
        manifest = {
            "format": FORMAT,
            "step": step,
            "parameters": self.shapes,
            "tied": self.masters.tied,
            "files": dict(sorted(receipts.items())),
        }
        write_file(self._partial / MANIFEST, [serialize(manifest)])
        retry(lambda: fsync(self._partial))
        # Link the snapshot before the checkpoint is published.
        if self._snapshot(step):
            keep_snapshot(self._partial, manifest, self.folder / SNAPSHOTS)
        retry(self._check)  # check again, since the snapshot may take long
        # Rename is atomic: a checkpoint of this step is always complete or absent.
        aside = self.folder / f"{REPLACED}{self._path.name}"
        if self._path.exists():
            retry(lambda: self._path.rename(aside))
        retry(lambda: self._partial.rename(self._path))
        retry(lambda: fsync(self.folder))
        shutil.rmtree(aside, ignore_errors=True)
        # Remove old checkpoints in a thread, since removing large files takes seconds.
        self._retention.valid[step] = True
        self._pruning = threading.Thread(target=self._prune, args=(step,), daemon=True)
        self._pruning.start()

    def _prune(self, step: int) -> None:
        try:
            self._retention.prune(step)
        except FencedError:  # the checkpoints now belong to the process that took over
            pass
        except OSError as error:  # not fatal: the next save checks the disk space anyway
            print(f"echolab: an old checkpoint could not be removed: {error}", file=sys.stderr)

    def close(self) -> None:
        """Wait until the background thread has removed old checkpoints."""
        if self._pruning.is_alive():
            self._pruning.join()


def check_room(folder: Path, needed: int, files: int = 20) -> None:
    """Raise SaveError if `folder`'s disk has less than 1.05 x `needed` bytes, or too few inodes.

    Only space available to unprivileged users counts.  A quota is detected only when a write fails.
    """
    # f_bavail and f_favail exclude what is reserved for the superuser.
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    required = int(needed * SPARE)
    if free < required:
        raise SaveError(
            f"{folder}: a checkpoint needs {required:,} bytes, {free:,} are free; make room, or "
            "give another run folder"
        )
    if disk.f_files and disk.f_favail < files:  # f_files is 0 if inodes are not limited
        raise SaveError(
            f"{folder}: a checkpoint needs {files} inodes, {disk.f_favail} are free; remove files "
            "there, or give another run folder"
        )
