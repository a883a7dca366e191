"""Print the contents, faults and differences of checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

from echolab.errors import CheckpointError, escape_unprintable
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


def find(path: Path) -> Path:
    """Return the checkpoint at `path`, or the newest of a run, even if damaged.

    Raise CheckpointError if there is none.
    """
    # The path itself is a checkpoint, recognized by its manifest or by its name.
    if (path / MANIFEST).is_file() or NAME.fullmatch(path.resolve().name):
        return path
    # A run, or its folder of checkpoints: use the newest checkpoint.
    for folder in (path / "checkpoints", path):
        if steps := saved_steps(folder):
            return folder_of(folder, steps[0])
    raise CheckpointError(f"{path}: no checkpoint there; give a run, or one of its checkpoints")


def _position(state: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the position of a run in its schedule."""
    schedule = Schedule([Epoch(*epoch) for epoch in state["schedule"]["epochs"]])
    index, _, epoch, within = schedule.locate(step)
    counts = {"epoch": index + 1, "epochs": len(schedule.epochs), "kind": epoch.kind}
    return {**counts, "within": within, "epoch_steps": epoch.steps, "steps": schedule.steps}


def figures(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the contents of a checkpoint, as `inspect` prints them."""
    # Sizes come from the manifest: no tensor is read.
    manifest, state = checkpoint.manifest, checkpoint.state
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    # Parts are raw weights, averages and moments of the optimizer.
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


def _format_values(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def print_contents(path: Path, *, as_json: bool) -> int:
    """Print the contents of a checkpoint."""
    # The manifest is verified; `verify` reads every byte.
    contents = figures(open_verified(find(path)))
    if as_json:
        print(json.dumps(contents))
        return 0
    count, at = contents["parameters"], contents["schedule"]
    lines = [
        f"{contents['path']}: step {contents['step']}, {contents['optimizer_updates']} updates",
        f"  parameters  {count['values']:,} values in {count['tensors']} tensors, "
        f"{len(contents['tied'])} tied",
        f"  size        {contents['bytes']:,} bytes, {contents['bytes_per_value_and_part']} per "
        f"value and part (fp32 is {ITEM})",
        *(
            f"    {part:<10}  {size['bytes']:,} bytes in {size['files']} files"
            for part, size in contents["parts"].items()
        ),
        f"  averages    {_format_values(contents['ema'])}",
        f"  written by  {_format_values(contents[ORIGIN])}",
        f"  schedule    step {contents['step']} of {at['steps']}: epoch {at['epoch']} of "
        f"{at['epochs']} ({at['kind']}), {at['within']} of its {at['epoch_steps']} steps done",
        f"  sha256      {contents['sha256']}",
    ]
    print(escape_unprintable("\n".join(lines)))
    return 0


def all_faults(path: Path) -> list[str]:
    """Return one line for each fault of a checkpoint."""
    # Without a readable manifest nothing else can be checked.
    try:
        manifest = read_manifest(path)
        if problems := faults(path, manifest):
            return problems
        return content_faults(Checkpoint(path, manifest))
    except CheckpointError as error:
        return [str(error)]


def print_faults(path: Path, *, as_json: bool) -> int:
    """Print the faults of a checkpoint; return 1 if there are any."""
    path = find(path)
    problems = all_faults(path)
    if as_json:
        print(json.dumps({"path": str(path), "valid": not problems, "faults": problems}))
    else:
        print(escape_unprintable("\n".join(problems)) if problems else f"{path}: complete")
    return 1 if problems else 0


def print_differences(first: Path, second: Path, *, as_json: bool) -> int:
    """Print the differences of two checkpoints; return 1 if there are any."""
    # Verify both first, so that a damaged file is not reported as a difference.
    a, b = (open_checkpoint(find(path)) for path in (first, second))
    tensors = list(tensor_differences(a, b))
    state = state_differences(a.state, b.state)
    same = not tensors and not state
    origins = {side: opened.state.get(ORIGIN, {}) for side, opened in (("a", a), ("b", b))}
    if as_json:
        figures = {"a": str(a.path), "b": str(b.path), "same": same, ORIGIN: origins}
        differing = [difference._asdict() for difference in tensors]
        print(json.dumps({**figures, "tensors": differing, "state": state}))
        return 0 if same else 1

    # One line for each side and each difference.
    for side, opened in (("a", a), ("b", b)):
        line = (
            f"{side}: {opened.path}, step {opened.step}, written by {_format_values(origins[side])}"
        )
        print(escape_unprintable(line))
    for difference in tensors:
        print(escape_unprintable(difference.line()))
    for entry in state:
        values = (json.dumps(entry[side]) if side in entry else "missing" for side in "ab")
        print(escape_unprintable(f"state {entry['key']}: {' | '.join(values)}"))
    counts = f"{len(tensors)} tensors and {len(state)} entries of the state differ"
    print("bit-equal" if same else counts)
    return 0 if same else 1
