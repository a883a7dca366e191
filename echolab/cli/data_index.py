"""`echolab data index FOLDER`: dataset.json for plain WebDataset tars of any writer."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from echolab.arguments import parse
from echolab.data.index import INDEX
from echolab.data.index_tars import Indexed, index_folder
from echolab.errors import DataError
from echolab.geometry import WAN, LatentGeometry
from echolab.progress import progress

LISTED = 3  # names shown of what was left out


@dataclass(frozen=True)
class IndexArguments:
    """Read every tar of a folder once and write dataset.json beside them.

    The tars are never changed.  Tars that keep the contract of raw, encoded or preference samples
    can then be trained on; others become kind foreign.
    """

    folder: Path = field(metadata={"help": "where the tars lie"})
    kind: Literal["raw", "encoded", "preference", "foreign"] | None = field(
        default=None, metadata={"help": "refuse any other; none finds it from the members"}
    )
    members: tuple[str, ...] = field(
        default=(), metadata={"help": "members whose names have a dot, such as seg.png,depth.npy"}
    )
    about: Path | None = field(
        default=None,
        metadata={
            "help": "JSON with `encoders`, `geometry` and `description`, such as a dataset.json"
        },
    )
    replace: bool = field(default=False, metadata={"help": "a dataset.json that differs"})
    workers: int | None = field(default=None, metadata={"help": "processes; none is one a core"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def main(argv: list[str]) -> int:
    """Index, and say what was found."""
    command = "echolab data index"
    arguments = parse(IndexArguments, argv, command=command, positional=("folder",))
    encoders, geometry, description = told(arguments.about)
    tars = sum(1 for _ in arguments.folder.glob("*.tar"))
    with progress("indexing shards", tars) as advance:
        found = index_folder(
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
        print(json.dumps(summary(arguments.folder, found)))
    else:
        print(in_words(arguments.folder, found))
    return 0


def told(about: Path | None) -> tuple[dict[str, str], LatentGeometry, dict[str, Any]]:
    """Return encoders' fingerprints, geometry and description of a JSON file; raise DataError."""
    if about is None:
        return {}, WAN, {}
    try:
        content = json.loads(about.read_bytes())
        encoders, description = content.get("encoders", {}), content.get("description", {})
        named = all(isinstance(name, str) for name in encoders.values())
        if not named or not isinstance(description, dict):
            raise ValueError("encoders are name to fingerprint, description is an object")
        geometry = WAN._replace(**content.get("geometry", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"about={about}: cannot be read ({error}); give a dataset.json") from error
    return encoders, geometry, description


def summary(folder: Path, found: Indexed) -> dict[str, Any]:
    """What was found, for programs."""
    index = found.content
    return {
        "folder": str(folder),
        "kind": index["kind"],
        "fingerprint": index["fingerprint"],
        "shards": len(index["shards"]),
        "samples": len(index["samples"]),
        "bytes": sum(shard["bytes"] for shard in index["shards"]),
        "written": found.written,
        "left_out": found.left_out,
        "not_of_kind": found.misfits,
    }


def in_words(folder: Path, found: Indexed) -> str:
    """What was found, for people."""
    told = summary(folder, found)
    state = "written" if found.written else "was there already, and equal"
    size = f"{told['samples']} samples in {told['shards']} shards, {told['bytes'] / 1e6:.6g} MB"
    lines = [f"{folder / INDEX}: {state}; kind {told['kind']}, {size}"]
    if told["kind"] == "foreign":
        lines += [f"not {kind}: {why}" for kind, why in found.misfits.items()]
    if found.left_out:
        names = ", ".join(map(repr, found.left_out[:LISTED]))
        lines.append(f"{len(found.left_out)} files are part of no sample: {names}")
    return "\n".join(lines)
