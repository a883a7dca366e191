"""Train steps of a run again and compare them with its records."""

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from echolab.atomic_io import check_writable
from echolab.cli.replay import ReplayArguments
from echolab.config.build import schedule_from, train_config_from
from echolab.config.check import check
from echolab.config.origins import checkpoint_of, recorded
from echolab.config.parts import INTERVALS, machine_from
from echolab.config.stored import hidden, resolved
from echolab.data.bad_samples import QUARANTINE
from echolab.data.ledger import LEDGER, Row, SkippedBatch, read_ledger
from echolab.errors import CheckpointError, ConfigError, DivergedError
from echolab.launch import run_dir
from echolab.launch.run_dir import config_of
from echolab.tracking.metrics import read_metrics
from echolab.training.callbacks.sample_ledger import left_out
from echolab.training.checkpoints.checkpoint import (
    folder_of,
    latest_valid,
    open_checkpoint,
    saved_steps,
)
from echolab.training.checkpoints.diff import state_differences, tensor_differences
from echolab.training.config import Intervals, Machine, TrainConfig
from echolab.training.fit import fit
from echolab.training.guards.events import EVENTS, skips
from echolab.training.schedule import Skip, group_of

COMPARED = ("train/loss", "train/gradient_norm")
METRICS = "metrics.jsonl"
TOLERANCE = 1e-3  # relative, if ranks, devices or precision change the order of sums
Rows = list[dict[str, Any]]


def replay_and_compare(arguments: ReplayArguments) -> int:
    """Replay, compare, and print the differences; return 1 if there are any."""
    # Check the request against the run.
    run, step, out = arguments.run, arguments.step, arguments.out
    config = _settings(arguments, config_of(run))
    if step > (steps := schedule_from(config).steps):
        raise ConfigError(f"step={step}: the run's schedule has {steps} steps")
    if out and out.exists():
        raise ConfigError(f"out={out}: already there; name another, or remove it")
    if out:
        check_writable(out, folder=True)

    # Train the steps again.
    with ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="echolab-replay-")))
        start = prepare(run, out, step)
        try:
            with redirect_stdout(sys.stderr):  # standard output is for the result
                rows, exact = replay(segments_of(arguments, start), out)
        except ReplayDiverged as diverged:
            return _report_divergence(arguments, diverged)
        log = int(config["log_every"])
        differing = list(differences(run, out, (start, step), rows, log, exact=exact))

    # Report.
    compared = records_of(run, step, exact=exact)
    if arguments.format == "json":
        about = {"run": str(run), "first_step": start, "step": step, "exact": exact}
        print(json.dumps({**about, "compared": compared, "differences": differing}))
    elif differing:
        print("\n".join(differing))
    else:
        precision = "bit for bit" if exact else f"losses to {TOLERANCE:g}"
        records = ", ".join(compared) or "nothing: the run kept no ledger, metrics or checkpoint"
        print(f"{run}: steps {start + 1} to {step} repeat ({precision}), by {records}")
    return 1 if differing else 0


class ReplayDiverged(Exception):
    """A value of the replay is not finite; `batch` holds the clips of `step`, counted from 0."""

    def __init__(self, reason: str, step: int, batch: SkippedBatch) -> None:
        super().__init__(reason)
        self.step, self.batch = step, batch


def _report_divergence(arguments: ReplayArguments, diverged: ReplayDiverged) -> int:
    """Print the clips of the step; return 1 if the run itself was finite at this step."""
    step, batch, run = diverged.step + 1, diverged.batch, arguments.run
    logged = [row for row in read_metrics(run / METRICS) if row["step"] == step]
    finite = [row for row in logged if math.isfinite(row.get("train/loss", math.nan))]
    if arguments.format == "json":
        about = {"run": str(run), "step": step, "diverged": True, "reproduced": not finite}
        clips = {"kind": batch.kind, "batch": batch.batch, "clips": batch.keys}
        print(json.dumps({**about, **clips, "reason": str(diverged)}))
    else:
        comparison = "was finite in the run" if finite else "as in the run"
        print(
            f"{run}: {diverged}, {comparison}; clips of its {batch.kind} batch {batch.batch}: "
            f"{', '.join(batch.keys)}; skip them by `echolab rollback {run} to=STEP "
            f"skip={batch.batch}:{batch.batch + 1}`, or lower the learning rate before it"
        )
    return 1 if finite else 0


def _settings(arguments: ReplayArguments, kept: dict[str, Any]) -> dict[str, Any]:
    """Return the run's settings `kept`, with the secrets that the run folder lacks."""
    # Addresses on the command line replace the stored addresses.
    given = {"clips": arguments.clips, "pairs": arguments.pairs}
    kept["data"] |= {key: list(value) for key, value in given.items() if value}
    kept["data"]["val_clips"] = None  # no validation
    if missing := hidden({key: kept["data"].get(key) for key in given}):
        words = " ".join(f"{name}=ADDRESS" for name in sorted(set(missing)))
        raise ConfigError(f"{arguments.run}: keeps no secret of its data's address; give {words}")
    return check(resolved(kept, arguments.env))


def prepare(run: Path, out: Path, step: int) -> int:
    """Copy the state that training resumes from to the new folder; return its step.

    Files of checkpoints are linked: they are never rewritten, only replaced.
    """
    # Training resumes from the newest checkpoint before the step.
    start, rejected = latest_valid(run / "checkpoints", step - 1)
    if start is None and rejected:
        raise CheckpointError(rejected[0])
    out.mkdir(parents=True, exist_ok=True)
    # Skipped batches and bad samples determine the training data.
    for name in (EVENTS, QUARANTINE):
        if (run / name).exists():
            shutil.copy(run / name, out / name)
    if start is None:
        return 0
    # Link earlier checkpoints too: the reference of a preference epoch is the one at its beginning.
    for earlier in saved_steps(run / "checkpoints"):
        if earlier <= start.step:
            shutil.copytree(
                folder_of(run / "checkpoints", earlier),
                folder_of(out / "checkpoints", earlier),
                copy_function=_link,
            )
    return start.step


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


class Segment(NamedTuple):
    """Steps that one attempt of the run trained, under its settings."""

    attempt: int  # index of the segment
    stop: int  # its last step, counted from 1
    config: dict[str, Any]


def segments_of(arguments: ReplayArguments, start: int) -> list[Segment]:
    """Return the segments of the steps from `start` (from 0) to the requested one, in order."""
    run, step = arguments.run, arguments.step
    # Settings of each attempt, by its first step.
    settings = run_dir.settings_by_step(run)
    settings[0] = (0, settings[0][1])  # for runs made before settings were recorded by step
    initial = recorded(run).get("init_from")
    segments: list[Segment] = []
    # Merge attempts that trained under the same settings.
    for (first, kept), stop in zip(
        settings, [*(first for first, _ in settings[1:]), step], strict=True
    ):
        if stop <= start or first >= step:
            continue
        config = _settings(arguments, kept)
        config["init_from"] = _initial_checkpoint(config["init_from"], initial)
        if first < start or first == 0:  # the data are those of the resumed checkpoint
            config["data"]["changed"] = "refuse"
        if segments and _same_training(segments[-1].config, config):
            segments[-1] = segments[-1]._replace(stop=min(stop, step))
        else:
            segments.append(Segment(len(segments) + 1, min(stop, step), config))
    return segments


def _initial_checkpoint(path: str | None, record: dict[str, Any] | None) -> str | None:
    """Return the checkpoint that the run started from, even if its run record trained further."""
    start = checkpoint_of(path, record)
    return str(start) if start else None


def _same_training(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two settings train the same steps; `data.changed` may bring other data."""
    ignored = (
        "run_dir",
        *INTERVALS,
        "logger",
        "launcher",
        "timeouts",
        "loss_spike",
        "signal_grace_seconds",
    )
    a, b = ({k: v for k, v in config.items() if k not in ignored} for config in (first, second))
    return a == b and b["data"].get("changed") != "accept"


def replay(segments: Sequence[Segment], out: Path) -> tuple[Rows, bool]:
    """Train in `out`; return the logged rows, and whether they should be bit-equal."""
    rows, exact = Rows(), True
    for segment in segments:
        exact = _replay(segment, out, rows) and exact
    return rows, exact


def _replay(segment: Segment, out: Path, rows: Rows) -> bool:
    """Train one segment, appending its log to `rows`; return whether it should be bit-equal."""
    # Only one process on the CPU in fp32 repeats bit for bit.
    machine = machine_from(segment.config["trainer"])
    exact = machine.world == 1 and machine.accelerator == "cpu" and machine.precision == "32-true"
    single = Machine(
        accelerator=machine.accelerator,
        precision=machine.precision,
        attention=machine.attention,
        activation_checkpointing=machine.activation_checkpointing,
    )
    used = machine if exact else single
    training = train_config_from({**segment.config, "run_dir": str(out)}, "", used)
    every = training.intervals or Intervals()
    # Train without saving, validating or reacting to spikes.
    again = training._replace(
        micro_batch_size=_micro_batch_size(training, machine),
        intervals=Intervals(log_every=every.log_every, save_every=0, val_every=0),
        loss_spike=training.loss_spike._replace(policy="record", threshold=math.inf),
        val_data=None,
        verify_export=False,
        log_samples=True,
        stop_after_step=segment.stop,
        log_metrics=lambda at, values: rows.append(
            {"step": at, "attempt": segment.attempt, **values}
        ),
    )
    try:
        fit(again)
    except DivergedError as error:
        if error.step is None:
            raise
        # Name the clips of the step that is not finite.
        position = again.schedule.leaving_out(skips(out)).place(error.step)
        batch = next(
            left_out(again.build_data(), [Skip(group_of(position.kind), position.batch, 1)])
        )
        raise ReplayDiverged(str(error).partition(";")[0], error.step, batch) from error
    return exact


def _micro_batch_size(training: TrainConfig, machine: Machine) -> int:
    """Return the clips per forward of one rank of the run, which trained on `machine`."""
    # Ranks that share one clip count as one.
    groups = machine.world // machine.sequence_parallel
    return training.micro_batch_size or training.batch_size // groups


def records_of(run: Path, step: int, *, exact: bool) -> list[str]:
    """Return the names of the run's records that a replay can be compared with."""
    records = {
        "ledger": (run / LEDGER).is_dir(),
        "metrics": (run / METRICS).is_file(),
        "checkpoint": exact and step in saved_steps(run / "checkpoints"),
    }
    return [name for name, exists in records.items() if exists]


def differences(
    run: Path, out: Path, steps: tuple[int, int], rows: Rows, log: int, *, exact: bool
) -> Iterator[str]:
    """Yield one line for each step, and the checkpoint, that differs from the run's records."""
    start, end = steps
    records = records_of(run, end, exact=exact)
    if "ledger" in records:
        before, after = read_ledger(run).steps, read_ledger(out).steps
        for step in range(start, end):
            if step in before and (names := _rows_differ(before[step], after.get(step, []))):
                yield f"step {step + 1}: {names} differ from the ledger's"
    if "metrics" in records:
        yield from _metrics_differ(read_metrics(run / METRICS), rows, start, log, exact=exact)
    if "checkpoint" in records:
        saved, replayed = (open_checkpoint(folder_of(p / "checkpoints", end)) for p in (run, out))
        for entry in state_differences(saved.state, replayed.state):
            yield f"step {end}: {entry['key']} was {entry.get('a')}, now {entry.get('b')}"
        for difference in tensor_differences(saved, replayed):
            yield f"step {end}: {difference.line()}"


def _rows_differ(old: list[Row], new: list[Row]) -> str:
    """Return the names of fields that differ.

    Ranks divide a batch by position, so the rows of all ranks in order are the full batch.
    """
    names = [
        name
        for name in ("sources", "epochs", "keys", "noise")
        if [x for row in old for x in getattr(row, name)]
        != [x for row in new for x in getattr(row, name)]
    ]
    return ", ".join(names)


def _metrics_differ(old: Rows, new: Rows, start: int, log: int, *, exact: bool) -> Iterator[str]:
    """Yield the differences between rows that cover the same steps."""
    # A row holds the means over the steps since the previous row.
    old_rows = dict(_by_span(old, 0, log))
    for span, row in _by_span(new, start, log):
        for name in COMPARED:
            a, b = old_rows.get(span, {}).get(name, math.nan), row.get(name, math.nan)
            if math.isnan(a) or math.isnan(b):
                continue
            if a != b and (exact or not math.isclose(a, b, rel_tol=TOLERANCE)):
                yield f"step {span[1]}: {name} was {a!r}, now {b!r}"


def _by_span(rows: Rows, start: int, log: int) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Yield ((step of the previous row, step), row); the first row begins at `start`.

    The beginning of a later attempt's first row is unknown, unless every step has a row.
    """
    before = {"step": start, "attempt": rows[0]["attempt"]} if rows else {}
    for row in rows:
        if COMPARED[0] in row:
            if row["attempt"] == before["attempt"]:
                yield (before["step"], row["step"]), row
            elif log == 1:
                yield (row["step"] - 1, row["step"]), row
            before = row
