"""`python -m data_prep run SOURCE OUT`: raw talking videos to a dataset.

Each file's clips are kept in OUT/.work until all are done, so that the same command goes on
where it was stopped; then come the shards, refused.jsonl and, last, dataset.json.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.filter import Refusal
from data_prep.options import RunOptions
from data_prep.pack import caption_of
from data_prep.summary import Watch, summarise
from data_prep.weights import LANDMARKER, YUNET, find_weight
from data_prep.workers import Failed, Finished, Progressed, Unfinished, work
from echolab.arguments import parse
from echolab.data.files import (
    exclusive,
    make_folder,
    prove_writable,
    write_error,
    write_whole,
)
from echolab.data.index import INDEX
from echolab.data.shards import ShardWriter, open_dataset
from echolab.errors import ConfigError, DataError, MediaError, PassingError

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


def main(argv: list[str]) -> int:
    """The command; prints a summary to standard output."""
    options = parse(RunOptions, argv, command="data_prep run", positional=("source", "out"))
    prove_writable(options.out, folder=True)
    print(summarise(prepare(options), options.format))
    return 0


def prepare(options: RunOptions) -> dict[str, Any]:
    """Make the dataset; figures of the summary.  Raises an EcholabError when nothing comes out."""
    files = find_files(options.source, options.out)
    request = _request(options, files)
    if not (options.out / INDEX).exists():
        make_folder(options.out)
        with exclusive(options.out):
            if not (options.out / INDEX).exists():  # by another run that has just ended
                _make(options, files, request)
    dataset = open_dataset(options.out)
    if dataset.description.get("request") != request:
        raise DataError(
            f"{options.out}: holds a dataset of other files or options; choose another folder"
        )
    return _figures(options, files, read_refused(options.out / REFUSED))


def _make(options: RunOptions, files: list[tuple[Path, str]], request: str) -> None:
    jobs = [
        Job(
            path,
            name,
            options.out / WORK / _identity(path, name, options),
            caption_of(options.caption, path),
        )
        for path, name in files
    ]
    _work_through(jobs, options)
    _write_dataset(jobs, options, request)
    shutil.rmtree(options.out / WORK, ignore_errors=True)


def find_files(source: Path, out: Path) -> list[tuple[Path, str]]:
    """The files of a source and their names, in order; hidden ones and OUT's are left out."""
    if source.is_file():
        return [(source, source.name)]
    if source.resolve() == out.resolve():
        raise ConfigError(f"out={out}: is the source itself; give another folder")
    if not source.is_dir():
        raise MediaError(f"{source}: not there; give a video or a folder of videos")
    found = []
    for folder, folders, names in os.walk(source):
        inside = Path(folder)
        folders[:] = sorted(
            f for f in folders if f[0] != "." and (inside / f).resolve() != out.resolve()
        )
        # A text beside a video is its caption, no source of its own.
        stems = {Path(name).stem for name in names if not name.endswith(".txt")}
        for name in sorted(names):
            is_caption = name.endswith(".txt") and Path(name).stem in stems
            if name[0] != "." and not is_caption and (inside / name).is_file():
                path = inside / name
                # A name that is no Unicode can be opened but not printed.
                shown = str(path.relative_to(source)).encode("utf-8", "replace").decode()
                found.append((path, shown))
    if not found:
        raise MediaError(f"{source}: holds no files; give a video or a folder of videos")
    return found


def _request(options: RunOptions, files: list[tuple[Path, str]]) -> str:
    """A hash of what was asked for: the files and the options that decide the result."""
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for path, name in files]
    return _hash([options.of_the_result(), stats])


def _identity(path: Path, name: str, options: RunOptions) -> str:
    stat = path.stat()
    return _hash([options.of_the_result(), name, stat.st_size, stat.st_mtime_ns])[:24]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _work_through(jobs: list[Job], options: RunOptions) -> None:
    """Leave a folder with clips and done.json behind for every file.

    Raises PassingError, at the end, if files were stopped by something else than themselves.
    """
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

    from data_prep.faces import FaceMesh
    from data_prep.source import Models

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


def _write_dataset(jobs: list[Job], options: RunOptions, request: str) -> None:
    """Shards, then refused.jsonl, then dataset.json."""
    done = [json.loads((job.folder / DONE).read_bytes()) for job in jobs]
    lines = [
        json.dumps(
            {
                "source": job.name,
                "start_seconds": round(start, 3),
                "end_seconds": round(end, 3),
                "reason": reason,
            },
            ensure_ascii=False,
        )
        for job, content in zip(jobs, done, strict=True)
        for start, end, reason in sorted(content["refused"])
    ]
    refused = "".join(line + "\n" for line in lines).encode()
    if not any(content["clips"] for content in done):
        write_whole(options.out / REFUSED, refused)
        reason = json.loads(lines[0])["reason"]
        raise MediaError(
            f"{options.source}: no clip could be made of {len(jobs)} file(s); the first reason: "
            f"{reason}; all are in {options.out / REFUSED}"
        )
    description = {"request": request, "options": options.of_the_result()}
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


def read_refused(path: Path) -> list[dict[str, Any]]:
    """The rows of refused.jsonl."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _figures(
    options: RunOptions, files: list[tuple[Path, str]], refused: list[dict[str, Any]]
) -> dict[str, Any]:
    dataset = open_dataset(options.out)
    kinds: dict[str, dict[str, float]] = {}
    for row in refused:
        kind = kinds.setdefault(row["reason"].partition(":")[0], {"spans": 0, "seconds": 0.0})
        kind["spans"] += 1
        kind["seconds"] = round(kind["seconds"] + row["end_seconds"] - row["start_seconds"], 3)
    sources = [json.loads(dataset.read(i)["json"]) for i in range(len(dataset))]
    return {
        "out": str(options.out),
        "files": len(files),
        "files_used": len({source["source"] for source in sources}),
        "clips": len(dataset),
        "shards": len(dataset.shards),
        "seconds": round(sum(source["frames"] for source in sources) / 25, 3),
        "refused": kinds,
        "fingerprint": dataset.fingerprint,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
