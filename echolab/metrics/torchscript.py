"""Read the tensors of a TorchScript archive without running or unpickling anything in it.

An archive is a zip: `data.pkl` describes the module tree, `data/0`, `data/1`, ... are the bytes of
storages, and `code/` is its program, which is never read.  The pickle's opcodes are parsed by
pickletools and interpreted here by a closed table: tensors, storages, containers, strings, numbers,
and objects of the archive's own classes, which become dictionaries of their attributes.  Any other
opcode or name is an error, so a pickle cannot call anything.
"""

import math
import pickletools
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echolab.errors import WeightsError

AGAIN = "nothing in it was run; give the released file"
MAX_NODES = 100_000  # values that a module tree may have; I3D has about 3000

STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
# Functions of torch's own pickles: they are never called, their arguments are read here.
REBUILD = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")
LISTS = tuple(f"torch.jit._pickle build_{kind}list" for kind in ("int", "double", "bool", "tensor"))
TYPE_TAG = "torch.jit._pickle restore_type_tag"
ORDERED_DICT = "collections OrderedDict"
ALLOWED = {*REBUILD, *LISTS, TYPE_TAG, ORDERED_DICT, *(f"torch {name}" for name in STORAGES)}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list}


class _Name(NamedTuple):
    """A global name in the pickle, which is not imported."""

    name: str  # "module attribute"


class _Mark(NamedTuple):
    """The start of a group of values on the stack."""


class _Storage(NamedTuple):
    """A storage, by the name of its part of the archive."""

    dtype: torch.dtype
    key: str


class _Refused(Exception):
    """Content that the closed table does not allow."""


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [name.split("/")[1:] for name in archive.namelist()]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
    return ["constants.pkl"] in parts and ["data.pkl"] in parts


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return all tensors of an archive by dotted names, in the order of its attributes.

    Raise WeightsError for a damaged archive, or one with content other than a module of tensors.
    """
    # Only data.pkl and the storages are read; the program of the archive is not.
    try:
        with zipfile.ZipFile(path) as archive:
            root = _check_parts(archive, path.stat().st_size)
            reader = _Reader(archive, root)
            module = reader.run(archive.read(f"{root}/data.pkl"))
            return dict(_named_tensors(module))
    except _Refused as error:
        raise WeightsError(f"{path}: {error}; {AGAIN}") from error
    except (
        OSError, ValueError, LookupError, TypeError, RuntimeError, NotImplementedError,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: damaged or cut short ({line}); {AGAIN}") from error


def _check_parts(archive: zipfile.ZipFile, size: int) -> str:
    """Return the archive's root folder; refuse parts that could unpack to more than the file."""
    infos = archive.infolist()
    roots = {info.filename.split("/")[0] for info in infos}
    if len(roots) != 1:
        raise _Refused(f"{len(roots)} folders, need one")
    root = roots.pop()
    # torch stores tensors uncompressed; compressed or overlapping parts could have any size.
    read = [info for info in infos if info.filename.startswith((f"{root}/data/", f"{root}/data."))]
    for info in read:
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"{info.filename} is compressed, unlike files of torch")
    if sum(info.file_size for info in read) > size:
        raise _Refused("parts overlap, unlike files of torch")
    if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
        raise _Refused("big-endian, need little-endian")
    return root


class _Reader:
    """A stack machine for the opcodes that torch writes."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self.archive, self.root = archive, root
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.buffers: dict[str, Tensor] = {}  # bytes of storages that were read

    def run(self, data: bytes) -> Any:
        """Return the value that the pickle describes."""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise _Refused("data.pkl has no end")

    def _step(self, name: str, argument: Any) -> None:
        """Apply one opcode to the stack."""
        push, pop = self.stack.append, self.stack.pop
        # Values: constants, numbers, strings, empty containers, short tuples.
        if name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in NUMBERS:
            push(argument)
        elif name in EMPTY:
            push(EMPTY[name]())
        elif name in TUPLES:
            values = [pop() for _ in range(TUPLES[name])]
            push(tuple(reversed(values)))
        # Groups, the memo, and references to names and storages.
        elif name == "MARK":
            push(_Mark())
        elif name == "TUPLE":
            push(tuple(self._group()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name == "GLOBAL":
            push(_allowed(argument))
        elif name == "BINPERSID":
            push(_storage(pop()))
        elif name != "PROTO":
            self._combine(name)

    def _combine(self, name: str) -> None:
        """Apply an opcode that joins values of the stack."""
        pop = self.stack.pop
        if name in ("APPEND", "APPENDS"):
            values = self._group() if name == "APPENDS" else [pop()]
            _container(self.stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._group() if name == "SETITEMS" else [pop(), pop()][::-1]
            pairs = zip(values[::2], values[1::2], strict=True)
            _container(self.stack[-1], dict).update((str(key), value) for key, value in pairs)
        elif name == "NEWOBJ":
            # An object of a class of the archive: its attributes are set by BUILD.
            arguments, owner = pop(), pop()
            if arguments != () or not isinstance(owner, _Name) or owner.name in ALLOWED:
                raise _Refused(f"an object of {owner}")
            self.stack.append({})
        elif name == "BUILD":
            state = _container(pop(), dict)
            _container(self.stack[-1], dict).update(state)
        elif name == "REDUCE":
            arguments, function = pop(), pop()
            self.stack.append(self._apply(function, _container(arguments, tuple)))
        else:
            raise _Refused(f"opcode {name}")

    def _group(self) -> list[Any]:
        """Return the values above the last mark, and remove them with the mark."""
        values: list[Any] = []
        while not isinstance(value := self.stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def _apply(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Return what an allowed function of torch would return."""
        # Metadata of parameters and type tags of lists have no effect on tensors.
        name = function.name if isinstance(function, _Name) else ""
        if name == REBUILD[0]:
            return self._tensor(*arguments[:4])
        if name == REBUILD[1]:
            return arguments[0]
        if name in LISTS or name == TYPE_TAG:
            return arguments[0]
        if name == ORDERED_DICT:
            return {}
        raise _Refused(f"a call of {function}")

    def _tensor(
        self, storage: Any, offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Tensor:
        """Return a tensor of a storage; refuse one that reaches beyond it or repeats elements."""
        if not isinstance(storage, _Storage):
            raise _Refused("a tensor without storage")
        flat = self._buffer(storage)
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise _Refused(f"a tensor of size {size} and stride {stride}")
        # Python's integers cannot overflow, so sizes of any magnitude are compared correctly.
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and (last >= len(flat) or count > len(flat)):
            raise _Refused(f"a tensor of {count} elements in a storage of {len(flat)}")
        # Copy, so that the bytes of the archive are freed with the reader.
        if not count:
            return torch.zeros(tuple(size), dtype=storage.dtype)
        return flat.as_strided(tuple(size), tuple(stride), offset).clone()

    def _buffer(self, storage: _Storage) -> Tensor:
        """Return the elements of a storage."""
        # Several tensors can share one storage, such as tied weights.
        if storage.key not in self.buffers:
            data = bytearray(self.archive.read(f"{self.root}/data/{storage.key}"))
            self.buffers[storage.key] = (
                torch.frombuffer(data, dtype=torch.uint8)
                if data
                else (torch.empty(0, dtype=torch.uint8))
            )
        return self.buffers[storage.key].view(storage.dtype)


def _allowed(argument: str) -> _Name:
    """Return a global name; refuse one that is neither torch's nor a class of the archive."""
    if argument in ALLOWED or argument.startswith("__torch__"):
        return _Name(argument)
    raise _Refused(f"data.pkl names {argument.replace(' ', '.')}, which no module of tensors needs")


def _storage(identity: Any) -> _Storage:
    """Return the storage of a persistent id ("storage", type, key, device, elements)."""
    # The key becomes a path in the archive, so it must be a plain number or word.
    kind, owner, key = _container(identity, tuple)[:3]
    dtype = STORAGES.get(owner.name.removeprefix("torch ")) if isinstance(owner, _Name) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or not key.isalnum():
        raise _Refused(f"a storage {identity}")
    return _Storage(dtype, key)


def _container(value: Any, kind: type) -> Any:
    """Return a value if it is a container of this kind."""
    if type(value) is not kind:
        raise _Refused(f"a {type(value).__name__} for a {kind.__name__}")
    return value


def _named_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested attributes, by dotted names."""
    # Walk without recursion, and count: a tree can refer to itself or to one part very often.
    waiting: list[tuple[str, Any]] = [("", module)]
    nodes = 0
    while waiting:
        nodes += 1
        if nodes > MAX_NODES:
            raise _Refused(f"over {MAX_NODES} values")
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict):
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, child) for key, child in reversed(value.items())]
