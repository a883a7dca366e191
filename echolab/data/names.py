"""Names inside tars that others wrote: how they fall into keys and members."""

import re

from echolab.data.index import KEY, MEMBERS

# Any writer's: a plain file name, not hidden.
SHARD_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.,+=-]*\.tar")
PARTIAL = "index.partial"  # what an index that was stopped or refused knows of the tars
META = re.compile(r"__[^/]*__($|/)")  # webdataset keeps these for itself


def split_file(name: str) -> tuple[str, str] | None:
    """`train/clip_1.seg.PNG` -> (`train/clip_1`, `seg.png`), as webdataset splits.

    None for what is part of no sample: folders, names without a dot or with one in front, and
    what webdataset keeps for itself.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, member = base.partition(".")
    if META.match(name) or not (stem and dot and member):
        return None
    return f"{folder}{slash}{stem}", member.lower()


def key_fault(kind: str, key: str) -> str | None:
    """Why a key cannot be one of a dataset of this kind; None where it can."""
    if kind != "foreign":
        return None if KEY.fullmatch(key) else "use 1 to 80 letters, digits, _ or -, without dots"
    base = key.rpartition("/")[2]
    if not base or "." in base or not key.isprintable():
        return "a key has no dots, and nothing that cannot be printed"
    if key.startswith("/") or ".." in key.split("/"):
        return "a key is a relative path without .."
    return None


def dotted(member: str, known: frozenset[str] = frozenset(MEMBERS)) -> bool:
    """Whether a member looks like the tail of a key with dots: `v1.mp4` of `clip.v1.mp4`."""
    return "." in member and member not in known
