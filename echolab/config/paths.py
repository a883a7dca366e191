"""Check the paths and devices of a run before anything heavy is imported.

The supervisor calls this module, so that a mistyped path is reported in one line within a second.
The ranks check what requires the content of a dataset or of a checkpoint.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from echolab.data.download import parse_url
from echolab.data.index import FORMATS, INDEX
from echolab.errors import CheckpointError, ConfigError, DataError, WeightsError

KINDS = {"clips": "encoded", "val_clips": "encoded", "pairs": "preference"}
HEAD_BYTES = 2**18  # bytes of dataset.json that are read first; its list of shards comes last
# Device files of NVIDIA, AMD, and NVIDIA under WSL.
GPU_FILES = ("dev/nvidia[0-9]*", "dev/kfd", "dev/dxg")


def check_paths(config: Mapping[str, Any]) -> None:
    """Raise EcholabError, naming setting and path, for a missing path or one of another kind."""
    # Datasets: head of dataset.json, kind and format.
    raw = "network" in config["model"]  # SyncNet is trained on raw clips
    for key, path in datasets_of(config["data"]):
        kind = "raw" if raw and KINDS[key] == "encoded" else KINDS[key]
        check_dataset_head(f"data.{key}", path, kind)

    # Checkpoints: opening one later checks whether it is complete.
    for key in ("init_from", "ref_model"):
        text = config[key]
        if text and (key, text) != ("ref_model", "base") and not Path(text).is_dir():
            raise CheckpointError(f"{key}={text}: no such folder; give a run or a checkpoint")

    # Weights: files or folders.
    weights = {"pretrained": config["pretrained"], "lora.init_from": config["lora"]["init_from"]}
    for key, text in weights.items():
        if text and not Path(text).exists():
            raise WeightsError(f"{key}={text}: no such file or folder; give another path")


def datasets_of(data: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield setting and path of each dataset on a disk, not at an address."""
    for key in KINDS:
        named = data[key] or []
        for text in [named] if isinstance(named, str) else named:
            if not parse_url(text):
                yield key, Path(text)


def check_dataset_head(key: str, folder: Path, kind: str) -> None:
    """Raise DataError if a folder holds no readable dataset of this kind and a known format.

    Addresses are not checked.
    """
    if parse_url(folder):
        return  # an address, read over the network when it is opened
    path = folder / INDEX
    try:
        head = read_head(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "there is no dataset.json in it" if folder.is_dir() else "no such folder"
        raise DataError(f"{key}={folder}: {path}: not there ({reason}); give a dataset") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{key}={folder}: {path}: cannot be read ({error})") from error
    if head.get("format") not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise DataError(
            f"{path}: format {head.get('format')}, this program reads {known}; "
            "make the dataset again"
        )
    if head.get("kind") != kind:
        raise DataError(
            f"{key}={folder}: is a dataset of the kind {head.get('kind')}, this setting takes "
            f"{kind}; give another dataset"
        )


def read_head(path: Path) -> dict[str, Any]:
    """Return the fields of dataset.json before its list of shards; raise ValueError if invalid."""
    # Read only the head: the list of samples may be large.
    with path.open("rb") as file:
        start = file.read(HEAD_BYTES)
        end = start.find(b'"shards":')
        try:
            head = json.loads(start[:end].rstrip(b", \n\t") + b"}")
        except ValueError:
            head = {}
        if not isinstance(head, dict) or not {"format", "kind"} <= head.keys():
            head = json.loads(start + file.read())  # fields in another order
    if not isinstance(head, dict):
        raise ValueError("it holds no object")
    return head


def has_gpu(root: Path = Path("/")) -> bool:
    """Return whether this machine has the device file of a GPU."""
    return any(any(root.glob(name)) for name in GPU_FILES)


def check_gpus(trainer: Mapping[str, Any], root: Path = Path("/")) -> None:
    """Raise ConfigError if GPUs are requested and this machine has none."""
    wanted = trainer["accelerator"]
    if wanted in ("gpu", "cuda") and not has_gpu(root):
        raise ConfigError(f"trainer.accelerator={wanted}: no GPU here; use trainer=cpu")
