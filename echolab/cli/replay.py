"""`echolab replay RUN step=N`: train the steps up to N once more, and see that they come out alike.

They are trained in a folder of their own, by one process, from the newest checkpoint before N and
the settings under which the run trained each step: an attempt may have changed them.  What the run
wrote down is compared: keys and noise of each step (the ledger), losses (metrics.jsonl), and the
checkpoint of step N, if there is one.  A run that was trained by one rank, on the CPU and in fp32,
comes out bit for bit; others nearly, in their losses.
"""

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from echolab.arguments import parse
from echolab.atomic_io import prove_writable
from echolab.cli.rollback import config_of
from echolab.config.build import schedule_from, training_from
from echolab.config.check import check
from echolab.config.origins import checkpoint_of, recorded
from echolab.config.parts import INTERVALS
from echolab.config.stored import hidden, resolved
from echolab.data.bad_samples import QUARANTINE
from echolab.data.ledger import LEDGER, LeftOut, Row, read_ledger
from echolab.errors import CheckpointError, ConfigError, DivergedError
from echolab.launch import run_dir
from echolab.tracking.metrics import read_metrics
from echolab.training.checkpoints.checkpoint import (
    folder_of,
    latest_valid,
    open_checkpoint,
    saved_steps,
)
from echolab.training.checkpoints.diff import state_differences, tensor_differences
from echolab.training.config import Intervals, Machine, Training
from echolab.training.fit import fit
from echolab.training.guards.events import EVENTS, skips
from echolab.training.ledger import left_out
from echolab.training.schedule import Skip, group_of

COMPARED = ("train/loss", "train/gradient_norm")
METRICS = "metrics.jsonl"
NEARLY = 1e-3  # relative, where other ranks, devices or types add in another order
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ReplayArguments:
    """Train the steps up to one again, beside the run; one line a difference, exit code 1 if any.

    Start it where the run was started, if its settings name data by relative paths.
    """

    run: Path = field(metadata={"help": "the run's folder; it is only read"})
    step: int = field(metadata={"help": "the last step to train, counted from 1"})
    out: Path | None = field(
        default=None, metadata={"help": "new folder for what is trained; none: it is removed"}
    )
    clips: tuple[str, ...] = field(
        default=(),
        metadata={"help": "addresses of the data whose secrets were not given by ${oc.env:NAME}"},
    )
    pairs: tuple[str, ...] = field(default=(), metadata={"help": "likewise"})
    env: tuple[str, ...] = field(
        default=(), metadata={"help": "variables that the run's settings may read"}
    )
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def main(argv: list[str]) -> int:
    """Replay, compare, and say what differs."""
    arguments = parse(ReplayArguments, argv, command="echolab replay", positional=("run", "step"))
    run, step, out = arguments.run, arguments.step, arguments.out
    config = _settings(arguments, config_of(run))
    if step > (steps := schedule_from(config["schedule"]).steps):
        raise ConfigError(f"step={step}: the run's schedule has {steps} steps")
    if out and out.exists():
        raise ConfigError(f"out={out}: already there; name another, or remove it")
    if out:
        prove_writable(out, folder=True)
    with ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="echolab-replay-")))
        start = prepare(run, out, step)
        try:
            with redirect_stdout(sys.stderr):  # what training says is no answer
                rows, exact = replay(pieces_of(arguments, start), out)
        except DivergedAgain as diverged:
            return _say_diverged(arguments, diverged)
        log = int(config["log_every"])
        found = list(differences(run, out, (start, step), rows, log, exact=exact))
    told = what_is_told(run, step, exact=exact)
    if arguments.format == "json":
        about = {"run": str(run), "first_step": start, "step": step, "exact": exact}
        print(json.dumps({**about, "compared": told, "differences": found}))
    elif found:
        print("\n".join(found))
    else:
        how = "bit for bit" if exact else f"losses to {NEARLY:g}"
        by = ", ".join(told) or "nothing: the run kept no ledger, metrics or checkpoint of it"
        print(f"{run}: steps {start + 1} to {step} are as they were ({how}), by {by}")
    return 1 if found else 0


class DivergedAgain(Exception):
    """The replay came to a value that is not finite; `met` are the clips of that step (from 0)."""

    def __init__(self, reason: str, step: int, met: LeftOut) -> None:
        super().__init__(reason)
        self.step, self.met = step, met


def _say_diverged(arguments: ReplayArguments, diverged: DivergedAgain) -> int:
    """Name the clips of the step; return 1 if the run itself was finite there."""
    step, met, run = diverged.step + 1, diverged.met, arguments.run
    logged = [row for row in read_metrics(run / METRICS) if row["step"] == step]
    finite = [row for row in logged if math.isfinite(row.get("train/loss", math.nan))]
    if arguments.format == "json":
        about = {"run": str(run), "step": step, "diverged": True, "reproduced": not finite}
        clips = {"kind": met.kind, "batch": met.batch, "clips": met.keys}
        print(json.dumps({**about, **clips, "reason": str(diverged)}))
    else:
        again = "was finite in the run" if finite else "here as in the run"
        print(
            f"{run}: {diverged}, {again}; clips of its {met.kind} batch {met.batch}: "
            f"{', '.join(met.keys)}; leave them out by `echolab rollback {run} to=STEP "
            f"skip={met.batch}:{met.batch + 1}`, or lower the learning rate before it"
        )
    return 1 if finite else 0


def _settings(arguments: ReplayArguments, kept: dict[str, Any]) -> dict[str, Any]:
    """The run's settings `kept`, with the secrets that its folder does not keep."""
    given = {"clips": arguments.clips, "pairs": arguments.pairs}
    kept["data"] |= {key: list(value) for key, value in given.items() if value}
    kept["data"]["val_clips"] = None  # nothing is validated
    if missing := hidden({key: kept["data"].get(key) for key in given}):
        words = " ".join(f"{name}=ADDRESS" for name in sorted(set(missing)))
        raise ConfigError(f"{arguments.run}: keeps no secret of its data's address; give {words}")
    return check(resolved(kept, arguments.env))


def prepare(run: Path, out: Path, step: int) -> int:
    """Give the new folder what training goes on from; the step that it goes on from.

    Files of checkpoints are linked: they are never written again, only replaced.
    """
    if step < 1:
        raise ConfigError(f"step={step}: must be 1 or more")
    start, rejected = latest_valid(run / "checkpoints", step - 1)
    if start is None and rejected:
        raise CheckpointError(rejected[0])
    out.mkdir(parents=True, exist_ok=True)
    for name in (EVENTS, QUARANTINE):
        if (run / name).exists():
            shutil.copy(run / name, out / name)
    if start is None:
        return 0
    # Those of earlier steps too: a preference epoch refers to the one at its beginning.
    for other in saved_steps(run / "checkpoints"):
        if other <= start.step:
            shutil.copytree(
                folder_of(run / "checkpoints", other),
                folder_of(out / "checkpoints", other),
                copy_function=_link,
            )
    return start.step


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


class Piece(NamedTuple):
    """Steps that one attempt of the run trained, under its settings."""

    attempt: int  # counted among the pieces
    stop: int  # the last of its steps, counted from 1
    config: dict[str, Any]


def pieces_of(arguments: ReplayArguments, start: int) -> list[Piece]:
    """Return what trained the steps from `start` (from 0) up to the one asked for, in order."""
    run, step = arguments.run, arguments.step
    told = run_dir.settings_by_step(run)
    told[0] = (0, told[0][1])  # of a run from before its settings were kept by step
    initial = recorded(run).get("init_from")
    pieces: list[Piece] = []
    for (first, kept), stop in zip(told, [*(one[0] for one in told[1:]), step], strict=True):
        if stop <= start or first >= step:
            continue
        config = _settings(arguments, kept)
        config["init_from"] = _initial(config["init_from"], initial)
        if first < start or first == 0:  # it met the data of the checkpoint that it goes on from
            config["data"]["changed"] = "refuse"
        if pieces and _alike(pieces[-1].config, config):
            pieces[-1] = pieces[-1]._replace(stop=min(stop, step))
        else:
            pieces.append(Piece(len(pieces) + 1, min(stop, step), config))
    return pieces


def _initial(place: str | None, was: dict[str, Any] | None) -> str | None:
    """Return the checkpoint that the run started from, though its run was trained on since."""
    found = checkpoint_of(place, was)
    return str(found) if found else None


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether settings differ in nothing that replay heeds; `data.changed` may bring other data."""
    ignored = (
        "run_dir",
        *INTERVALS,
        "logger",
        "launcher",
        "timeouts",
        "loss_spike",
        "signal_grace_seconds",
    )
    a, b = ({k: v for k, v in config.items() if k not in ignored} for config in (one, other))
    return a == b and b["data"].get("changed") != "accept"


def replay(pieces: Sequence[Piece], out: Path) -> tuple[Rows, bool]:
    """Train in `out`; what was logged, and whether it should be alike bit for bit."""
    rows, exact = Rows(), True
    for piece in pieces:
        exact = _replay(piece, out, rows) and exact
    return rows, exact


def _replay(piece: Piece, out: Path, rows: Rows) -> bool:
    training = training_from({**piece.config, "run_dir": str(out)}, "")
    machine = training.machine
    exact = machine.world == 1 and machine.accelerator == "cpu" and machine.precision == "32-true"
    alone = Machine(
        accelerator=machine.accelerator,
        precision=machine.precision,
        attention=machine.attention,
        checkpointing=machine.checkpointing,
    )
    every = training.every or Intervals()
    again = training._replace(
        machine=machine if exact else alone,
        micro_batch_size=_micro(training),
        every=Intervals(log=every.log, save=0, validate=0),
        guards=training.guards._replace(policy="record", limit=math.inf),
        held_out=None,
        parity=False,
        ledger=True,
        until=piece.stop,
        log=lambda at, values: rows.append({"step": at, "attempt": piece.attempt, **values}),
    )
    try:
        fit(again)
    except DivergedError as error:
        if error.step is None:
            raise
        place = again.schedule.leaving_out(skips(out)).place(error.step)
        met = next(left_out(again.feed(), [Skip(group_of(place.kind), place.batch, 1)]))
        raise DivergedAgain(str(error).partition(";")[0], error.step, met) from error
    return exact


def _micro(training: Training) -> int:
    """Clips a forward, as one rank had them."""
    machine = training.machine
    groups = machine.world // machine.sequence_parallel
    return training.micro_batch_size or training.batch_size // groups


def what_is_told(run: Path, step: int, *, exact: bool) -> list[str]:
    """What there is to compare with."""
    there = {
        "ledger": (run / LEDGER).is_dir(),
        "metrics": (run / METRICS).is_file(),
        "checkpoint": exact and step in saved_steps(run / "checkpoints"),
    }
    return [name for name, holds in there.items() if holds]


def differences(
    run: Path, out: Path, steps: tuple[int, int], rows: Rows, log: int, *, exact: bool
) -> Iterator[str]:
    """One line for each step, and the checkpoint, that is not as the run wrote it down."""
    start, end = steps
    told = what_is_told(run, end, exact=exact)
    if "ledger" in told:
        was, now = read_ledger(run).steps, read_ledger(out).steps
        for step in range(start, end):
            if step in was and (what := _rows_differ(was[step], now.get(step, []))):
                yield f"step {step + 1}: {what} differ from the ledger's"
    if "metrics" in told:
        yield from _metrics_differ(read_metrics(run / METRICS), rows, start, log, exact=exact)
    if "checkpoint" in told:
        one, other = (open_checkpoint(folder_of(p / "checkpoints", end)) for p in (run, out))
        for entry in state_differences(one.state, other.state):
            yield f"step {end}: {entry['key']} was {entry.get('a')}, now {entry.get('b')}"
        for found in tensor_differences(one, other):
            yield f"step {end}: {found.line()}"


def _rows_differ(was: list[Row], now: list[Row]) -> str:
    """The names of what differs; ranks cut a batch by place, so theirs in order are all of it."""
    names = [
        name
        for name in ("sources", "epochs", "keys", "noise")
        if [x for row in was for x in getattr(row, name)]
        != [x for row in now for x in getattr(row, name)]
    ]
    return ", ".join(names)


def _metrics_differ(was: Rows, now: Rows, start: int, log: int, *, exact: bool) -> Iterator[str]:
    """Rows are means since the row before; those that begin and end with the same step compare."""
    old = dict(_by_span(was, 0, log))
    for span, row in _by_span(now, start, log):
        for name in COMPARED:
            a, b = old.get(span, {}).get(name, math.nan), row.get(name, math.nan)
            if math.isnan(a) or math.isnan(b):
                continue
            if a != b and (exact or not math.isclose(a, b, rel_tol=NEARLY)):
                yield f"step {span[1]}: {name} was {a!r}, now {b!r}"


def _by_span(rows: Rows, start: int, log: int) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """((step of the row before, step), row); the first row of all begins at `start`.

    Where the first of a later attempt begins is not told, unless every step has a row.
    """
    before = {"step": start, "attempt": rows[0]["attempt"]} if rows else {}
    for row in rows:
        if COMPARED[0] in row:
            if row["attempt"] == before["attempt"]:
                yield (before["step"], row["step"]), row
            elif log == 1:
                yield (row["step"] - 1, row["step"]), row
            before = row
