"""`echolab checkpoint inspect|verify|diff`: what is in checkpoints, and is it whole?"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from echolab.arguments import parse
from echolab.errors import CheckpointError, ConfigError, printable
from echolab.training.checkpoints.checkpoint import (
    NAME,
    Checkpoint,
    content_faults,
    folder_of,
    open_checkpoint,
    open_verified,
    saved_steps,
)
from echolab.training.checkpoints.diff import ORIGIN, state_differences, tensor_differences
from echolab.training.checkpoints.manifest import MANIFEST, faults, files_of, read_manifest
from echolab.training.checkpoints.shard_plan import ITEM
from echolab.training.schedule import Epoch, Schedule

PLACE = "a checkpoint, or a run or its folder of checkpoints: the newest"
FORMAT = {"help": "of the answer"}


@dataclass(frozen=True)
class InspectArguments:
    """Say what a checkpoint holds: step, parts, sizes, averages, and what it was written by."""

    path: Path = field(metadata={"help": PLACE})
    format: Literal["text", "json"] = field(default="text", metadata=FORMAT)


@dataclass(frozen=True)
class VerifyArguments:
    """Read every byte of a checkpoint; one line a fault, exit code 1 if any."""

    path: Path = field(metadata={"help": PLACE})
    format: Literal["text", "json"] = field(default="text", metadata=FORMAT)


@dataclass(frozen=True)
class DiffArguments:
    """Compare two checkpoints; exit code 0 when every tensor and counter is bit-equal, else 1."""

    a: Path = field(metadata={"help": PLACE})
    b: Path = field(metadata={"help": "the other"})
    format: Literal["text", "json"] = field(default="text", metadata=FORMAT)


def find(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of a run, whole or not; else CheckpointError."""
    if (path / MANIFEST).is_file() or NAME.fullmatch(path.resolve().name):
        return path
    for folder in (path / "checkpoints", path):
        if steps := saved_steps(folder):
            return folder_of(folder, steps[0])
    raise CheckpointError(f"{path}: no checkpoint there; give a run, or one of its checkpoints")


def _position(state: dict[str, Any], step: int) -> dict[str, Any]:
    """Where in its schedule a run stands."""
    schedule = Schedule([Epoch(*epoch) for epoch in state["schedule"]["epochs"]])
    number, _, epoch, within = schedule.locate(step)
    told = {"epoch": number + 1, "epochs": len(schedule.epochs), "kind": epoch.kind}
    return {**told, "within": within, "epoch_steps": epoch.steps, "steps": schedule.steps}


def figures(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that `inspect` tells."""
    manifest, state = checkpoint.manifest, checkpoint.state
    sizes = {name: told["bytes"] for name, told in manifest["files"].items()}
    parts = files_of(manifest)
    counts = [math.prod(dims) for dims in manifest["parameters"].values()]
    size = sum(sizes.values()) + (checkpoint.path / MANIFEST).stat().st_size
    return {
        "path": str(checkpoint.path),
        "format": manifest["format"],
        "step": checkpoint.step,
        "sha256": checkpoint.digest,
        "parameters": {"tensors": len(counts), "values": sum(counts)},
        "tied": manifest["tied"],
        "parts": {
            part: {"files": len(names), "bytes": sum(sizes[name] for name in names)}
            for part, names in parts.items()
        },
        "bytes": size,
        "bytes_per_value_and_part": round(size / max(1, sum(counts)) / len(parts), 4),
        ORIGIN: state.get(ORIGIN, {}),
        "ema": state.get("ema", {}),
        "optimizer_updates": state.get("optimizer_updates"),
        "schedule": _position(state, checkpoint.step),
    }


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def inspect(argv: list[str]) -> int:
    """Sizes are looked at, contents are not: `verify` reads them."""
    command = "echolab checkpoint inspect"
    arguments = parse(InspectArguments, argv, command=command, positional=("path",))
    found = figures(open_verified(find(arguments.path)))
    if arguments.format == "json":
        print(json.dumps(found))
        return 0
    count, at = found["parameters"], found["schedule"]
    lines = [
        f"{found['path']}: step {found['step']}, {found['optimizer_updates']} updates",
        f"  parameters  {count['values']:,} values in {count['tensors']} tensors, "
        f"{len(found['tied'])} tied",
        f"  size        {found['bytes']:,} bytes, {found['bytes_per_value_and_part']} a value and "
        f"part (fp32 is {ITEM})",
        *(
            f"    {part:<10}  {told['bytes']:,} bytes in {told['files']} files"
            for part, told in found["parts"].items()
        ),
        f"  averages    {_told(found['ema'])}",
        f"  written by  {_told(found[ORIGIN])}",
        f"  schedule    step {found['step']} of {at['steps']}: epoch {at['epoch']} of "
        f"{at['epochs']} ({at['kind']}), {at['within']} of its {at['epoch_steps']} steps done",
        f"  sha256      {found['sha256']}",
    ]
    print(printable("\n".join(lines)))
    return 0


def all_faults(path: Path) -> list[str]:
    """One line for each thing that is wrong with a checkpoint."""
    try:
        manifest = read_manifest(path)
        if found := faults(path, manifest):
            return found
        return content_faults(Checkpoint(path, manifest))
    except CheckpointError as error:
        return [str(error)]


def verify(argv: list[str]) -> int:
    """The newest of a run is looked at even where it is damaged."""
    command = "echolab checkpoint verify"
    arguments = parse(VerifyArguments, argv, command=command, positional=("path",))
    path = find(arguments.path)
    found = all_faults(path)
    if arguments.format == "json":
        print(json.dumps({"path": str(path), "valid": not found, "faults": found}))
    else:
        print(printable("\n".join(found)) if found else f"{path}: whole")
    return 1 if found else 0


def diff(argv: list[str]) -> int:
    """Both are verified first."""
    command = "echolab checkpoint diff"
    arguments = parse(DiffArguments, argv, command=command, positional=("a", "b"))
    a, b = (open_checkpoint(find(path)) for path in (arguments.a, arguments.b))
    tensors = list(tensor_differences(a, b))
    state = state_differences(a.state, b.state)
    same = not tensors and not state
    origins = {side: one.state.get(ORIGIN, {}) for side, one in (("a", a), ("b", b))}
    if arguments.format == "json":
        told = {"a": str(a.path), "b": str(b.path), "same": same, ORIGIN: origins}
        differing = [found._asdict() for found in tensors]
        print(json.dumps({**told, "tensors": differing, "state": state}))
        return 0 if same else 1
    for side, one in (("a", a), ("b", b)):
        line = f"{side}: {one.path}, step {one.step}, written by {_told(origins[side])}"
        print(printable(line))
    for found in tensors:
        print(printable(found.line()))
    for entry in state:
        values = (json.dumps(entry[side]) if side in entry else "missing" for side in "ab")
        print(printable(f"state {entry['key']}: {' | '.join(values)}"))
    counts = f"{len(tensors)} tensors and {len(state)} entries of the state differ"
    print("bit-equal" if same else counts)
    return 0 if same else 1


STEPS = {"inspect": inspect, "verify": verify, "diff": diff}


def help_text() -> str:
    """Every step with one line."""
    return "\n".join(
        [
            "usage: echolab checkpoint STEP [key=value ...]",
            "",
            "  inspect  PATH  what a checkpoint holds",
            "  verify   PATH  is it whole, to the last byte?",
            "  diff     A B   in what two differ; exit code 0 where they are bit-equal",
            "",
            "`echolab checkpoint STEP --help` says what a step takes.",
        ]
    )


def main(argv: list[str]) -> int:
    """Run one step."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] not in STEPS:
        raise ConfigError(f"checkpoint {argv[0]}: unknown; one of {', '.join(STEPS)}")
    return STEPS[argv[0]](argv[1:])
