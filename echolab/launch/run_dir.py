"""Run folders: made once, by rank 0, with an identity that outlives every attempt.

run.json        id, wandb id, when and by what it was made; never changed
config.json     the resolved settings of the last attempt that trained
configs.jsonl   those of every attempt that trained, and the step that it went on from
attempts.jsonl  one line for each start: when, where, versions, git state
.lease/         which launch may write here (`lease`)
attempts/       what supervisors and ranks told of each launch
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

from echolab.atomic_io import ABSENT, append_text, read_whole, write_whole
from echolab.errors import ConfigError
from echolab.launch import lease
from echolab.launch.lease import Lease

# May differ between attempts: where and how a run is trained and watched, not what is trained.
MACHINE = (
    "run_dir", "trainer", "logger", "launcher", "timeouts", "micro_batch_size",
    "log_every", "save_every", "val_every", "replica_check_every", "snapshot_every",
    "loss_spike", "max_host_memory_gb", "verify_export", "signal_grace_seconds",
    "max_infra_restarts",
    "data.num_workers", "data.cache_dir", "data.cache_gb", "data.log_samples",
    "data.max_bad_fraction",
    "data.changed",
    "data.val_clips", "data.val_num_clips", "data.val_batch_size", "data.val_tasks",
    "data.val_overlaps",
)  # fmt: skip

# Compared by content, against what the checkpoints record (`training.lineage`).
BY_CONTENT = ("data.clips", "data.pairs", "init_from", "pretrained", "ref_model", "lora.init_from")

ATTEMPTS, CONFIG, CONFIGS = "attempts", "config.json", "configs.jsonl"
JOB = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "ECHOLAB_LAUNCH")


class Run(NamedTuple):
    """A run folder that is ours while we hold it."""

    folder: Path
    id: str
    attempt: int  # from 1
    lease: Lease


def digest(config: Mapping[str, Any]) -> str:
    """Of resolved settings: what all ranks must agree on."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def own_rank() -> int:
    """This process's rank as its launcher says, before ranks can talk; 0 when alone."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    if not isinstance(config, Mapping) or not config:
        return {name: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{name}.{key}" if name else str(key))
    return found


def check_same(folder: Path, config: Mapping[str, Any], extra: tuple[str, ...] = ()) -> None:
    """Raise ConfigError naming the first setting that differs from the folder's own."""
    saved = json.loads(read_whole(folder / "config.json"))
    if "run_dir" not in saved and "run" in saved:
        raise ConfigError(
            f"{folder}: its settings have the names of an earlier version (run=, now run_dir=); "
            "train it with that version, or give another folder by run_dir=..."
        )
    old, new = flat(saved), flat(json.loads(json.dumps(config)))
    for key in sorted(set(old) | set(new)):
        if {key, key.split(".")[0]} & {*MACHINE, *BY_CONTENT, *extra}:
            continue
        if key not in old:
            continue  # of a run from before there was such a setting: its default is what was
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder}: is a run with {key}={old.get(key)}, now {key}={new.get(key)}; "
                "give the old value, or another folder by run_dir=..."
            )


def versions() -> dict[str, str]:
    """Of Python and every installed package."""
    found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def git_state() -> dict[str, Any]:
    """Commit and whether files differ from it; empty outside a repository."""
    root = Path(__file__).parent
    answers: list[str] = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if done.returncode:
            return {}
        answers.append(done.stdout.strip())
    return {"commit": answers[0], "changed": answers[1].splitlines()}


def _create(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json, then run.json, each whole or not there."""
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in folder.name[:40])
    identity = {"id": f"{name}-{secrets.token_hex(4)}", "made": time.time()}
    files: dict[str, Any] = {"config.json": config, "run.json": identity}
    for name, content in files.items():
        if (folder / name).exists():  # settings of a start that died here, or another program's
            continue
        write_whole(folder / name, json.dumps(content, indent=1).encode(), patient=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(read_whole(path))
    except (*ABSENT, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); choose another by run_dir=..."
        ) from error
    return content


@contextmanager
def held(folder: Path) -> Iterator[Lease]:
    """Make the folder and keep other processes out of it; BusyError where one is in it."""
    with lease.held(folder, f"local-{secrets.token_hex(4)}") as own:
        yield own


def check_ours(folder: Path) -> None:
    """Raise ConfigError where a folder holds other things than a run."""
    seen = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = [name for name in seen if not name.startswith(".") and not name.endswith(".partial")]
    if set(others) - {ATTEMPTS} and not seen & {"run.json", "config.json"}:
        raise ConfigError(f"{folder}: holds files, and no run; give another by run_dir=...")


@contextmanager
def claim(
    folder: Path, config: Mapping[str, Any], may_change: tuple[str, ...] = ()
) -> Iterator[Run]:
    """Make or go on with the run in `folder`; for rank 0 alone, held until the block ends.

    Its supervisor holds the folder; without one it is taken here.  Raises ConfigError where the
    folder is another run's or holds other things, BusyError where another process is at work in it,
    and FencedError where a later launch has taken it.
    """
    check_ours(folder)
    supervised = lease.of_environment(folder)
    with nullcontext(supervised) if supervised else held(folder) as own:
        own.check()
        if not (folder / "run.json").exists():  # asked under the lock: one of many makes it
            _create(folder, config)
        identity = _read(folder / "run.json")
        check_same(folder, config, may_change)
        path = folder / "attempts.jsonl"
        attempt = 1 + (len(path.read_text().splitlines()) if path.exists() else 0)
        job = {k: v for k, v in os.environ.items() if k in JOB}
        about = {
            "attempt": attempt, "time": time.time(), "host": socket.gethostname(),
            "pid": os.getpid(), **job, "git": git_state(), "versions": versions(),
        }  # fmt: skip
        own.check()  # git and the versions took their time
        append_text(path, json.dumps(about) + "\n", patient=True)
        yield Run(folder, str(identity["id"]), attempt, own)


def begin(run: Run, config: Mapping[str, Any], step: int) -> None:
    """Record that this attempt trains from `step` on, with these settings."""
    run.lease.check()
    line = {"attempt": run.attempt, "step": step, "config": config}
    append_text(run.folder / CONFIGS, json.dumps(line) + "\n", patient=True)
    write_whole(run.folder / CONFIG, json.dumps(config, indent=1).encode(), patient=True)


def settings_by_step(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the settings that led to a run's state, each with the first step trained under it.

    An attempt that went on from a checkpoint takes the place of all that were trained beyond it.
    """
    path, found = folder / CONFIGS, list[tuple[int, dict[str, Any]]]()
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            told = json.loads(line)
        except ValueError:
            continue  # its writer was killed within the line
        found = [one for one in found if one[0] < told["step"]]
        found.append((told["step"], told["config"]))
    last = _read(folder / CONFIG)
    return [*found[:-1], (found[-1][0] if found else 0, last)]
