"""`echolab data verify|index|audit`: check datasets, and the samples that a run trained on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from echolab.arguments import Action, argument, parse, run_action
from echolab.errors import DataError
from echolab.geometry import WAN, LatentGeometry
from echolab.progress import progress

if TYPE_CHECKING:
    from echolab.data.index_tars import Indexed

SHOWN = 3  # names that are printed of files that belong to no sample


@dataclass(frozen=True)
class VerifyArguments:
    """Check every shard of a dataset against dataset.json; print one line per fault.

    The exit code is 1 if there is any fault.
    """

    folder: Path = argument("dataset folder")
    deep: bool = argument("also decode all members, and check shapes and values", False)
    workers: int | None = argument("processes", None, ge=1, default_text="one per core")
    format: Literal["text", "json"] = argument("output format", "text")


@dataclass(frozen=True)
class IndexArguments:
    """Read every tar of a folder once and write dataset.json to the folder.

    The tars are not changed.  Datasets with the members of raw, encoded or preference samples can
    then be used for training; all others get the kind foreign.
    """

    folder: Path = argument("folder of the tars")
    kind: Literal["raw", "encoded", "preference", "foreign"] | None = argument(
        "refuse any other kind", None, default_text="detected from the members"
    )
    members: tuple[str, ...] = argument(
        "members whose names have a dot, such as seg.png,depth.npy", ()
    )
    about: Path | None = argument(
        "JSON file with `encoders`, `geometry` and `description`, such as a dataset.json", None
    )
    replace: bool = argument("replace a dataset.json that differs", False)
    workers: int | None = argument("processes", None, ge=1, default_text="one per core")
    format: Literal["text", "json"] = argument("output format", "text")


@dataclass(frozen=True)
class AuditArguments:
    """Check a run's ledger against its datasets: each sample exactly once per epoch.

    Print one line per fault; the exit code is 1 if there is any.  The run must have been trained
    with data.log_samples=true.  Steps that a later attempt repeated after a resume count once.
    Batches that the run skipped, by its events.jsonl, may be missing.
    """

    run: Path = argument("run folder", aka=("run_dir",))
    format: Literal["text", "json"] = argument("output format", "text")


# Each action parses its arguments before it imports the modules that read shards.
ACTIONS = {
    "verify": Action("echolab.cli.data:verify", "check a dataset against its dataset.json"),
    "index": Action(
        "echolab.cli.data:index", "write dataset.json for WebDataset tars of any writer"
    ),
    "audit": Action(
        "echolab.cli.data:audit", "check that a run trained on each sample once an epoch"
    ),
}


def main(argv: list[str]) -> int:
    """Run one action."""
    return run_action(argv, ACTIONS, command="echolab data")


def verify(argv: list[str]) -> int:
    """Print every fault of a dataset."""
    command = "echolab data verify"
    arguments = parse(VerifyArguments, argv, command=command, positional=("folder",))
    from echolab.data.verify import find_faults

    # Read the shards in parallel, with a bar.
    folder = arguments.folder
    shards = sum(1 for _ in folder.glob("*.tar"))
    with progress("checking shards", shards) as advance:
        faults = find_faults(
            folder, workers=arguments.workers, deep=arguments.deep, advance=advance
        )
    # Print one line per fault; the exit code is 1 if there is any.
    lines = [fault.line(folder) for fault in faults]
    if arguments.format == "json":
        details = [fault._asdict() for fault in faults]
        print(json.dumps({"folder": str(folder), "faults": lines, "details": details}))
    else:
        print("\n".join(lines) if lines else f"{folder}: complete")
    return 1 if faults else 0


def index(argv: list[str]) -> int:
    """Write dataset.json and print a summary of it."""
    command = "echolab data index"
    arguments = parse(IndexArguments, argv, command=command, positional=("folder",))
    # Refuse an invalid description file before the tars are read.
    encoders, geometry, description = read_about(arguments.about)
    from echolab.data.index_tars import index_folder

    # Read every tar once.
    tars = sum(1 for _ in arguments.folder.glob("*.tar"))
    with progress("indexing shards", tars) as advance:
        indexed = index_folder(
            arguments.folder,
            kind=arguments.kind,
            compounds=frozenset(member.lower() for member in arguments.members),
            encoders=encoders,
            geometry=geometry,
            description=description,
            replace=arguments.replace,
            workers=arguments.workers,
            advance=advance,
        )
    if arguments.format == "json":
        print(json.dumps(summary(arguments.folder, indexed)))
    else:
        print(summary_text(arguments.folder, indexed))
    return 0


def read_about(about: Path | None) -> tuple[dict[str, str], LatentGeometry, dict[str, Any]]:
    """Read fingerprints of encoders, geometry and description from JSON; raise DataError."""
    # The defaults are the geometry of Wan, and no encoders.
    if about is None:
        return {}, WAN, {}
    # The file may be a dataset.json, or a file of the user with some of its keys.
    try:
        content = json.loads(about.read_bytes())
        encoders, description = content.get("encoders", {}), content.get("description", {})
        # Fingerprints are text; other values would match no encoder.
        named = all(isinstance(name, str) for name in encoders.values())
        if not named or not isinstance(description, dict):
            raise ValueError("encoders are name to fingerprint, description is an object")
        geometry = WAN._replace(**content.get("geometry", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"about={about}: cannot be read ({error}); give a dataset.json") from error
    return encoders, geometry, description


def summary(folder: Path, indexed: "Indexed") -> dict[str, Any]:
    """Return the result of indexing as figures."""
    content = indexed.content
    return {
        "folder": str(folder),
        "kind": content["kind"],
        "fingerprint": content["fingerprint"],
        "shards": len(content["shards"]),
        "samples": len(content["samples"]),
        "bytes": sum(shard["bytes"] for shard in content["shards"]),
        "written": indexed.written,
        "left_out": indexed.ignored,
        "not_of_kind": indexed.misfits,
    }


def summary_text(folder: Path, indexed: "Indexed") -> str:
    """Return the result of indexing as text."""
    figures = summary(folder, indexed)
    # State, kind and size in the first line.
    state = "written" if indexed.written else "was there already, and equal"
    size = f"{figures['samples']} samples in {figures['shards']} shards"
    size += f", {figures['bytes'] / 1e6:.6g} MB"
    lines = [f"{folder / 'dataset.json'}: {state}; kind {figures['kind']}, {size}"]
    if figures["kind"] == "foreign":
        lines += [f"not {kind}: {reason}" for kind, reason in indexed.misfits.items()]
    if indexed.ignored:
        names = ", ".join(map(repr, indexed.ignored[:SHOWN]))
        lines.append(f"{len(indexed.ignored)} files are part of no sample: {names}")
    return "\n".join(lines)


def audit(argv: list[str]) -> int:
    """Print which keys are missing, doubled or foreign."""
    arguments = parse(AuditArguments, argv, command="echolab data audit", positional=("run",))
    from echolab.data.ledger import LEDGER, audit_run

    # Refuse a run without a ledger before torch is imported.
    if not (folder := arguments.run / LEDGER).is_dir():
        raise DataError(f"{folder}: holds no ledger; a run with data.log_samples=true writes one")
    from echolab.training.guards import events

    # Batches that the run skipped, by its events.jsonl, may be missing.
    result = audit_run(arguments.run, events.skips(arguments.run))
    if arguments.format == "json":
        figures = {"run": str(arguments.run), "exact": result.exact, **result._asdict()}
        for name in ("missing", "doubled", "unknown"):
            figures[name] = [finding._asdict() for finding in figures[name]]
        print(json.dumps(figures))
    elif result.exact:
        print(
            f"{arguments.run}: {result.steps} steps in {result.attempts} attempts, "
            f"{result.samples} samples: each exactly once an epoch"
            + (f", except {result.quarantined} bad ones" if result.quarantined else "")
            + (f"; {result.skipped} of skipped batches left out" if result.skipped else "")
        )
    else:
        print("\n".join(result.lines()))
    return 0 if result.exact else 1
