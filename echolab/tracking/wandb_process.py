"""The process that uses wandb for `wandb_run.WandbRun`; nothing else in echolab imports wandb.

wandb starts a service, threads and exit handlers, waits for servers, and raises exceptions in the
caller.  This process isolates all of that.  It reads JSON lines from stdin: the options of the run,
one record per line, then `{"finish": 0}`.  It writes JSON lines to stdout: one when the run is
open, one when it ends.  It ends when its parent ends.
"""

import json
import os
import select
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

STEP = "trainer/step"
INIT_SECONDS = 30.0  # for a server to answer; wandb's own limit is 90 s
FINISH_SECONDS = 20.0  # to finish after the parent requested the end
ORPHAN_SECONDS = 5.0  # to finish after the parent ended, since another launch may begin soon
FLUSH_SECONDS = 2.0  # between two flushes of the service's file; wandb's default is 15 s
POLL_SECONDS = 1.0  # between two checks that the parent is alive
BLOCK = 32768  # a .wandb file is a LevelDB log: fragments with headers of 7 bytes, in blocks
HEAD = struct.Struct("<IHB")  # checksum, length, kind
FULL, LAST = 1, 4  # kinds of a fragment that ends a record


def main() -> None:
    """Mirror one run until the parent requests the end or has ended."""
    parent = os.getppid()
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    # Keep standard output for the answers to the parent.
    for stream in (1, 2):  # because wandb and its service print to them
        os.dup2(null, stream)
    # This process must not outlive its parent.
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    lines = _lines(parent)
    # The first line describes the run.
    options = json.loads(next(lines, "null"))
    if options is None:
        return
    opening: dict[str, Any] = {}
    if options["previous"]:
        # An earlier process was killed or crashed: report how many rows it recorded.
        opening["recorded"] = recorded_rows(Path(options["previous"]))
    try:
        opening["mode"] = mode = _mode(options["mode"])
        _answer(answers, opening)
        run = _open(options, mode)
    except BaseException as error:  # wandb.init also raises SystemExit and KeyboardInterrupt
        # If the service was killed, report no fault: the next process can succeed.
        _answer_and_exit(answers, {"fault": "" if _service_ended() else _message(error)})
    _answer(answers, {"folder": str(Path(run.dir).parent), "service": _children()})
    _Mirror(run, answers).mirror(lines)


class _Mirror:
    """Writes records to an open run."""

    def __init__(self, run: Any, answers: Any) -> None:
        self.run, self.answers = run, answers
        self.failed, self.fault = 0, ""  # records that wandb refused, and the first reason
        self.finishing = False

    def mirror(self, lines: Iterator[str]) -> NoReturn:
        """Write records until a `finish` record or the end of the parent; then finish the run."""
        threading.Thread(target=self._watch_service, daemon=True).start()
        exit_code = 1
        # Write until the parent requests the end.
        for line in lines:
            record = json.loads(line)
            if "finish" in record:
                exit_code = record["finish"]
                break
            self._write(record)
        self.finishing = True
        # Limit the time to finish, since a server may hang.
        threading.Timer(FINISH_SECONDS, os._exit, [1]).start()
        folder = Path(self.run.dir).parent
        try:
            self.run.finish(exit_code=exit_code)
            import wandb

            wandb.teardown()  # waits until the service has written its file
        except BaseException as error:
            # If the service was killed, the next process gets the records that it did not store.
            if isinstance(error, SystemExit) or _service_ended():  # its exit code is not 0
                self._leave_without_service()
            self.fault = self.fault or _message(error)
        _answer_and_exit(
            self.answers, self._end() | {"recorded": recorded_rows(folder), "finished": True}
        )

    def _write(self, record: dict[str, Any]) -> None:
        import wandb

        try:
            row: dict[str, Any] = dict(record["row"])
            # wandb.Video encodes arrays with moviepy, but copies mp4 files unchanged.
            for name, path in record.get("videos", {}).items():
                row[name] = wandb.Video(path, format="mp4")
            for name, table in record.get("tables", {}).items():
                row[name] = wandb.Table(**table)
            self.run.log(row)
        except Exception as error:
            if _service_ended():  # the record is valid: it is sent again to the next process
                self._leave_without_service()
            # wandb refused only this record; continue with the next.
            self.failed += 1
            self.fault = self.fault or _message(error)

    def _watch_service(self) -> None:
        """End this process when wandb's service ends, because no record is stored after that."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return
        if not self.finishing:
            self._leave_without_service()

    def _leave_without_service(self) -> NoReturn:
        self.fault = "its service process ended"
        _answer_and_exit(self.answers, self._end())

    def _end(self) -> dict[str, Any]:
        return {"failed": self.failed, "fault": self.fault}


def _exit_after(parent: int) -> None:
    """Wait until the parent ends, then end this process, even while wandb opens a run."""
    # getppid changes when the parent ends.
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _mode(requested: str) -> str:
    """Return `online` or `offline`; `auto` is online when logged in."""
    import wandb

    if requested == "auto":
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    return requested


def _open(options: dict[str, Any], mode: Any) -> Any:
    import wandb

    run = wandb.init(
        project=options["project"],
        id=options["run_id"],
        name=options["name"],
        config=options["config"],
        dir=options["folder"],
        mode=mode,
        # offline, wandb always uses the id and would warn about resume
        resume="allow" if mode == "online" else None,
        reinit="create_new",
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=INIT_SECONDS,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # holds the command line
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        ),
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    return run


def recorded_rows(folder: Path) -> int:
    """Count the complete history rows of the .wandb file in a run's folder."""
    return sum(
        record.WhichOneof("record_type") == "history"
        for path in folder.glob("*.wandb")
        for record in read_records(path)
    )


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file up to its end or to the first damaged one."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), HEAD.size, b""  # the file header has the same size
    while at + HEAD.size <= len(data):
        left = BLOCK - at % BLOCK
        _, length, kind = HEAD.unpack_from(data, at)
        if left < HEAD.size or kind == 0:  # padding up to the end of the block
            at += left
            continue
        end = at + HEAD.size + length
        if end > len(data):
            return  # incomplete
        message += data[at + HEAD.size : end]
        at = end
        if kind in (FULL, LAST):
            record = Record()
            try:
                record.ParseFromString(message)
            except Exception:  # protobuf's DecodeError
                return
            message = b""
            yield record


def _lines(parent: int) -> Iterator[str]:
    """Yield complete lines of stdin until it is closed or the parent has ended."""
    kept = b""
    while os.getppid() == parent:  # a fork of the parent may keep the pipe open
        if not select.select([0], [], [], POLL_SECONDS)[0]:
            continue
        if not (data := os.read(0, 1 << 16)):
            return
        *lines, kept = (kept + data).split(b"\n")
        yield from (line.decode() for line in lines)


def _children() -> list[int]:
    """Return the processes that this thread started, which are wandb's service."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def _service_ended() -> bool:
    """Return whether a child process has ended or does so within half a second."""
    for _ in range(10):
        try:
            if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                return True
        except ChildProcessError:
            return False
        time.sleep(0.05)
    return False


def _message(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _answer(answers: Any, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def _answer_and_exit(answers: Any, values: dict[str, Any]) -> NoReturn:
    """Answer and exit at once, because wandb's exit handlers wait for servers."""
    try:
        _answer(answers, values)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
