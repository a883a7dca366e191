"""List the files of a source with their captions, and what is left out, with the reason."""

import codecs
from pathlib import Path
from typing import NamedTuple

from echolab.errors import ConfigError, MediaError, RetryableError

CAPTION_CHARACTERS = 2000
# Byte order marks, the longest first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Node = tuple[int, int]  # device and inode: the same for all names of a folder


class Listing(NamedTuple):
    """The content of a source."""

    files: list[tuple[Path, str]]  # each with its name: the path within the source
    left_out: list[tuple[str, str]]  # names and reasons


def list_source(source: Path, out: Path) -> Listing:
    """Return the files of a source in order; linked folders are followed, and loops end.

    OUT is skipped silently, and captions belong to their videos.  Raise ConfigError or MediaError
    if there is nothing to list, RetryableError if a folder cannot be read.
    """
    # A list of files is cheap, so that a wrong source is refused before a model is loaded.
    if source.is_file():
        return Listing([(source, _shown(Path(source.name)))], [])
    if source.resolve() == out.resolve():
        raise ConfigError(f"out={out}: is the source itself; give another folder")
    if not source.is_dir():
        raise MediaError(f"{source}: not there; give a video or a folder of videos")

    # Visit each folder once, by device and inode.
    paths, left_out = list[Path](), list[tuple[Path, str]]()
    seen: dict[Node, Path] = {_node(out): out} if out.is_dir() else {}
    folders, links = [source], list[Path]()
    while folders or links:
        # Links last, so that a folder that is reached twice is listed under its real name.
        folder = folders.pop() if folders else links.pop(0)
        before = seen.setdefault(_node(folder), folder)
        if before is not folder:
            if before is not out:
                left_out.append((folder, f"linked folder: it is read as {_shown(before)}"))
            continue
        inside, names = _entries(folder, left_out)
        paths += names
        for path in inside:
            (links if path.is_symlink() else folders).append(path)

    # Sort by name; refuse a source without files.
    files = [(path, _shown(path.relative_to(source))) for path in paths]
    files.sort(key=lambda file: (Path(file[1]).parent.parts, file[1]))
    rows = sorted((_shown(path.relative_to(source)), reason) for path, reason in left_out)
    if not files:
        more = f" that can be read ({rows[0][0]}: {rows[0][1]})" if rows else ""
        raise MediaError(f"{source}: holds no files{more}; give a video or a folder of videos")
    return Listing(files, rows)


def _entries(folder: Path, left_out: list[tuple[Path, str]]) -> tuple[list[Path], list[Path]]:
    """Return the folders and the files in a folder; add what is neither to `left_out`."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise RetryableError(
            f"{folder}: cannot be listed ({error.strerror}); make it readable, and give the same "
            "command again"
        ) from error
    folders, files = list[Path](), list[Path]()
    for path in paths:
        if path.name.startswith("."):
            left_out.append((path, "hidden: its name begins with a dot"))
        elif path.is_symlink() and not path.exists():
            left_out.append((path, f"not there: a link to {_shown(path.readlink())}"))
        elif path.is_dir() and path.is_symlink() and path.resolve() in folder.resolve().parents:
            left_out.append((path, "linked folder: a loop, it leads back to a folder above it"))
        elif path.is_dir():
            folders.append(path)
        elif path.is_file():
            files.append(path)
        else:
            left_out.append((path, "no file: a pipe, a socket or a device"))
    # A text with the stem of a video is its caption, and no source of its own.
    stems = {path.stem for path in files if path.suffix != ".txt"}
    return folders, [path for path in files if path.suffix != ".txt" or path.stem not in stems]


def _node(folder: Path) -> Node:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _shown(path: Path) -> str:
    """Return a path as text with bytes that are no Unicode escaped, so that names stay distinct."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def caption_of(template: str, video: Path, source: Path) -> str:
    """Return the caption of a video: the text file of its stem if there is one, else the template.

    In the template {stem} and {folder} stand for the names of the file and of its folder.  Raise
    MediaError for a text that cannot be used, RetryableError for one that cannot be read.
    """
    # The caption of a video is a text file of its stem; without one the template is used.
    text = video.with_suffix(".txt")
    if not text.is_symlink() and not text.exists():
        return template.replace("{stem}", _shown(Path(video.stem))).replace(
            "{folder}", _shown(Path(video.parent.name))
        )
    root = source if source.is_dir() else source.parent
    if text.is_symlink() and not text.resolve().is_relative_to(root.resolve()):
        raise MediaError(
            f"caption: {_shown(Path(text.name))} is a link out of the source; put a copy there"
        )
    try:
        data = text.read_bytes()
    except OSError as error:
        raise RetryableError(
            f"{text}: the caption cannot be read ({error.strerror}); make it readable, and give "
            "the same command again"
        ) from error
    return _decoded(data, _shown(Path(text.name)))


def _decoded(data: bytes, name: str) -> str:
    """Return a caption in one line, decoded as UTF-8 or by its byte order mark.

    Raise MediaError for bytes that are no text, and for an empty or too long caption.
    """
    encoding = next((codec for mark, codec in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise MediaError(
            f"caption: {name} is not {encoding.removesuffix('-sig').upper()} (byte {error.start}); "
            "save it as UTF-8"
        ) from error
    caption = " ".join(text.split())
    if "\0" in caption:
        raise MediaError(f"caption: {name} holds zeros, as UTF-16 without a mark; save it as UTF-8")
    if not caption:
        raise MediaError(f"caption: {name} is empty; write one, or remove it for caption=")
    if len(caption) > CAPTION_CHARACTERS:
        raise MediaError(
            f"caption: {name} has {len(caption)} characters, at most {CAPTION_CHARACTERS} are "
            "used; shorten it"
        )
    return caption
