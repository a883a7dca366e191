"""Run folders: created by rank 0, with an identity that all attempts share.

run.json        format version, id, wandb id, time of creation; never changed
config.json     resolved settings of the last attempt that trained
configs.jsonl   settings of every attempt that trained, and the step that it started from
attempts.jsonl  one line for each start: time, host, versions, git state
.lease/         the launch that may write here (`lease`)
attempts/       records of each launch by its supervisors and ranks (`launch_records`)
checkpoints/    metrics.jsonl    wandb/
"""

import hashlib
import json
import os
import platform
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

from echolab.atomic_io import ABSENT, append_text, read_file, write_atomic
from echolab.errors import ConfigError
from echolab.launch import lease
from echolab.launch.lease import Lease

FORMAT = 2  # version of run.json and of the records in attempts/; format 1 did not record it

# Settings that may differ between attempts: they change how a run is executed and observed, but
# not the result of the training.
MACHINE = (
    "run_dir", "trainer", "logger", "callbacks", "launcher", "timeouts", "micro_batch_size",
    "log_every", "save_every", "val_every", "replica_check_every", "snapshot_every",
    "loss_spike", "max_host_memory_gb", "verify_export", "signal_grace_seconds",
    "max_infra_restarts",
    "data.num_workers", "data.cache_dir", "data.cache_gb", "data.log_samples",
    "data.max_bad_fraction",
    "data.changed",
    "data.val_clips", "data.val_num_clips", "data.val_batch_size", "data.val_tasks",
    "data.val_overlaps",
)  # fmt: skip

# Settings that are compared by content, with what the checkpoints record (`training.resume`).
BY_CONTENT = ("data.clips", "data.pairs", "init_from", "pretrained", "ref_model", "lora.init_from")

ATTEMPTS, IDENTITY, CONFIG, CONFIGS = "attempts", "run.json", "config.json", "configs.jsonl"
JOB = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "ECHOLAB_LAUNCH")


class Run(NamedTuple):
    """A run folder that this process holds."""

    folder: Path
    id: str
    attempt: int  # counted from 1
    lease: Lease


def digest(config: Mapping[str, Any]) -> str:
    """Return the hash of resolved settings, which must be equal on all ranks."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def rank_from_environment() -> int:
    """Return this process's rank as its launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def flatten(config: Any, name: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    if not isinstance(config, Mapping) or not config:
        return {name: config}
    settings: dict[str, Any] = {}
    for key, value in config.items():
        settings |= flatten(value, f"{name}.{key}" if name else str(key))
    return settings


# -- checks ---------------------------------------------------------------------------------------


def check_run_folder(folder: Path) -> None:
    """Raise ConfigError if a folder holds other files than a run, or a run of another format."""
    # Hidden files and records of attempts may exist before rank 0 creates the run.
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    visible = {name for name in names if not name.startswith(".") and not name.endswith(".partial")}
    if visible - {ATTEMPTS} and not names & {IDENTITY, CONFIG}:
        raise ConfigError(f"{folder}: holds files, and no run; give another folder by run_dir=...")
    if IDENTITY in names:
        check_format(folder)


def check_format(folder: Path) -> None:
    """Raise ConfigError if this version of echolab cannot read the format of a run folder."""
    version = _read(folder / IDENTITY).get("format", 1)
    if version != FORMAT:
        raise ConfigError(
            f"{folder}: run folder of format {version}, this version of echolab reads format "
            f"{FORMAT}; use the version that made it, or give another folder by run_dir=..."
        )


def check_same_settings(
    folder: Path, config: Mapping[str, Any], may_change: tuple[str, ...] = ()
) -> None:
    """Raise ConfigError that names the first setting that differs from the run folder's."""
    # Convert both through JSON, so that tuples and lists compare equal.
    old = flatten(json.loads(read_file(folder / CONFIG)))
    new = flatten(json.loads(json.dumps(config)))
    for key in sorted(set(old) | set(new)):
        if {key, key.split(".")[0]} & {*MACHINE, *BY_CONTENT, *may_change}:
            continue
        if key not in old:
            continue  # the run was made before this setting existed and used its default
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder}: is a run with {key}={old.get(key)}, now {key}={new.get(key)}; "
                "give the old value, or another folder by run_dir=..."
            )


# -- identity -------------------------------------------------------------------------------------


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of every installed package."""
    versions = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {"python": platform.python_version(), **dict(sorted(versions.items()))}


def git_state() -> dict[str, Any]:
    """Return the commit and the files that differ from it; empty outside a repository."""
    # git may be missing, slow on a network file system, or refuse a folder of another owner.
    root = Path(__file__).parent
    answers: list[str] = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if done.returncode:
            return {}
        answers.append(done.stdout.strip())
    return {"commit": answers[0], "changed": answers[1].splitlines()}


def _create(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, then run.json, each atomically."""
    # The id starts with the folder's name, in the characters that wandb allows.
    prefix = "".join(c if c.isalnum() or c in "-_" else "-" for c in folder.name[:40])
    run_id = f"{prefix}-{secrets.token_hex(4)}"
    files: dict[str, Any] = {
        CONFIG: config,
        IDENTITY: {"format": FORMAT, "id": run_id, "made": time.time()},
    }
    for name, content in files.items():
        if (folder / name).exists():  # an earlier start was killed between the two files
            continue
        write_atomic(folder / name, json.dumps(content, indent=1).encode(), patient=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(read_file(path))
    except (*ABSENT, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); choose another by run_dir=..."
        ) from error
    return content


def id_of(run: Path) -> str:
    """Return the id of a run, which all of its attempts and its tracker share."""
    return str(_read(run / IDENTITY)["id"])


def config_of(run: Path) -> dict[str, Any]:
    """Return the settings of a run; raise ConfigError if there are none."""
    path = run / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a run's folder") from error
    return config


# -- use ------------------------------------------------------------------------------------------


@contextmanager
def held(folder: Path) -> Iterator[Lease]:
    """Create the folder and hold its lease; raise BusyError while another process does."""
    with lease.held(folder, f"local-{secrets.token_hex(4)}") as run_lease:
        yield run_lease


@contextmanager
def claim(
    folder: Path, config: Mapping[str, Any], may_change: tuple[str, ...] = ()
) -> Iterator[Run]:
    """Create or continue the run in `folder`, on rank 0 only; hold it until the block ends.

    With a supervisor, the supervisor holds the lease of the folder.  Raises ConfigError if
    the folder belongs to another run, has another format or holds other files, BusyError if another
    process uses it, and FencedError if a later launch took it over.
    """
    check_run_folder(folder)
    supervised = lease.from_environment(folder)
    with nullcontext(supervised) if supervised else held(folder) as run_lease:
        run_lease.check()
        if not (folder / IDENTITY).exists():  # checked while held: only one process creates it
            _create(folder, config)
        identity = _read(folder / IDENTITY)
        check_same_settings(folder, config, may_change)
        # Record this attempt.
        path = folder / "attempts.jsonl"
        attempt = 1 + (len(path.read_text().splitlines()) if path.exists() else 0)
        job = {k: v for k, v in os.environ.items() if k in JOB}
        record = {
            "attempt": attempt, "time": time.time(), "host": socket.gethostname(),
            "pid": os.getpid(), **job, "git": git_state(), "versions": package_versions(),
        }  # fmt: skip
        run_lease.check()  # again, since reading git and the versions took time
        append_text(path, json.dumps(record) + "\n", patient=True)
        yield Run(folder, str(identity["id"]), attempt, run_lease)


def begin(run: Run, config: Mapping[str, Any], step: int) -> None:
    """Record that this attempt trains with these settings, starting after `step`."""
    # configs.jsonl first: config.json describes the last attempt that it lists.
    run.lease.check()
    record = {"attempt": run.attempt, "step": step, "config": config}
    append_text(run.folder / CONFIGS, json.dumps(record) + "\n", patient=True)
    write_atomic(run.folder / CONFIG, json.dumps(config, indent=1).encode(), patient=True)


def settings_by_step(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the settings that led to a run's state, each with the first step trained under it.

    An attempt that resumed from a checkpoint replaces all settings of later steps.
    """
    path, settings = folder / CONFIGS, list[tuple[int, dict[str, Any]]]()
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the writer was killed within the line
        settings = [(first, config) for first, config in settings if first < record["step"]]
        settings.append((record["step"], record["config"]))
    last = _read(folder / CONFIG)
    return [*settings[:-1], (settings[-1][0] if settings else 0, last)]
