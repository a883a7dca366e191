"""Read released weights: safetensors, sharded or not, diffusers folders, and `.pth`.

Files are memory-mapped, and a network uses the mapped tensors as its parameters or copies them
directly to a GPU, without a second copy in host memory.  No code is executed: pickles are read with
torch's `weights_only`.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echolab.errors import WeightsError
from echolab.models.state_dict import (
    LoadReport,
    assign_parameters,
    converted_tensors,
    from_diffusers,
    initial_values,
    match_weights,
    meta_network,
    model_of,
)
from echolab.models.transformer import EchoTransformer

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
INDEX = ".safetensors.index.json"
PREFIXES = ("model.", "module.", "diffusion_model.", "transformer.")
LORA = re.compile(r"(^|[._])lora([._]|$)|lora_(A|B|up|down|unet)")
AGAIN = "download or copy it again"


class Loaded(NamedTuple):
    """A network with the weights of a file, and a report on the file's tensors."""

    net: EchoTransformer
    report: LoadReport


def load_released(
    path: Path,
    architecture: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    fresh: Sequence[Sequence[str]] = (),
    seed: int = 0,
) -> Loaded:
    """Return the network of `architecture` with the weights of a file or folder, in `dtype`.

    Raise WeightsError or CheckpointError; see `released_values` for `fresh` and `seed`.
    """
    # Build on the meta device, so that no memory is allocated for values that the file replaces.
    net = meta_network(architecture).to(dtype)
    report, values = released_values(net, path, fresh=fresh, seed=seed)
    assign_parameters(net, values())
    return Loaded(net, report)


def released_values(
    net: EchoTransformer,
    path: Path,
    *,
    fresh: Sequence[Sequence[str]] = (),
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[LoadReport, Callable[[], Iterator[tuple[str, Tensor]]]]:
    """Return a report and a reader of all values of `net`, which may be on meta, from `path`.

    `fresh` lists parts (`AUDIO_PARTS`, `IMAGE_PARTS`) that the file may lack.  Missing parts get
    Wan's initialization with `seed`: audio keys and values are zero, so that the network computes
    the same function as its base.  The reader yields (parameter name, tensor) pairs, one at a time,
    converted on `device`.  Raise WeightsError or CheckpointError before any value is read.
    """
    # Run all checks now; the returned function reads and initializes values.
    tensors = read_tensors(path)
    report = match_weights(net, tensors, fresh=fresh, source=str(path))

    def values() -> Iterator[tuple[str, Tensor]]:
        yield from converted_tensors(net, tensors, report, device)
        generator = torch.Generator().manual_seed(seed)
        yield from initial_values(net, generator, only=set(report.fresh))

    return report, values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a released file or folder by original names, memory-mapped.

    A file is .safetensors, an index of shards, or .pth, .pt, .ckpt, .bin; a folder contains one
    such file or a diffusers model (recognized by parameter names), directly or in `transformer/`.
    A nested `state_dict` is unpacked, and a common prefix of all names such as `model.` removed.
    Raise WeightsError for a file that is missing, damaged, quantized, a LoRA, a pickle with code,
    or of another network.
    """
    # Select the reader by the file's name.
    file = _find_file(path)
    if file.name.endswith(INDEX):
        tensors = _read_shards(file)
    elif file.suffix == ".safetensors":
        tensors = read_safetensors(file)
    else:
        tensors = read_pickle(file)
    # Convert all names to original names.
    tensors = _without_prefixes(tensors)
    if any(name.startswith("condition_embedder.") for name in tensors):
        tensors = {from_diffusers(name): tensor for name, tensor in tensors.items()}
    _check_kind(path, tensors)
    return tensors


def _find_file(path: Path) -> Path:
    """Return the file to open: `path` itself, or the weights file of a folder."""
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLES) and not path.name.endswith(INDEX):
            raise WeightsError(
                f"{path}: not a supported weights file; give .safetensors, "
                f"*{INDEX}, {', '.join(PICKLES)}, or a folder of these"
            )
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: not there; give a file or folder of released weights")
    # A diffusers pipeline stores the network in `transformer/`.
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    _check_config(folder / "config.json")
    # Prefer an index, then safetensors, then pickles; several files of one kind are ambiguous.
    for kinds in ((INDEX,), (".safetensors",), PICKLES):
        files = sorted(file for file in folder.iterdir() if file.name.endswith(kinds))
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files[:3])
            raise WeightsError(f"{folder}: {len(files)} weights files ({names}); give one of them")
    raise WeightsError(
        f"{folder}: no .safetensors or {', '.join(PICKLES)} in it; give another path"
    )


def weight_files(path: Path) -> list[Path]:
    """Return the files that `read_tensors(path)` reads tensors from, and their index if any."""
    file = _find_file(path)
    if not file.name.endswith(INDEX):
        return [file]
    # An index is untrusted: accept only shards in its own folder.
    shard_of = _read_json(file).get("weight_map")
    shards = sorted(set(map(str, shard_of.values()))) if isinstance(shard_of, dict) else []
    return [file, *(file.parent / shard for shard in shards if Path(shard).name == shard)]


def _check_config(config: Path) -> None:
    """Raise WeightsError for a diffusers folder of another network, such as a VAE."""
    if not config.is_file():
        return
    class_name = _read_json(config).get("_class_name", "Wan")
    if not str(class_name).startswith("Wan"):
        raise WeightsError(
            f"{config}: _class_name is {class_name}, need a Wan transformer; give its folder"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; raise WeightsError."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a JSON object; {AGAIN}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of one file; raise WeightsError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}); {AGAIN}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards; raise WeightsError unless they match the index."""
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise WeightsError(f"{index}: no weight_map in it; {AGAIN}")
    tensors: dict[str, Tensor] = {}
    # Every shard must be in the folder of the index and contain exactly the listed tensors.
    for shard in sorted(set(map(str, shard_of.values()))):
        names = {name for name, file_name in shard_of.items() if file_name == shard}
        file = index.parent / shard
        if Path(shard).name != shard or not file.is_file():
            raise WeightsError(
                f"{file}: this shard of {len(names)} tensors is missing, {index.name} lists it; "
                "download or copy it"
            )
        shard_tensors = read_safetensors(file)
        for name in sorted(names ^ set(shard_tensors)):
            fault = "is missing, but listed" if name in names else "is in it, but not listed"
            raise WeightsError(f"{file}: {name} {fault} in {index.name}; {AGAIN}")
        tensors |= shard_tensors
    return tensors


def check_archive(path: Path) -> None:
    """Raise WeightsError for a `.pth` with compressed parts, or parts larger than the file.

    torch stores parts uncompressed; compressed or overlapping parts could unpack to any size.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}); {AGAIN}") from error
    # Compare the sizes before unpacking.
    compressed = next((part for part in parts if part.compress_type != zipfile.ZIP_STORED), None)
    size = sum(part.file_size for part in parts)
    if compressed or size > path.stat().st_size:
        fault = f"parts of {size} bytes overlap"
        if compressed:
            fault = f"{compressed.filename} is compressed"
        raise WeightsError(f"{path}: {fault}, unlike files of torch; give a .safetensors file")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a `.pth`; raise WeightsError for other content."""
    check_archive(path)
    try:
        # Files written by torch before 1.6 are not zip archives and cannot be memory-mapped.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        fault = f"a pickle that calls {named[1]}" if named else "damaged, or not of tensors alone"
        raise WeightsError(
            f"{path}: {fault}; nothing in it was run; give a .safetensors file"
        ) from error
    except Exception as error:  # torch raises many types of errors for damaged files
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: damaged or cut short ({line}); {AGAIN}") from error
    # Trainers nest the tensors under one of these keys.
    for key in ("state_dict", "module", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = content if isinstance(content, dict) else {}
    others = [name for name, value in tensors.items() if not _is_plain(name, value)]
    if others or not tensors:
        fault = f"{others[0]} is no plain tensor" if others else "it holds no tensors by name"
        raise WeightsError(f"{path}: {fault}; give a file of weights alone")
    return tensors


def _is_plain(name: Any, value: Any) -> bool:
    """Return whether `name` is a string and `value` a dense tensor with its own storage.

    Reject expanded views, whose elements share memory, so that they could state any size.
    """
    if not isinstance(name, str) or type(value) not in (Tensor, torch.nn.Parameter):
        return False
    if value.layout != torch.strided or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def check_precision(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError for quantized tensors, whose scales are not supported."""
    # Quantized files have the usual parameter names, but would load as noise.
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind in ("int8", "uint8") or kind.startswith("float8"):
            quantized = "fp8" if kind.startswith("float8") else "quantized"
            raise WeightsError(
                f"{path}: {name} is {kind}, a {quantized} file; give the bf16 or fp32 release"
            )


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with common prefixes removed from all names."""
    # Prefixes may be nested, such as `module.model.`.
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors


def _check_kind(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError for tensors that are not full-precision weights of a Wan transformer."""
    # A LoRA is the most common wrong file.
    lora = next((name for name in tensors if LORA.search(name)), None)
    if lora is not None:
        raise WeightsError(
            f"{path}: a LoRA ({lora}), need base weights; give the base it was trained on"
        )
    check_precision(path, tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(f"{path}: {name} is {kind}, not weights; give another file")
    if model_of(tensors) is None:
        name = next(iter(tensors), "nothing")
        raise WeightsError(
            f"{path}: no weights of a Wan transformer ({len(tensors)} tensors, such as {name}); "
            "give another file"
        )
