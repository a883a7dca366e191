"""Cut raw talking videos into a dataset.

The clips of each file are stored in OUT/.work until all files are done, so that the same command
resumes an interrupted run.  Then the shards, refused.jsonl and, last, dataset.json are written.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_prep.filter import Refusal
from data_prep.listing import caption_of, list_source
from data_prep.options import RunOptions
from data_prep.workers import Failed, Finished, Progressed, Unfinished, work
from echolab.atomic_io import lock_folder, make_folder, write_atomic, write_error
from echolab.data.index import INDEX
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.errors import DataError, MediaError, RetryableError
from echolab.vision.face_models import LANDMARKER, YUNET, find_face_model

if TYPE_CHECKING:
    from data_prep.source import Models

WORK = ".work"
DONE = "done.json"
FAILED = "failed.json"  # counts the failures of a file that its content did not cause
MAX_FAILURES = 3  # number of failed runs after which a file is refused
REFUSED = "refused.jsonl"


class Job(NamedTuple):
    """One file to cut."""

    path: Path
    name: str  # path relative to the source
    folder: Path  # folder for its clips
    caption: str
    fault: str  # why its caption is unusable, or ""


def prepare(options: RunOptions) -> dict[str, Any]:
    """Write the dataset and return the figures of the summary.

    Raise an EcholabError if no clip could be cut, or if files remain unfinished.
    """
    # An existing dataset is not written again, only checked against the request.
    listing = list_source(options.source, options.out)
    jobs = [_make_job(path, name, options) for path, name in listing.files]
    if not (options.out / INDEX).exists():
        make_folder(options.out)
        with lock_folder(options.out):
            if not (options.out / INDEX).exists():  # another run may have written it in between
                _process_files(jobs, options)
                _write_dataset(jobs, listing.left_out, options)
                shutil.rmtree(options.out / WORK, ignore_errors=True)
    dataset = open_dataset(options.out)
    _check_request(dataset, jobs, options)
    return _summary_figures(dataset, len(jobs), read_refused(options.out / REFUSED))


def _make_job(path: Path, name: str, options: RunOptions) -> Job:
    """Return the job of one file; its folder name is a hash of all inputs of its result."""
    # An unusable caption refuses its file; it does not stop the run.
    caption, fault = "", ""
    try:
        caption = caption_of(options.caption, path, options.source)
    except MediaError as error:
        fault = str(error)
    stat = path.stat()
    content = [options.result_options(), name, stat.st_size, stat.st_mtime_ns, caption, fault]
    return Job(path, name, options.out / WORK / _hash(content)[:24], caption, fault)


def _request_hash(jobs: list[Job], options: RunOptions) -> str:
    """Return a hash of the request: the files and the options that affect the result."""
    stats = [(job.name, job.path.stat().st_size, job.path.stat().st_mtime_ns) for job in jobs]
    return _hash([options.result_options(), stats])


def _caption_hashes(jobs: list[Job]) -> dict[str, str]:
    """Return a hash of each file's caption, or of the reason why the caption is unusable."""
    return {job.name: _hash([job.caption, job.fault])[:16] for job in jobs}


def _check_request(dataset: ShardDataset, jobs: list[Job], options: RunOptions) -> None:
    """Raise DataError if a dataset was made from other files, options or captions."""
    # A changed request must not silently return an old dataset.
    description = dataset.description
    if description.get("request") != _request_hash(jobs, options):
        raise DataError(
            f"{options.out}: holds a dataset of other files or options; choose another folder"
        )
    before, now = description.get("captions", {}), _caption_hashes(jobs)
    edited = [name for name in now if before.get(name) != now[name]]
    if edited:
        raise DataError(
            f"{options.out}: holds a dataset with other captions: {len(edited)} were edited since, "
            f"such as that of {edited[0]}; choose another folder, or remove this one"
        )


def _hash(content: Any) -> str:
    # Sort keys, so that equal contents have equal hashes.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _process_files(jobs: list[Job], options: RunOptions) -> None:
    """Write a folder with clips and done.json for every file.

    Raise RetryableError, at the end, if files failed for a reason other than their content.
    """
    # Refuse files with unusable captions without reading them.
    for refused in (job for job in jobs if job.fault):
        _refuse_file(refused, refused.fault)
    todo = [job for job in jobs if not (job.folder / DONE).is_file()]
    if not todo:
        return
    yunet = find_face_model(YUNET, options.face_models)
    landmarker = find_face_model(LANDMARKER, options.face_models)
    setup = partial(_make_task, options, yunet, landmarker)

    # Process the other files; every report except Progressed is final for its file.
    stopped: list[tuple[Job, str]] = []
    with FileProgress(len(jobs), len(jobs) - len(todo)) as bar:
        for report in work(setup, todo, options.workers, options.stall_seconds):
            job: Job = report.job
            match report:
                case Progressed(_, fraction):
                    bar.progress(job.name, fraction)
                case Finished(_, (clips, refused)):
                    bar.finish(job.name, clips, refused)
                case Failed(_, reason):
                    _refuse_file(job, reason)
                    bar.finish(job.name, 0, [reason])
                case Unfinished(_, reason):
                    if not _count_failure(job, reason):
                        stopped.append((job, reason))
                    bar.finish(job.name, 0, [reason])
    if stopped:
        job, reason = stopped[0]
        raise RetryableError(
            f"{job.path}: {reason}; {len(stopped)} of {len(jobs)} files were stopped in this way, "
            "and none was refused for it; give the same command again, with fewer workers= if "
            "memory is short"
        )


def _count_failure(job: Job, reason: str) -> bool:
    """Count a failure of a file; after MAX_FAILURES refuse the file and return True."""
    # Store the count outside the job's folder, which the next run empties.
    path = job.folder.with_name(f"{job.folder.name}.{FAILED}")
    failures = 1 + (json.loads(path.read_bytes())["tries"] if path.is_file() else 0)
    write_atomic(path, json.dumps({"tries": failures, "reason": reason}).encode())
    if failures >= MAX_FAILURES:
        _refuse_file(job, f"{reason}; in {failures} runs")
    return failures >= MAX_FAILURES


def _refuse_file(job: Job, reason: str) -> None:
    """Record the refusal of all of a file."""
    _empty_folder(job.folder)
    _write_done(job, [], [Refusal(0.0, 0.0, reason)])


def _make_task(options: RunOptions, yunet: Path, landmarker: Path) -> Callable[..., Any]:
    """Load the models in a worker process and return its task."""
    import cv2

    from data_prep.source import Models
    from echolab.vision.faces import FaceMesh

    # One OpenCV thread per process: the processes already share the cores.
    cv2.setNumThreads(1)
    models = Models(yunet, FaceMesh(landmarker))

    def task(job: Job, progress: Callable[[float], None]) -> tuple[int, list[str]]:
        sha256 = _sha256(job.path, progress)
        try:
            clips, refused = _cut_file(job, sha256, options, models, progress)
        except OSError:
            # Decoders report some damage as a disk error: if the bytes are readable, retry.
            _check_unchanged(job, sha256, progress)
            try:
                clips, refused = _cut_file(job, sha256, options, models, progress)
            except OSError as error:
                reason = f"damaged: the decoder cannot read it ({error.strerror or error})"
                clips, refused = [], [Refusal(0.0, 0.0, reason)]
        # A refusal is final, so check that the disk returned the right bytes.
        if any(refusal.reason.startswith("damaged") for refusal in refused):
            _check_unchanged(job, sha256, progress)
        _write_done(job, clips, refused)
        return len(clips), [refusal.reason for refusal in refused]

    return task


def _cut_file(
    job: Job, sha256: str, options: RunOptions, models: "Models", progress: Callable[[float], None]
) -> tuple[list[str], list[Refusal]]:
    """Write the clips of one file to its folder; return their keys and the refusals."""
    from data_prep.source import Clip, Source, read_source

    # Start from an empty folder: an interrupted run may have left clips.
    _empty_folder(job.folder)
    clips: list[str] = []
    refused: list[Refusal] = []
    source = Source(job.path, job.name, sha256, job.caption)
    for part in read_source(source, options, models, progress):
        if isinstance(part, Clip):
            for member, data in part.members.items():
                write_atomic(job.folder / f"{part.key}.{member}", data)
            clips.append(part.key)
        else:
            refused.append(part)
    return clips, refused


def _sha256(path: Path, progress: Callable[[float], None]) -> str:
    # Report progress, since hashing a large file on a slow disk takes minutes.
    digest, done, size = hashlib.sha256(), 0, max(1, path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            done += len(block)
            progress(0.05 * min(1.0, done / size))
    return digest.hexdigest()


def _check_unchanged(job: Job, sha256: str, progress: Callable[[float], None]) -> None:
    """Raise OSError unless a seemingly damaged file has the same hash when read again."""
    if _sha256(job.path, progress) != sha256:
        raise OSError(errno.EAGAIN, "it changed while it was read")


def _empty_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise write_error(folder, error) from error


def _write_done(job: Job, clips: list[str], refused: list[Refusal]) -> None:
    content = {"clips": clips, "refused": [list(refusal) for refusal in refused]}
    write_atomic(job.folder / DONE, json.dumps(content).encode())


def _write_dataset(jobs: list[Job], left_out: list[tuple[str, str]], options: RunOptions) -> None:
    """Write the shards, then refused.jsonl, then dataset.json.

    If there is no clip, write refused.jsonl alone and raise MediaError.
    """
    # List the refusals of each file in order of time, then the skipped files.
    done = [json.loads((job.folder / DONE).read_bytes()) for job in jobs]
    rows = [
        (job.name, *refusal)
        for job, content in zip(jobs, done, strict=True)
        for refusal in sorted(content["refused"])
    ]
    rows += [(name, 0.0, 0.0, reason) for name, reason in left_out]
    refused = "".join(_refused_line(*row) for row in rows).encode("utf-8", "backslashreplace")
    if not any(content["clips"] for content in done):
        write_atomic(options.out / REFUSED, refused)
        raise MediaError(
            f"{options.source}: no clip could be made of {len(jobs)} file(s); the first reason: "
            f"{rows[0][3]}; all are in {options.out / REFUSED}"
        )
    # Store all inputs of the result, so that a changed request is detected.
    description = {
        "request": _request_hash(jobs, options),
        "captions": _caption_hashes(jobs),
        "options": options.result_options(),
    }
    with ShardWriter(
        options.out,
        kind="raw",
        samples_per_shard=options.samples_per_shard,
        description=description,
    ) as writer:
        for job, content in zip(jobs, done, strict=True):
            for key in content["clips"]:
                paths = sorted(job.folder.glob(f"{key}.*"))
                writer.write(key, {p.name.partition(".")[2]: p.read_bytes() for p in paths})
        write_atomic(options.out / REFUSED, refused)


def _refused_line(source: str, start: float, end: float, reason: str) -> str:
    row = {
        "source": source,
        "start_seconds": round(start, 3),
        "end_seconds": round(end, 3),
        "reason": reason,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_refused(path: Path) -> list[dict[str, Any]]:
    """Return the rows of refused.jsonl."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _summary_figures(
    dataset: ShardDataset, files: int, refused: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures of the summary, with refusals by kind."""
    # The kind of a refusal is the part of its reason before the colon.
    kinds: dict[str, dict[str, float]] = {}
    for row in refused:
        kind = kinds.setdefault(row["reason"].partition(":")[0], {"spans": 0, "seconds": 0.0})
        kind["spans"] += 1
        kind["seconds"] = round(kind["seconds"] + row["end_seconds"] - row["start_seconds"], 3)
    sources = [json.loads(dataset.read(i)["json"]) for i in range(len(dataset))]
    return {
        "out": str(dataset.folder),
        "files": files,
        "files_used": len({source["source"] for source in sources}),
        "clips": len(dataset),
        "shards": len(dataset.shards),
        "seconds": round(sum(source["frames"] for source in sources) / 25, 3),
        "refused": kinds,
        "fingerprint": dataset.fingerprint,
    }


def summarize(figures: dict[str, Any], format: str) -> str:
    """Return the figures as text or as JSON."""
    if format == "json":
        return json.dumps(figures)
    lines = [
        f"{figures['clips']} clips, {figures['seconds']:.1f} s, of {figures['files_used']} of "
        f"{figures['files']} files, in {figures['shards']} shards: {figures['out']}"
    ]
    # Sort by refused seconds, the most first.
    for kind, sums in sorted(figures["refused"].items(), key=lambda item: -item[1]["seconds"]):
        lines.append(f"  refused {sums['seconds']:8.1f} s in {sums['spans']:4d} spans: {kind}")
    return "\n".join(lines)


class FileProgress:
    """Progress over files, on standard error: a bar on a terminal, else one line per file."""

    def __init__(self, files: int, done: int) -> None:
        self.files, self.done = files, done
        self.console = Console(stderr=True, highlight=False)
        self.fractions: dict[str, float] = {}
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("files", total=files, completed=done)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        if self.done:
            self.print(f"{self.done} of {self.files} files were done by an earlier run")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def progress(self, name: str, fraction: float) -> None:
        """Show that `fraction` of a file is done."""
        # Files in progress count by their fractions, so that the bar moves during a long file.
        self.fractions[name] = fraction
        if self.bar:
            completed = self.done + sum(self.fractions.values())
            self.bar.update(self.task, completed=completed, description=name[-40:])

    def finish(self, name: str, clips: int, reasons: list[str]) -> None:
        """Show that a file is done, with its clips and the kinds of its refusals."""
        self.fractions.pop(name, None)
        self.done += 1
        if self.bar:
            self.bar.update(self.task, completed=self.done + sum(self.fractions.values()))
        kinds = sorted({reason.partition(":")[0] for reason in reasons})
        refused = f"; {len(reasons)} refused: {', '.join(kinds)}" if reasons else ""
        self.print(f"[{self.done}/{self.files}] {name}: {clips} clips{refused}")

    def print(self, line: str) -> None:
        """Print one line above the bar, even if names in it hold line breaks or markup."""
        line = "\\n".join(line.splitlines())
        self.console.print(line, markup=False, soft_wrap=True)
