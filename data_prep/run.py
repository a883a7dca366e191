"""`python -m data_prep run SOURCE OUT`: raw talking videos to a dataset.

Each file's clips are kept in OUT/.work until all are done, so that the same command goes on
where it was stopped; then come the shards, refused.jsonl and, last, dataset.json.
"""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.filter import Refusal
from data_prep.listing import caption_of, list_source
from data_prep.options import RunOptions
from data_prep.summary import Watch, summarise
from data_prep.workers import Failed, Finished, Progressed, Unfinished, work
from echolab.arguments import parse
from echolab.atomic_io import (
    exclusive,
    make_folder,
    prove_writable,
    write_error,
    write_whole,
)
from echolab.data.index import INDEX
from echolab.data.shard_reader import ShardDataset, ShardWriter, open_dataset
from echolab.errors import DataError, MediaError, PassingError
from echolab.vision.face_models import LANDMARKER, YUNET, find_weight

if TYPE_CHECKING:
    from data_prep.source import Models

WORK = ".work"
DONE = "done.json"
FAILED = "failed.json"  # of a file whose work was stopped by something else
TRIES = 3  # runs in which a file may be stopped so, before it is refused
REFUSED = "refused.jsonl"


class Job(NamedTuple):
    """One file to be worked on."""

    path: Path
    name: str  # its path within the source
    folder: Path  # where its clips go
    caption: str
    fault: str  # why its caption cannot be used, or ""


def main(argv: list[str]) -> int:
    """The command; prints a summary to standard output."""
    options = parse(RunOptions, argv, command="data_prep run", positional=("source", "out"))
    prove_writable(options.out, folder=True)
    print(summarise(prepare(options), options.format))
    return 0


def prepare(options: RunOptions) -> dict[str, Any]:
    """Make the dataset; figures of the summary.  Raises an EcholabError when nothing comes out."""
    listing = list_source(options.source, options.out)
    jobs = [_job(path, name, options) for path, name in listing.files]
    if not (options.out / INDEX).exists():
        make_folder(options.out)
        with exclusive(options.out):
            if not (options.out / INDEX).exists():  # by another run that has just ended
                _work_through(jobs, options)
                _write_dataset(jobs, listing.left_out, options)
                shutil.rmtree(options.out / WORK, ignore_errors=True)
    dataset = open_dataset(options.out)
    _check_request(dataset, jobs, options)
    return _figures(dataset, len(jobs), read_refused(options.out / REFUSED))


def _job(path: Path, name: str, options: RunOptions) -> Job:
    """Return the work on one file, in a folder named by all that decides its outcome."""
    caption, fault = "", ""
    try:
        caption = caption_of(options.caption, path, options.source)
    except MediaError as error:
        fault = str(error)
    stat = path.stat()
    content = [options.of_the_result(), name, stat.st_size, stat.st_mtime_ns, caption, fault]
    return Job(path, name, options.out / WORK / _hash(content)[:24], caption, fault)


def _request(jobs: list[Job], options: RunOptions) -> str:
    """A hash of what was asked for: the files and the options that decide the result."""
    stats = [(job.name, job.path.stat().st_size, job.path.stat().st_mtime_ns) for job in jobs]
    return _hash([options.of_the_result(), stats])


def _captions(jobs: list[Job]) -> dict[str, str]:
    """What was said of each file: its caption, or why that cannot be used."""
    return {job.name: _hash([job.caption, job.fault])[:16] for job in jobs}


def _check_request(dataset: ShardDataset, jobs: list[Job], options: RunOptions) -> None:
    """Raise DataError if a dataset is of other files, options or captions."""
    asked = dataset.description
    if asked.get("request") != _request(jobs, options):
        raise DataError(
            f"{options.out}: holds a dataset of other files or options; choose another folder"
        )
    before, now = asked.get("captions", {}), _captions(jobs)
    edited = [name for name in now if before.get(name) != now[name]]
    if edited:
        raise DataError(
            f"{options.out}: holds a dataset with other captions: {len(edited)} were edited since, "
            f"such as that of {edited[0]}; choose another folder, or remove this one"
        )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _work_through(jobs: list[Job], options: RunOptions) -> None:
    """Leave a folder with clips and done.json behind for every file.

    Raises PassingError, at the end, if files were stopped by something else than themselves.
    """
    for refused in (job for job in jobs if job.fault):
        _keep_refusal(refused, refused.fault)
    todo = [job for job in jobs if not (job.folder / DONE).is_file()]
    if not todo:
        return
    yunet = find_weight(YUNET, options.weights)
    landmarker = find_weight(LANDMARKER, options.weights)
    setup = partial(_setup, options, yunet, landmarker)
    stopped: list[tuple[Job, str]] = []
    with Watch(len(jobs), len(jobs) - len(todo)) as watch:
        for report in work(setup, todo, options.workers, options.stall_seconds):
            job: Job = report.job
            match report:
                case Progressed(_, share):
                    watch.progress(job.name, share)
                case Finished(_, (clips, refused)):
                    watch.finish(job.name, clips, refused)
                case Failed(_, what):
                    _keep_refusal(job, what)
                    watch.finish(job.name, 0, [what])
                case Unfinished(_, what):
                    if not _is_given_up(job, what):
                        stopped.append((job, what))
                    watch.finish(job.name, 0, [what])
    if stopped:
        job, what = stopped[0]
        raise PassingError(
            f"{job.path}: {what}; {len(stopped)} of {len(jobs)} files were stopped so, and "
            "none was refused for it; give the same command again, with fewer workers= if memory "
            "is short"
        )


def _is_given_up(job: Job, what: str) -> bool:
    """Count a file that was stopped; whether that is once too often, so that it is refused."""
    path = job.folder.with_name(f"{job.folder.name}.{FAILED}")
    tries = 1 + (json.loads(path.read_bytes())["tries"] if path.is_file() else 0)
    write_whole(path, json.dumps({"tries": tries, "reason": what}).encode())
    if tries >= TRIES:
        _keep_refusal(job, f"{what}; in {tries} runs")
    return tries >= TRIES


def _keep_refusal(job: Job, what: str) -> None:
    _make_empty(job.folder)
    _write_done(job, [], [Refusal(0.0, 0.0, what)])


def _setup(options: RunOptions, yunet: Path, landmarker: Path) -> Callable[..., Any]:
    """Runs in a worker: load the models and return the task."""
    import cv2

    from data_prep.source import Models
    from echolab.vision.faces import FaceMesh

    cv2.setNumThreads(1)
    models = Models(yunet, FaceMesh(landmarker))

    def task(job: Job, progress: Callable[[float], None]) -> tuple[int, list[str]]:
        sha256 = _sha256(job.path, progress)
        try:
            clips, refused = _read(job, sha256, options, models, progress)
        except OSError:
            # A decoder calls some damage an error of the disk: read once more, if the bytes can be.
            _check_unchanged(job, sha256, progress)
            try:
                clips, refused = _read(job, sha256, options, models, progress)
            except OSError as error:
                what = f"damaged: the decoder cannot read it ({error.strerror or error})"
                clips, refused = [], [Refusal(0.0, 0.0, what)]
        if any(refusal.reason.startswith("damaged") for refusal in refused):
            _check_unchanged(job, sha256, progress)
        _write_done(job, clips, refused)
        return len(clips), [refusal.reason for refusal in refused]

    return task


def _read(
    job: Job, sha256: str, options: RunOptions, models: "Models", progress: Callable[[float], None]
) -> tuple[list[str], list[Refusal]]:
    """Write the clips of one file into its folder; return their keys and the refusals."""
    from data_prep.source import Clip, Source, read_source

    _make_empty(job.folder)
    clips: list[str] = []
    refused: list[Refusal] = []
    source = Source(job.path, job.name, sha256, job.caption)
    for part in read_source(source, options, models, progress):
        if isinstance(part, Clip):
            for member, data in part.members.items():
                write_whole(job.folder / f"{part.key}.{member}", data)
            clips.append(part.key)
        else:
            refused.append(part)
    return clips, refused


def _sha256(path: Path, progress: Callable[[float], None]) -> str:
    digest, done, size = hashlib.sha256(), 0, max(1, path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            done += len(block)
            progress(0.05 * min(1.0, done / size))
    return digest.hexdigest()


def _check_unchanged(job: Job, sha256: str, progress: Callable[[float], None]) -> None:
    """Raise OSError unless the bytes that seem damaged can be read again and are the same."""
    if _sha256(job.path, progress) != sha256:
        raise OSError(errno.EAGAIN, "it changed while it was read")


def _make_empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise write_error(folder, error) from error


def _write_done(job: Job, clips: list[str], refused: list[Refusal]) -> None:
    content = {"clips": clips, "refused": [list(refusal) for refusal in refused]}
    write_whole(job.folder / DONE, json.dumps(content).encode())


def _write_dataset(jobs: list[Job], left_out: list[tuple[str, str]], options: RunOptions) -> None:
    """Shards, then refused.jsonl, then dataset.json."""
    done = [json.loads((job.folder / DONE).read_bytes()) for job in jobs]
    rows = [
        (job.name, *refusal)
        for job, content in zip(jobs, done, strict=True)
        for refusal in sorted(content["refused"])
    ]
    rows += [(name, 0.0, 0.0, reason) for name, reason in left_out]
    refused = "".join(_refused_line(*row) for row in rows).encode("utf-8", "backslashreplace")
    if not any(content["clips"] for content in done):
        write_whole(options.out / REFUSED, refused)
        raise MediaError(
            f"{options.source}: no clip could be made of {len(jobs)} file(s); the first reason: "
            f"{rows[0][3]}; all are in {options.out / REFUSED}"
        )
    description = {
        "request": _request(jobs, options),
        "captions": _captions(jobs),
        "options": options.of_the_result(),
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
        write_whole(options.out / REFUSED, refused)


def _refused_line(source: str, start: float, end: float, reason: str) -> str:
    row = {
        "source": source,
        "start_seconds": round(start, 3),
        "end_seconds": round(end, 3),
        "reason": reason,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_refused(path: Path) -> list[dict[str, Any]]:
    """The rows of refused.jsonl."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _figures(dataset: ShardDataset, files: int, refused: list[dict[str, Any]]) -> dict[str, Any]:
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
