"""One run on Weights & Biases, a copy of the metrics in the run folder; offline unless logged in.

No failure of wandb stops training or delays a step or a save: wandb runs in a separate process
(`wandb_process`), and a thread sends the records to it from a queue.

Only plain scalars, mp4 files and tables are sent: no source code, command line, environment,
machine description or console output.  https://docs.wandb.ai/ref/python/
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from echolab.errors import ConfigError, MediaError
from echolab.redaction import mask_secrets, mask_values
from echolab.tracking.wandb_process import STEP

PROCESS = (sys.executable, "-P", "-m", "echolab.tracking.wandb_process")
# Slurm, a shell or a terminal sends these to all processes of a job; the process ignores them and
# ends with its run.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MAX_STARTS = 4  # starts of the process in one attempt; afterwards no records are sent
MAX_QUEUED = 10_000  # records that wait for the process; more are dropped
MAX_KEPT = 2_000  # newest records, to send again if the process ends before they are on disk
POLL_SECONDS = 0.1  # between two checks of an idle process
FINISH_SECONDS = 20.0  # to record or send the queued records
HURRY_SECONDS = 2.0  # the same after a signal, since the job will soon be killed
KILL_SECONDS = 1.0  # for the kernel to end a killed process

Mode = Literal["auto", "offline", "online", "disabled"]
MODES = ("auto", "offline", "online", "disabled")
Cell = str | int | float | bool | None


class WandbRun:
    """A wandb run with the caller's id, which every attempt of a run continues.

    Records are stored in `folder`/wandb.  The horizontal axis of curves is `trainer/step`, because
    wandb drops records whose own step decreases.  One line on stderr reports how many records did
    not reach wandb.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        run_id: str,
        name: str,
        config: Mapping[str, Any],
        mode: Mode = "auto",
    ) -> None:
        """Start the process.

        Mode `auto` is WANDB_MODE if set, else offline in a Slurm job, else online if logged in.

        Raise ConfigError for an unknown mode or an id that wandb would refuse.
        """
        if mode not in MODES:
            raise ConfigError(f"logger.mode={mode}: must be one of {', '.join(MODES)}")
        if not re.fullmatch(r"[\w-]{1,64}", run_id):
            raise ConfigError(f"wandb run id {run_id!r}: use up to 64 letters, digits, - and _")
        self._mirror: _Mirror | None = None
        self._mode = _chosen(mode)
        if self._mode != "disabled":
            # Mask secrets, which must not be sent or stored.
            options = {
                "folder": str(folder.absolute()), "project": mask_secrets(project),
                "run_id": run_id, "name": mask_secrets(name), "config": mask_values(config),
            }  # fmt: skip
            self._mirror = _Mirror(options, self._mode)

    @property
    def mode(self) -> Mode:
        """The requested mode; `online` or `offline` once wandb has opened the run."""
        return self._mirror.mode if self._mirror else self._mode

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars at an optimizer step; return at once."""
        self._send({"row": {STEP: step, **scalars}})

    def log_videos(self, step: int, videos: Mapping[str, Path]) -> None:
        """Record mp4 files with audio by name; raise MediaError if one does not exist."""
        for path in videos.values():
            if path.suffix != ".mp4" or not path.is_file():
                raise MediaError(
                    f"{path}: not an existing mp4 file; give one, wandb takes no other video"
                )
        if videos:
            paths = {name: str(path.absolute()) for name, path in videos.items()}
            self._send({"row": {STEP: step}, "videos": paths})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Record a table, such as the scores of several checkpoints."""
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._send({"row": {}, "tables": {name: table}})

    def _send(self, record: dict[str, Any]) -> None:
        if self._mirror:
            self._mirror.put(json.dumps(record, default=float))

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """End the run within `seconds`; a second call does nothing."""
        if self._mirror:
            self._mode, mirror = self._mirror.mode, self._mirror
            mirror.finish(seconds)
            self._mode, self._mirror = mirror.mode, None


def _chosen(mode: Mode) -> Mode:
    """Return the mode to request; `auto` remains if it depends on a login."""
    if mode != "auto":
        return mode
    # the argument mode of wandb.init overrides WANDB_MODE, so the variable is read here
    match os.environ.get("WANDB_MODE"):
        case ("offline" | "online" | "disabled") as wanted:
            return wanted
    # Nodes of a cluster often reach no server; `wandb sync` uploads the records from elsewhere.
    return "offline" if "SLURM_JOB_ID" in os.environ else "auto"


class _Process:
    """A running `wandb_process`, in a separate session."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Start the process; raise OSError if it cannot be started."""
        # Do not use the wandb service of another program in this environment.
        environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
        self._popen = subprocess.Popen(
            PROCESS,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.service: list[int] = []
        self.send(json.dumps(options, default=str))

    def send(self, line: str) -> bool:
        """Write a line; return False if the process has ended."""
        assert self._popen.stdin
        try:
            self._popen.stdin.write(line.encode() + b"\n")
            self._popen.stdin.flush()
        except (OSError, ValueError):  # it ended; the pipe is closed
            return False
        return True

    def receive(self) -> dict[str, Any]:
        """Wait for an answer; return {} if the process ended without one."""
        assert self._popen.stdout
        try:
            answer: dict[str, Any] = json.loads(self._popen.stdout.readline() or b"{}")
        except ValueError:  # killed while it wrote
            return {}
        self.service = answer.get("service", self.service)
        return answer

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        """Kill the process, and the service that wandb started in another session."""
        self._popen.kill()
        for pid in self.service:
            try:
                if Path(f"/proc/{pid}/comm").read_text().startswith("wandb"):
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        try:
            self._popen.wait(timeout=KILL_SECONDS)
        except subprocess.TimeoutExpired:  # blocked in a file system; the kernel ends it later
            pass


class _Mirror:
    """Sends records to a process from a thread, and starts another process if it ends early."""

    def __init__(self, options: Mapping[str, Any], mode: Mode) -> None:
        self.options, self.mode = options, mode
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._queued = self._dropped = 0  # numbers of records, counted by the caller's thread
        self._folder = ""  # folder of the current process, or of the last one
        self._sent = 0  # number of records sent to that process
        self._recent: deque[str] = deque(maxlen=MAX_KEPT)  # the last records that were sent
        self._lost = 0  # records that were sent but are not on disk
        self._fault = ""  # why the first record was lost, or why the run is recorded offline
        self._offline_instead = self._reported = False
        self._wait_fault = ""  # why `finish` stopped waiting for a server
        self._over = False  # True: start no further process
        self._process: _Process | None = None
        self._opened, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="wandb", daemon=True).start()

    def put(self, line: str) -> None:
        """Queue a record; drop it if too many wait."""
        self._queued += 1
        if self._ended.is_set() or self._queue.qsize() >= MAX_QUEUED:
            self._dropped += 1
        else:
            self._queue.put(line)

    def finish(self, seconds: float) -> None:
        """Wait at most `seconds` until all records are stored; report those that are not."""
        self._queue.put(None)
        # After half of the time, stop waiting for a server that does not respond.
        half = seconds / 2 if seconds > HURRY_SECONDS else 0.0
        if (
            half
            and not self._ended.wait(half)
            and (self.mode == "offline") == self._opened.is_set()
        ):
            # The next process records offline.
            self._wait_fault = f"no answer after {half:g} s"
            self._kill()
        # After all of the time, stop waiting for the process.
        if not self._ended.wait(seconds - half):
            self._over = True
            self._kill()
            rest = "some records may be missing"
            if self.mode == "online" and self._folder:
                rest = f"`wandb sync {self._folder}` uploads the rest"
            self._report(f"not finished after {seconds:g} s; {rest}")
        if lost := self._lost + self._dropped:
            fault = self._fault or f"{MAX_QUEUED} records waited in the queue"
            self._report(f"{fault}; {lost} of {self._queued} records are missing")

    def _kill(self) -> None:
        if self._process:
            self._process.kill()

    def _report(self, message: str) -> None:
        """Print a line about this run, once."""
        # Print only one line, since a run logs for days.
        if self._reported:
            return
        self._reported = True
        metrics = Path(self.options["folder"]) / "metrics.jsonl"
        source = (
            f"{metrics} has all values" if metrics.exists() else "the run folder has all values"
        )
        try:
            print(mask_secrets(f"echolab: wandb: {message}; {source}"), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # stderr is closed
            pass

    # -- in the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # the process inherits this
        try:
            for _ in range(MAX_STARTS):
                if self._over or self._serve():
                    return
            raise OSError(f"its process died {MAX_STARTS} times")
        except (OSError, subprocess.SubprocessError) as error:
            self._fault = self._fault or str(error)
            self._report(f"{self._fault}; this attempt sends no more records")
        finally:
            self._ended.set()

    def _serve(self) -> bool:
        """Start a process and send it records; return whether it finished."""
        options = {**self.options, "mode": self.mode, "previous": self._folder}
        process = self._process = _Process(options)
        # The first answer reports how many records an earlier process stored.
        self._keep_unrecorded(first := process.receive())
        self.mode = first.get("mode", self.mode)
        opened = process.receive()
        if "folder" not in opened:
            process.kill()
            self._handle_open_failure(opened.get("fault") or first.get("fault") or self._wait_fault)
            return False
        # The run is open: send the records again that an earlier process lost.
        self._folder = opened["folder"]
        self._opened.set()
        self._report_folder()
        again, self._sent = list(self._recent), 0
        self._recent.clear()
        last = self._send_all(process, again)
        self._fault = self._fault or last.get("fault", "")
        # Count records that wandb refused as lost.
        if last.get("finished"):
            if self.mode == "offline":
                self._lost += self._sent - last["recorded"]
            process.kill()
            return True
        process.kill()
        self._lost += last.get("failed", 0)
        self._sent -= last.get("failed", 0)
        return False

    def _keep_unrecorded(self, first: Mapping[str, Any]) -> None:
        """Keep the records that the previous process did not store, to send them again."""
        if "recorded" not in first:
            return
        # Older records than MAX_KEPT are lost.
        missing = max(self._sent - first["recorded"], 0)
        again = list(self._recent)[len(self._recent) - min(missing, len(self._recent)) :]
        self._lost += missing - len(again)
        self._recent, self._sent, self._folder = deque(again, maxlen=MAX_KEPT), len(again), ""

    def _handle_open_failure(self, fault: str) -> None:
        """Continue offline after a fault of a server; raise OSError if the run is already offline.

        A process that was killed reports no fault: the next process may succeed.
        """
        self._fault = self._fault or fault or "its process died"
        if not fault:
            return
        if self.mode == "offline":
            raise OSError(fault)
        self.mode, self._offline_instead = "offline", True

    def _report_folder(self) -> None:
        if self._offline_instead:
            self._report(
                f"{self._fault}; recorded offline instead, `wandb sync {self._folder}` uploads it"
            )
        elif not self._folder.startswith(self.options["folder"]):
            self._report(
                f"cannot write to {self.options['folder']}/wandb; records are in {self._folder}"
            )

    def _send_all(self, process: _Process, again: Sequence[str]) -> dict[str, Any]:
        """Send the records `again`, then the queued ones; return the last answer of the process."""
        # First send the records that an earlier process lost, in order.
        for line in again:
            self._send(process, line)
        while process.alive:
            try:
                record = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if record is None:
                process.send(json.dumps({"finish": 0}))
                last = process.receive()
                if not last.get("finished"):
                    self._queue.put(None)  # for the next process
                return last
            if not self._send(process, record):
                break
        return process.receive()

    def _send(self, process: _Process, line: str) -> bool:
        self._sent += 1
        self._recent.append(line)
        return process.send(line)
