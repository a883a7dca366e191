"""Can a member be decoded?  Strictly, in pure Python: nothing is unpickled, nothing is guessed.

Structure alone by default: JSON parses, a safetensors header accounts for every byte, arrays load.
Deep: videos, sounds and pictures are decoded, and tensors hold finite numbers.
"""

import io
import json
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Read = Callable[[int, int], bytes]  # (offset within the member, size)

LONGEST_HEADER = 100 * 10**6  # bytes, as safetensors has it
LARGEST_ARRAYS = 2**28  # bytes unpacked
LARGEST_PICTURE = 2**27  # pixels: four times 8K
LONGEST_SOUND = 2**28  # values: of one channel at 16 kHz, 4.6 hours
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class Undecodable(ValueError):
    """What is wrong with the content of a member."""


def content_fault(member: str, read: Read, size: int, *, deep: bool = False) -> str | None:
    """Why a member of `size` bytes cannot be decoded; None where it can, or nobody knows how."""
    suffix = member.rpartition(".")[2]
    try:
        if suffix == "safetensors":
            check_safetensors(read, size, deep=deep)
        elif suffix in STRUCTURED:
            STRUCTURED[suffix](read(0, size))
        elif deep and suffix in DEEP:
            DEEP[suffix](read(0, size))
    except Undecodable as error:
        return f"cannot be decoded ({error})"
    except RecursionError:
        return "cannot be decoded (nested too deeply)"
    return None


def tensor_header(read: Read, size: int) -> dict[str, tuple[str, list[int], int, int]]:
    """name -> (dtype, shape, begin, end) of a safetensors member, bytes counted from its start.

    Raises Undecodable unless header and tensors fill the member exactly.
    """
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else -1
    if not 0 < length <= min(size - 8, LONGEST_HEADER):
        raise Undecodable(f"a safetensors header of {length} bytes in {size}")
    header = _json(read(8, length))
    if not isinstance(header, dict):
        raise Undecodable("the safetensors header is no object")
    found = {k: _tensor(k, v, 8 + length) for k, v in header.items() if k != "__metadata__"}
    position = 8 + length
    for name, (_, _, begin, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise Undecodable(f"tensor {name} begins at byte {begin}, not at {position}")
        position = end
    if position != size:
        raise Undecodable(f"tensors end at byte {position} of {size}")
    return found


def _tensor(name: str, about: Any, start: int) -> tuple[str, list[int], int, int]:
    try:
        dtype, shape, (begin, end) = about["dtype"], about["shape"], about["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        bits = BITS[dtype] * math.prod(shape) if whole else -1
    except (TypeError, ValueError, KeyError) as error:
        raise Undecodable(f"tensor {name}: {type(error).__name__}: {error}") from error
    if bits != 8 * (end - begin):
        raise Undecodable(f"tensor {name}: {dtype} {shape} in bytes {begin} to {end}")
    return dtype, shape, start + begin, start + end


def check_safetensors(read: Read, size: int, *, deep: bool) -> None:
    """Raises Undecodable; deep also where a value is not finite."""
    for name, (dtype, _, begin, end) in tensor_header(read, size).items():
        if not deep:
            continue
        data = read(begin, end - begin)
        if dtype == "BF16":  # the upper half of fp32
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif dtype in FLOATS:
            values = np.frombuffer(data, FLOATS[dtype])
        else:
            continue
        if not np.isfinite(values).all():
            raise Undecodable(f"tensor {name}: {int((~np.isfinite(values)).sum())} not finite")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # of the encoding too
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def array_of(data: bytes) -> np.ndarray:
    """Return the array of an npy file; Undecodable unless it is as long as its header says."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file, max_header_size=1000)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
            raise Undecodable(f"an array {shape} of {dtype} in {len(data)} bytes")
        return np.load(io.BytesIO(data), allow_pickle=False, max_header_size=1000)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, RecursionError) as error:
        raise Undecodable(str(error).split("\n")[0] or type(error).__name__) from error


def arrays_of(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file by name, `LARGEST_ARRAYS` bytes at most, or Undecodable."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            # zipfile reads no more of a file than is written here, however it is packed.
            unpacked = sum(info.file_size for info in file.infolist())
            if unpacked > LARGEST_ARRAYS:
                raise Undecodable(f"arrays of {unpacked} bytes, at most {LARGEST_ARRAYS} are read")
            return {n.removesuffix(".npy"): array_of(file.read(n)) for n in file.namelist()}
    except (
        OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error,
        lzma.LZMAError,
    ) as error:  # fmt: skip
        raise Undecodable(str(error).split("\n")[0] or type(error).__name__) from error


def _video(data: bytes) -> None:
    import av  # decoders are slow to load, and few ask for them

    from echolab.data.decoding import opened

    try:
        with opened(io.BytesIO(data)) as container:
            told = container.streams.video[0].frames
            count = sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise Undecodable(str(error).split("\n")[0] or type(error).__name__) from error
    if not count or count < told:
        raise Undecodable(f"{count} of {told} frames")


def sound_of(data: bytes) -> np.ndarray:
    """Return samples [n] or [n, channels] of a sound, float32, or raise Undecodable.

    A few bytes of FLAC can stand for hours: `LONGEST_SOUND` values are read at most.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if not 0 <= file.frames * file.channels <= LONGEST_SOUND:
                raise Undecodable(f"{file.frames} samples, at most {LONGEST_SOUND} are read")
            samples: np.ndarray = file.read(dtype="float32")
            return samples
    except soundfile.LibsndfileError as error:
        raise Undecodable(error.error_string) from error
    except RuntimeError as error:
        raise Undecodable(str(error).split("\n")[0]) from error


def _picture(data: bytes) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_PICTURE:
                raise Undecodable(f"{image.width} x {image.height} pixels")
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Undecodable(str(error).split("\n")[0]) from error


STRUCTURED: dict[str, Callable[[bytes], Any]] = {"json": _json, "npy": array_of, "npz": arrays_of}
DEEP: dict[str, Callable[[bytes], Any]] = {
    "mp4": _video, "flac": sound_of, "jpg": _picture, "jpeg": _picture, "png": _picture,
    "webp": _picture,
}  # fmt: skip
