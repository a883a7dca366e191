"""Files of released encoders: names, fingerprints, and loading of networks.

A network is loaded from a folder of its library (config.json and weights), or from a file with its
authors' parameter names.  Such a file is memory-mapped and its tensors become the parameters,
without a second copy.  Only tensors are unpickled.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_log
from torch import Tensor, nn
from transformers.utils import logging as transformers_log

from echolab.errors import WeightsError
from echolab.models.loading import (
    check_archive,
    check_precision,
    read_pickle,
    read_safetensors,
)

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")


def require(path: Path, what: str) -> Path:
    """Return `path`; raise a WeightsError that describes it as `what` if it does not exist."""
    if not path.exists():
        raise WeightsError(f"{path}: not there; it is {what}: download or copy it")
    return path


def weights_in(folder: Path) -> list[Path]:
    """Return the weight files, including all shards, of a diffusers or transformers folder."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        # The index is untrusted: refuse names outside the folder.
        if index.is_file():
            file_of = read_json(index).get("weight_map")  # name of a tensor -> file
            shards = sorted(set(map(str, file_of.values()))) if isinstance(file_of, dict) else []
            for shard in shards or [""]:
                if Path(shard).name != shard or not shard:
                    raise WeightsError(
                        f"{index}: {shard!r} is no file in its folder; copy it again"
                    )
            return [require(folder / shard, f"a shard that {index.name} names") for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    raise WeightsError(f"{folder}: holds no weights; need one of {', '.join(WEIGHTS)}")


def sha256_of(files: Iterable[Path]) -> str:
    """Return the sha256 of a single file, or one sha256 of several files and their names."""
    # Include the names of several files, since swapped shards are a different network.
    digests = []
    for path in files:
        try:
            with path.open("rb") as file:
                digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError as error:
            raise WeightsError(
                f"{path}: cannot be read ({error.strerror}); copy it again"
            ) from error
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, such as a config.json; raise WeightsError."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: not there; download or copy it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error}); copy it again") from error
    # A JSON list or number is not a configuration.
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a JSON object; copy it again")
    return content


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a .safetensors or pickled file by name."""
    if not path.is_file():
        raise WeightsError(f"{path}: not there; download or copy it")
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    check_precision(path, tensors)
    return tensors


def shape_of(tensors: Mapping[str, Tensor], name: str, path: Path, what: str) -> tuple[int, ...]:
    """Return the shape of a tensor that determines a network's size; raise WeightsError."""
    if name not in tensors:
        example = next(iter(tensors), "none")
        raise WeightsError(
            f"{path}: lacks {name} ({len(tensors)} tensors, such as {example}); give {what}"
        )
    return tuple(tensors[name].shape)


def assign_parameters(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Make `tensors` the parameters of `net`, which is on the meta device; raise WeightsError.

    If an error is raised, `net` is unchanged.
    """
    # Collect all faults, so that the error reports their number.
    needed = net.state_dict()
    faults = [f"lacks {name}" for name in needed if name not in tensors]
    faults += [f"has {name}, which the network lacks" for name in tensors if name not in needed]
    faults += [
        f"{name} is {list(tensors[name].shape)}, need {list(value.shape)}"
        for name, value in needed.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise WeightsError(f"{path}: {faults[0]}{more}; give the released file")
    # Assign instead of copying, to avoid a second copy in memory.
    on_device = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    net.load_state_dict(on_device, assign=True)


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Suppress log messages and progress bars of transformers and diffusers."""
    # Save the levels to restore them afterwards.
    before = [(log, log.get_verbosity()) for log in (transformers_log, diffusers_log)]
    bars = transformers_log.is_progress_bar_enabled()
    for log, _ in before:
        log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in before:
            log.set_verbosity(level)
        if bars:
            transformers_log.enable_progress_bar()


def from_folder(
    network: Any, folder: Path, dtype: torch.dtype, *, unused: Collection[str] = ()
) -> Any:
    """Load a network by its library's `from_pretrained`; raise WeightsError if a tensor is missing.

    The libraries initialize missing tensors randomly and only warn.  Tensors in `unused` have no
    effect and may be missing.
    """
    # Check archives before the library opens them.
    require(folder / CONFIG, f"what {network.__name__} is made by")
    for file in weights_in(folder):
        check_archive(file)
    try:
        with _silence_libraries():
            net, report = network.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{folder}: no {network.__name__} can be made of it ({line}); copy it again"
        ) from error
    # Raise an error where the library would initialize randomly.
    missing = sorted(name for name in report["missing_keys"] if name not in unused)
    if missing or report["mismatched_keys"]:
        what = f"lacks {missing[0]}" if missing else f"{report['mismatched_keys'][0]} does not fit"
        raise WeightsError(
            f"{folder}: {what} ({len(missing)} missing); give a folder of {network.__name__}"
        )
    return net


def frozen(net: Any, device: torch.device) -> Any:
    """Return a network on its device, for use without training."""
    return net.to(device).eval().requires_grad_(False)
