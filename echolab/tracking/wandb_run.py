"""One run on Weights & Biases, mirrored from what the run folder holds; offline unless logged in.

Nothing that wandb does stops a run, delays a step or comes before a save: wandb lives in a process
of its own (`wandb_process`), and a thread hands it the records from a queue.

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
from echolab.redaction import masked, masked_values
from echolab.tracking.wandb_process import STEP

PROCESS = (sys.executable, "-P", "-m", "echolab.tracking.wandb_process")
# What Slurm, a shell or a terminal sends to all processes of a job: the process ends with its run.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STARTS = 4  # of the process in one attempt: after these, the rest is lost to wandb
QUEUED = 10_000  # records that wait for the process; those above are lost to wandb
KEPT = 2_000  # newest records to send again, should the process die before they are on disk
POLL_SECONDS = 0.1  # between two checks that an idle process is alive
FINISH_SECONDS = 20.0  # for what is queued to be recorded or sent
HURRY_SECONDS = 2.0  # the same after a signal, which leaves little time until the kill
KILL_SECONDS = 1.0  # for the kernel to end what was killed

Mode = Literal["auto", "offline", "online", "disabled"]
MODES = ("auto", "offline", "online", "disabled")
Cell = str | int | float | bool | None


class WandbRun:
    """A wandb run whose id is the caller's, so that every attempt of a run goes on in it.

    Records lie in `folder`/wandb.  wandb's own step only counts calls; curves are drawn over
    `trainer/step`, since wandb drops whatever goes back in its own.  What does not reach wandb is
    counted, and one line on stderr says so.
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
        """`auto` follows WANDB_MODE, is offline in a Slurm job, else online when logged in.

        Raises ConfigError for an unknown mode or an id that wandb would refuse.
        """
        if mode not in MODES:
            raise ConfigError(f"wandb mode {mode!r} is not one of {', '.join(MODES)}")
        if not re.fullmatch(r"[\w-]{1,64}", run_id):
            raise ConfigError(f"wandb run id {run_id!r}: use up to 64 letters, digits, - and _")
        self._mirror: _Mirror | None = None
        self._mode = _chosen(mode)
        if self._mode != "disabled":
            about = {
                "folder": str(folder.absolute()), "project": masked(project), "run_id": run_id,
                "name": masked(name), "config": masked_values(config),
            }  # fmt: skip
            self._mirror = _Mirror(about, self._mode)

    @property
    def mode(self) -> Mode:
        """What was asked for; once wandb has opened the run, `online` or `offline`."""
        return self._mirror.mode if self._mirror else self._mode

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars at an optimizer step.  Returns at once."""
        self._send({"row": {STEP: step, **scalars}})

    def log_videos(self, step: int, videos: Mapping[str, Path]) -> None:
        """Record mp4 files, with their sound, by name.  Raises MediaError if one is not there."""
        for path in videos.values():
            if path.suffix != ".mp4" or not path.is_file():
                raise MediaError(f"{path}: not an mp4 file that exists; wandb takes no other video")
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
        """End the run, within `seconds`; a second call does nothing."""
        if self._mirror:
            self._mode, mirror = self._mirror.mode, self._mirror
            mirror.finish(seconds)
            self._mode, self._mirror = mirror.mode, None


def _chosen(mode: Mode) -> Mode:
    """Return the mode to ask for; `auto` remains where it depends on a login."""
    if mode != "auto":
        return mode
    # mode= in code would beat WANDB_MODE, so the variable is read here
    match os.environ.get("WANDB_MODE"):
        case ("offline" | "online" | "disabled") as wanted:
            return wanted
    # nodes of a cluster often reach no server; what is recorded is uploaded from elsewhere
    return "offline" if "SLURM_JOB_ID" in os.environ else "auto"


class _Process:
    """A running `wandb_process`, in a session of its own."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        """Raises OSError if it cannot be started."""
        # another wandb process of this environment is not ours to use
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
        self.send(json.dumps(about, default=str))

    def send(self, line: str) -> bool:
        """Write a line; return whether the process could take it."""
        assert self._popen.stdin
        try:
            self._popen.stdin.write(line.encode() + b"\n")
            self._popen.stdin.flush()
        except (OSError, ValueError):  # it ended; the pipe is closed
            return False
        return True

    def receive(self) -> dict[str, Any]:
        """Wait for an answer; empty if the process ended without one."""
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
        """End it, and the service that wandb started in a session of its own."""
        self._popen.kill()
        for pid in self.service:
            try:
                if Path(f"/proc/{pid}/comm").read_text().startswith("wandb"):
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        try:
            self._popen.wait(timeout=KILL_SECONDS)
        except subprocess.TimeoutExpired:  # a file system holds it; its end is the kernel's affair
            pass


class _Mirror:
    """Hands records to a process from a thread, and starts another process when one dies."""

    def __init__(self, about: Mapping[str, Any], mode: Mode) -> None:
        self.about, self.mode = about, mode
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._queued = self._dropped = 0  # by the caller
        self._folder = ""  # of the present process, or of the one that died last
        self._sent = 0  # records handed to that process
        self._recent: deque[str] = deque(maxlen=KEPT)  # the last of these
        self._lost = 0  # that were handed over and are not on disk
        self._fault = ""  # what lost the first record, or made the run be recorded offline
        self._offline_instead = self._said = False
        self._impatience = ""  # why `finish` did not wait for a server any longer
        self._over = False  # no process is started any more
        self._process: _Process | None = None
        self._opened, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="wandb", daemon=True).start()

    def put(self, line: str) -> None:
        """Queue a record; drop it if too many wait."""
        self._queued += 1
        if self._ended.is_set() or self._queue.qsize() >= QUEUED:
            self._dropped += 1
        else:
            self._queue.put(line)

    def finish(self, seconds: float) -> None:
        """Wait until all is recorded, for `seconds` at most; say what is not."""
        self._queue.put(None)
        half = seconds / 2 if seconds > HURRY_SECONDS else 0.0
        if (
            half
            and not self._ended.wait(half)
            and (self.mode == "offline") == self._opened.is_set()
        ):
            # a server or a process that hangs: the next process records offline
            self._impatience = f"no answer after {half:g} s"
            self._kill()
        if not self._ended.wait(seconds - half):
            self._over = True
            self._kill()
            rest = "some records may be missing there"
            if self.mode == "online" and self._folder:
                rest = f"`wandb sync {self._folder}` uploads the rest"
            self._say(f"not finished after {seconds:g} s; {rest}")
        if lost := self._lost + self._dropped:
            fault = self._fault or f"{QUEUED} records waited for it"
            self._say(f"{fault}; {lost} of {self._queued} records are missing there")

    def _kill(self) -> None:
        if self._process:
            self._process.kill()

    def _say(self, words: str) -> None:
        """Print the one line about this run."""
        if self._said:
            return
        self._said = True
        metrics = Path(self.about["folder"]) / "metrics.jsonl"
        source = f"{metrics} has every number" if metrics.exists() else "the run folder has them"
        try:
            print(masked(f"echolab: wandb: {words}; {source}"), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # stderr is closed
            pass

    # -- in the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # the process inherits this
        try:
            for _ in range(STARTS):
                if self._over or self._serve():
                    return
            raise OSError("its process died again and again")
        except (OSError, subprocess.SubprocessError) as error:
            self._fault = self._fault or str(error)
            self._say(f"{self._fault}; nothing more reaches it in this attempt")
        finally:
            self._ended.set()

    def _serve(self) -> bool:
        """Start a process and hand it records; return whether it finished.  OSError: never will."""
        about = {**self.about, "mode": self.mode, "previous": self._folder}
        process = self._process = _Process(about)
        self._settle(first := process.receive())
        self.mode = first.get("mode", self.mode)
        opened = process.receive()
        if "folder" not in opened:
            process.kill()
            self._not_opened(opened.get("fault") or first.get("fault") or self._impatience)
            return False
        self._folder = opened["folder"]
        self._opened.set()
        self._say_where()
        again, self._sent = list(self._recent), 0
        self._recent.clear()
        last = self._hand_over(process, again)
        self._fault = self._fault or last.get("fault", "")
        if last.get("finished"):
            if self.mode == "offline":
                self._lost += self._sent - last["recorded"]
            process.kill()
            return True
        process.kill()
        self._lost += last.get("failed", 0)
        self._sent -= last.get("failed", 0)
        return False

    def _settle(self, first: Mapping[str, Any]) -> None:
        """Keep what the process before did not record, to be sent again."""
        if "recorded" not in first:
            return
        missing = max(self._sent - first["recorded"], 0)
        again = list(self._recent)[len(self._recent) - min(missing, len(self._recent)) :]
        self._lost += missing - len(again)
        self._recent, self._sent, self._folder = deque(again, maxlen=KEPT), len(again), ""

    def _not_opened(self, fault: str) -> None:
        """Go on offline if a server was the reason; OSError if there was none.

        A process that was killed told no fault: the next one may do better.
        """
        self._fault = self._fault or fault or "its process died"
        if not fault:
            return
        if self.mode == "offline":
            raise OSError(fault)
        self.mode, self._offline_instead = "offline", True

    def _say_where(self) -> None:
        if self._offline_instead:
            self._say(
                f"{self._fault}; recorded offline instead, `wandb sync {self._folder}` uploads it"
            )
        elif not self._folder.startswith(self.about["folder"]):
            self._say(
                f"cannot write to {self.about['folder']}/wandb; records are in {self._folder}"
            )

    def _hand_over(self, process: _Process, again: Sequence[str]) -> dict[str, Any]:
        """Send `again`, then what is queued; return the last answer of the process."""
        for line in again:
            self._hand(process, line)
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
            if not self._hand(process, record):
                break
        return process.receive()

    def _hand(self, process: _Process, line: str) -> bool:
        self._sent += 1
        self._recent.append(line)
        return process.send(line)
