"""Read the members of a sample and check their structure: bytes, arrays, and the shapes of tensors.

A clip of 81 frames has about 30 MB, mostly known latents of tasks other than the sampled task.
Members are read in chunks into a reused buffer: the data stay in the CPU caches, while a single
large read would go through main memory for the checksum and again for each tensor.  Nothing is
unpickled.

Verification, training and validation check the same shapes:

    encoded      latents [C, F, H, W]; for each task but t2v known.<task>, known_latents.<task>
    preference   chosen, rejected, known_latents [C, F, H, W]; known
    both         text [L, D], image [N, D], face [P], weight [1, F, H, W], known [S, F, H, W],
                 audio [2 T, D], or Flash's [T, layers, D]

F latent frames correspond to T = S (F - 1) + 1 video frames, and each has P = (H / p) (W / p)
tokens; time stride S and patch p come from the dataset's geometry, 4 and 2 for Wan.  Batches are
stacked, so all samples of a dataset must have the same shapes.  `collate.take_sample` checks
values.
"""

import io
import json
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from isal import isal_zlib

from echolab.geometry import WAN, LatentGeometry

CHUNK = 2**20  # bytes
MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
MAX_ARRAY_BYTES = 2**28  # maximum unpacked size of an npz file
MAX_PIXELS = 2**27  # per image or video frame: four times 8K
MAX_AUDIO_VALUES = 2**28  # 4.6 hours of one channel at 16 kHz
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

Read = Callable[[int, int], bytes]  # (offset within the member, size)
Header = Mapping[str, tuple[str, list[int], int, int]]  # name -> dtype, shape, begin, end

CONDITIONS = ("text", "image", "audio", "face", "weight")
TENSORS = {
    "encoded": ("latents", *CONDITIONS),
    "preference": ("chosen", "rejected", "known", "known_latents", *CONDITIONS),
}
TRIED, COMPARED = 100, 3  # read at most TRIED samples until COMPARED good samples were read

Shapes = Mapping[str, Sequence[int]]


class MemberError(ValueError):
    """The content of a member is wrong."""


class MemberReader:
    """Reads `size` bytes of an open file from `offset` on, and computes their crc32."""

    def __init__(self, file: int, offset: int, size: int) -> None:
        self.size, self.crc32, self.position = size, 0, 0
        self._file, self._offset = file, offset
        # Read a small member in one system call, a large member chunk by chunk.
        self._memory = np.empty(min(size, CHUNK), np.uint8)
        self._small = self._read(0, size) if size <= CHUNK else None

    def take(self, size: int) -> np.ndarray:
        """Return the next bytes, uint8 [size], fewer at the end; the next call overwrites them."""
        size = min(size, self.size - self.position)
        if self._small is None:
            chunk = self._read(self.position, size)
        else:
            chunk = self._small[self.position : self.position + size]
        self.position += len(chunk)
        self.crc32 = isal_zlib.crc32(chunk, self.crc32)
        return chunk

    def _read(self, start: int, size: int) -> np.ndarray:
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        # One call reads at most 2 GiB, and some file systems return less.
        chunk, filled = self._memory[:size], 0
        while filled < size:
            position = self._offset + start + filled
            count = os.preadv(self._file, [chunk[filled:].data], position)
            if not count:
                break  # the file is truncated
            filled += count
        return chunk[:filled]

    def at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from an offset within the member; keep the position."""
        return os.pread(self._file, size, self._offset + offset)

    def rest(self) -> bytes:
        """Return a copy of the remaining bytes; fewer if the file ends."""
        if self._small is not None:
            return self.take(self.size).tobytes()
        data, end, start = b"", self.size - self.position, self._offset + self.position
        while more := os.pread(self._file, end - len(data), start + len(data)):
            data = data + more if data else more
        self.position += len(data)
        self.crc32 = isal_zlib.crc32(data, self.crc32)
        return data

    def skip(self, size: int) -> None:
        """Skip `size` bytes, but include them in the checksum."""
        end = self.position + size
        while self.position < end and len(self.take(min(CHUNK, end - self.position))):
            pass


def read_header(member: MemberReader) -> Header:
    """Return the header of a safetensors member at its start; raise MemberError."""
    return parse_header(lambda _, size: member.take(size).tobytes(), member.size)


def parse_header(read: Read, size: int) -> Header:
    """Return name -> (dtype, shape, begin, end) of a safetensors member, bytes from its start.

    Raise MemberError unless header and tensors fill the member exactly.
    """
    # Check the length first: a damaged length could allocate too much memory.
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else -1
    if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise MemberError(f"a safetensors header of {length} bytes in a member of {size}")
    header = parse_json(read(8, length))
    if not isinstance(header, dict):
        raise MemberError("the safetensors header is not a JSON object")
    tensors = {k: _parse_tensor(k, v, 8 + length) for k, v in header.items() if k != "__metadata__"}
    # Allow no gaps and no overlaps: each tensor begins where the previous tensor ends.
    position = 8 + length
    for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise MemberError(f"tensor {name} begins at byte {begin}, not at {position}")
        position = end
    if position != size:
        raise MemberError(f"tensors end at byte {position} of {size}")
    return tensors


def _parse_tensor(name: str, entry: Any, start: int) -> tuple[str, list[int], int, int]:
    try:
        # Sizes and offsets must be nonnegative integers, which JSON does not guarantee.
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        are_sizes = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        bits = BITS[dtype] * math.prod(shape) if are_sizes else -1
    except (TypeError, ValueError, KeyError) as error:
        raise MemberError(f"tensor {name}: {type(error).__name__}: {error}") from error
    if bits != 8 * (end - begin):
        raise MemberError(f"tensor {name}: {dtype} {shape} in bytes {begin} to {end}")
    return dtype, shape, start + begin, start + end


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text; raise MemberError."""
    try:
        return json.loads(data)
    except ValueError as error:  # includes UnicodeDecodeError
        raise MemberError(f"{type(error).__name__}: {error}") from error


def read_array(data: bytes) -> np.ndarray:
    """Return the array of an npy file; raise MemberError unless its size fits its header."""
    # Compare sizes before numpy allocates the array.
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file, max_header_size=1000)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
            raise MemberError(f"an array {shape} of {dtype} in {len(data)} bytes")
        return np.load(io.BytesIO(data), allow_pickle=False, max_header_size=1000)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, RecursionError) as error:
        raise MemberError(first_line(error)) from error


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file by name, at most `MAX_ARRAY_BYTES`; raise MemberError."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            # zipfile never unpacks more bytes of a file than its directory lists.
            unpacked = sum(info.file_size for info in file.infolist())
            if unpacked > MAX_ARRAY_BYTES:
                raise MemberError(f"arrays of {unpacked} bytes, at most {MAX_ARRAY_BYTES} are read")
            return {n.removesuffix(".npy"): read_array(file.read(n)) for n in file.namelist()}
    except (
        OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error,
        lzma.LZMAError,
    ) as error:  # fmt: skip
        raise MemberError(first_line(error)) from error


def read_flac(data: bytes) -> np.ndarray:
    """Return audio samples [n] or [n, channels], float32; raise MemberError.

    Read at most `MAX_AUDIO_VALUES` values, since a few bytes of FLAC can decode to hours.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not 0 <= file.frames * file.channels <= MAX_AUDIO_VALUES:
                raise MemberError(f"{file.frames} samples, at most {MAX_AUDIO_VALUES} are read")
            samples: np.ndarray = file.read(dtype="float32")
            return samples
    except soundfile.LibsndfileError as error:
        raise MemberError(error.error_string) from error
    except RuntimeError as error:
        raise MemberError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).split("\n")[0] or type(error).__name__


# Shapes


def shapes_of(
    member: MemberReader, kind: str, geometry: LatentGeometry = WAN
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a sample's tensors by name; raise MemberError if they do not fit."""
    shapes = {name: tuple(shape) for name, (_, shape, _, _) in read_header(member).items()}
    check_shapes(kind, shapes, geometry)
    return shapes


def most_common_shapes(shapes: Sequence[Shapes]) -> Shapes:
    """Return the most common shapes of some samples; in a tie, the first."""
    # Count JSON texts, since dictionaries are not hashable.
    texts = Counter(json.dumps({name: list(shape) for name, shape in s.items()}) for s in shapes)
    return dict(json.loads(texts.most_common(1)[0][0])) if texts else {}


def read_metadata(member: MemberReader) -> dict[str, Any]:
    """Return a sample's json member; raise MemberError unless it is an object."""
    try:
        metadata = json.loads(member.rest())
    except (ValueError, RecursionError) as error:
        raise MemberError(f"json: {error}") from error
    if not isinstance(metadata, dict):
        raise MemberError("json: not an object")
    return metadata


def check_shapes(kind: str, shapes: Shapes, geometry: LatentGeometry = WAN) -> None:
    """Raise MemberError unless a sample of this kind has all tensors, with consistent shapes.

    Samples of other kinds may hold anything.
    """
    # Check that all tensors of the kind exist.
    for name in TENSORS.get(kind, ()):
        if name not in shapes:
            raise MemberError(f"no tensor {name!r}")
    if kind not in TENSORS:
        return
    # Check the latents, which determine other shapes.
    main = "latents" if kind == "encoded" else "chosen"
    latents = tuple(shapes[main])
    patch = geometry.patch
    if len(latents) != 4 or min(latents) < 1 or latents[2] % patch or latents[3] % patch:
        raise MemberError(
            f"tensor {main} {list(latents)}: must be [C, F, H, W], H and W multiples of {patch}"
        )
    for name, expected in _expected_shapes(kind, latents, shapes, geometry):
        if name not in shapes:
            raise MemberError(f"no tensor {name!r}")
        if tuple(shapes[name]) != expected:
            raise MemberError(
                f"tensor {name} {list(shapes[name])}: must be {list(expected)} for {main} "
                f"{list(latents)}"
            )
    # Check the features of the encoders.
    for name in ("text", "image"):
        if len(shapes[name]) != 2 or min(shapes[name]) < 1:
            raise MemberError(f"tensor {name} {list(shapes[name])}: must be [tokens, width]")
    _check_audio(shapes["audio"], geometry.frames(latents[1]), main, latents)


def _expected_shapes(
    kind: str, latents: tuple[int, ...], names: Collection[str], geometry: LatentGeometry
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, expected shape) of each tensor whose shape depends on the latents."""
    positions, mask_channels = latents[1:], geometry.time_stride
    yield "face", (geometry.tokens(*positions[1:]),)
    yield "weight", (1, *positions)
    if kind == "preference":
        yield "rejected", latents
        yield "known", (mask_channels, *positions)
        yield "known_latents", latents
    if "lips" in names:
        yield "lips", (1, *positions)
    # A dataset may lack known latents of tasks that were added after it was encoded.
    tasks = {name.partition(".")[2] for name in names if name.startswith(("known.", "known_lat"))}
    for task in sorted(tasks - {""}):
        yield f"known.{task}", (mask_channels, *positions)
        yield f"known_latents.{task}", latents


def _check_audio(shape: Sequence[int], frames: int, main: str, latents: tuple[int, ...]) -> None:
    # Two tokens per frame, or all encoder layers for each frame.
    is_two_tokens = len(shape) == 2 and shape[0] == 2 * frames
    is_layered = len(shape) == 3 and shape[0] == frames
    if not (is_two_tokens or is_layered) or min(shape) < 1:
        raise MemberError(
            f"tensor audio {list(shape)}: must be [{2 * frames}, width], or [{frames}, layers, "
            f"width] for Flash, for the {frames} video frames of {main} {list(latents)}"
        )


def check_same_shapes(shapes: Shapes, common: Shapes) -> None:
    """Raise MemberError if a tensor's shape differs from that in the dataset's other samples."""
    for name in sorted(set(shapes) & set(common)):
        if tuple(shapes[name]) != tuple(common[name]):
            raise MemberError(
                f"tensor {name} {list(shapes[name])}, in other samples {list(common[name])}: "
                "clips of different sizes are different datasets"
            )
