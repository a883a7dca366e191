"""List the files of a source with their captions, and the skipped files with the reasons."""

import codecs
from pathlib import Path
from typing import NamedTuple

from echolab.errors import ConfigError, MediaError, RetryableError

CAPTION_CHARACTERS = 2000
# Byte order marks, the longest first, since the UTF-32 mark begins with the UTF-16 mark.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Node = tuple[int, int]  # device and inode: equal for all paths to the same folder


class Listing(NamedTuple):
    """The content of a source."""

    files: list[tuple[Path, str]]  # (path, name); the name is the path relative to the source
    left_out: list[tuple[str, str]]  # (name, reason) of each skipped file or folder


def list_source(source: Path, out: Path) -> Listing:
    """List the files of a source in order of name; follow linked folders, and stop at loops.

    Skip the folder `out` and the caption files of videos.  Raise ConfigError or MediaError if
    there is nothing to list, RetryableError if a folder cannot be read.
    """
    # Listing is cheap and comes first, so that a wrong source is refused before models are loaded.
    if source.is_file():
        return Listing([(source, _printable(Path(source.name)))], [])
    if source.resolve() == out.resolve():
        raise ConfigError(f"out={out}: is the source itself; give another folder")
    if not source.is_dir():
        raise MediaError(f"{source}: not there; give a video or a folder of videos")

    # Visit each folder once, by device and inode.
    paths, left_out = list[Path](), list[tuple[Path, str]]()
    seen: dict[Node, Path] = {_inode(out): out} if out.is_dir() else {}
    folders, links = [source], list[Path]()
    while folders or links:
        # Visit links last, so that a folder reached by two paths is listed under its real path.
        folder = folders.pop() if folders else links.pop(0)
        before = seen.setdefault(_inode(folder), folder)
        if before is not folder:
            if before is not out:
                left_out.append((folder, f"linked folder: it is read as {_printable(before)}"))
            continue
        inside, names = _list_folder(folder, left_out)
        paths += names
        for path in inside:
            (links if path.is_symlink() else folders).append(path)

    # Sort by name; refuse a source without files.
    files = [(path, _printable(path.relative_to(source))) for path in paths]
    files.sort(key=lambda file: (Path(file[1]).parent.parts, file[1]))
    rows = sorted((_printable(path.relative_to(source)), reason) for path, reason in left_out)
    if not files:
        more = f" that can be read ({rows[0][0]}: {rows[0][1]})" if rows else ""
        raise MediaError(f"{source}: holds no files{more}; give a video or a folder of videos")
    return Listing(files, rows)


def _list_folder(folder: Path, left_out: list[tuple[Path, str]]) -> tuple[list[Path], list[Path]]:
    """Return the folders and files in a folder; add skipped entries to `left_out`."""
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
            left_out.append((path, f"not there: a link to {_printable(path.readlink())}"))
        elif path.is_dir() and path.is_symlink() and path.resolve() in folder.resolve().parents:
            left_out.append((path, "linked folder: a loop, it leads back to a folder above it"))
        elif path.is_dir():
            folders.append(path)
        elif path.is_file():
            files.append(path)
        else:
            left_out.append((path, "no file: a pipe, a socket or a device"))
    # A .txt with the stem of a video is its caption, not a source file.
    stems = {path.stem for path in files if path.suffix != ".txt"}
    return folders, [path for path in files if path.suffix != ".txt" or path.stem not in stems]


def _inode(folder: Path) -> Node:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _printable(path: Path) -> str:
    """Return a path as text with non-Unicode bytes escaped, so that names remain distinct."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def caption_of(template: str, video: Path, source: Path) -> str:
    """Return the caption of a video: that of the .txt with its stem if it exists, else `template`.

    {stem} and {folder} in the template are replaced by the names of the file and of its folder.
    Raise MediaError for an unusable caption file, RetryableError for an unreadable one.
    """
    # Use the template if the video has no caption file.
    text = video.with_suffix(".txt")
    if not text.is_symlink() and not text.exists():
        return template.replace("{stem}", _printable(Path(video.stem))).replace(
            "{folder}", _printable(Path(video.parent.name))
        )
    root = source if source.is_dir() else source.parent
    if text.is_symlink() and not text.resolve().is_relative_to(root.resolve()):
        raise MediaError(
            f"caption: {_printable(Path(text.name))} is a link out of the source; put a copy there"
        )
    try:
        data = text.read_bytes()
    except OSError as error:
        raise RetryableError(
            f"{text}: the caption cannot be read ({error.strerror}); make it readable, and give "
            "the same command again"
        ) from error
    return _decode_caption(data, _printable(Path(text.name)))


def _decode_caption(data: bytes, name: str) -> str:
    """Return a caption in one line, decoded as UTF-8 or by its byte order mark.

    Raise MediaError for bytes that are not text, and for a caption that is empty or too long.
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
