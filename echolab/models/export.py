"""Export weights as safetensors with the parameter names of the releases or of diffusers."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from echolab.atomic_io import fsync
from echolab.errors import CheckpointError, ConfigError, WeightsError
from echolab.models.state_dict import DEAD_PART, released_shapes, to_diffusers
from echolab.models.transformer import EchoTransformer

FILE_STEM = "diffusion_pytorch_model"  # as in the releases and diffusers
Config = dict[str, Any]


def write_original(
    out: Path,
    net: EchoTransformer,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> list[Path]:
    """Write a file `out`.safetensors or a folder `out` with the names of Wan and EchoMimicV3.

    `tensors` are all parameters of `net` (which may be on the meta device) by name.  They are
    written in `dtype`, or in their own dtype if it is None.  Flash's unused audio query is written
    as zeros if it is not in `tensors`, so that strict readers find all 1,203 names.
    Return the files.  Write nothing if CheckpointError, ConfigError or WeightsError is raised.
    """
    # Use names and order of the released file, with zeros for tensors that have no effect.
    _check_complete(net, tensors)
    renamed: dict[str, Tensor] = {}
    for name, shape in released_shapes(net).items():
        dead = DEAD_PART in name
        renamed[name] = tensors.get(name, torch.zeros(1).expand(shape)) if dead else tensors[name]
    return _write_weights(out, renamed, _original_config(net), dtype, shard_bytes)


def write_diffusers(
    out: Path,
    net: EchoTransformer,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> list[Path]:
    """Write a folder `out` that diffusers' `WanTransformer3DModel.from_pretrained` reads.

    diffusers has no audio branch: audio tensors get echolab's own names, which diffusers reports
    and ignores.  Otherwise like `write_original`.
    """
    # diffusers needs a folder with config.json.
    _check_complete(net, tensors)
    if out.suffix == ".safetensors":
        raise ConfigError(f"out={out}: names=diffusers writes a folder; give a folder")
    renamed = {to_diffusers(name): tensors[name] for name, _ in net.named_parameters()}
    return _write_weights(out, renamed, _diffusers_config(net), dtype, shard_bytes)


def _check_complete(net: EchoTransformer, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names and shapes of `tensors` match the parameters of `net`."""
    # Check both parameters without a tensor and tensors without a parameter.
    parameters = dict(net.named_parameters())
    for name in [*parameters, *(name for name in tensors if DEAD_PART not in name)]:
        tensor, parameter = tensors.get(name), parameters.get(name)
        if tensor is None or parameter is None or tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{name} is {'missing' if tensor is None else list(tensor.shape)}, the network has "
                f"{'none' if parameter is None else list(parameter.shape)}; give weights of this "
                "network"
            )


def _original_config(net: EchoTransformer) -> Config:
    """Return config.json as Wan's own code reads it."""
    return {
        "_class_name": "WanModel",
        "model_type": "t2v" if net.img_emb is None else "i2v",
        "patch_size": list(net.patch_size),
        "text_len": 512,
        "in_dim": net.patch_embedding.in_channels,
        "dim": net.patch_embedding.out_channels,
        "ffn_dim": net.get_parameter("blocks.0.ffn.0.bias").numel(),
        "freq_dim": net.freq_dim,
        "text_dim": net.text_embedding[0].in_features,
        "out_dim": net.head.head.out_features // math.prod(net.patch_size),
        "num_heads": net.patch_embedding.out_channels // net.head_dim,
        "num_layers": len(net.blocks),
        "window_size": [-1, -1],
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": net.head.eps,
    }


def _diffusers_config(net: EchoTransformer) -> Config:
    """Return config.json as diffusers reads it."""
    # The same values under diffusers' names.
    original = _original_config(net)
    image_dim = None if net.img_emb is None else net.img_emb.proj[1].in_features
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": original["patch_size"],
        "num_attention_heads": original["num_heads"],
        "attention_head_dim": original["dim"] // original["num_heads"],
        "in_channels": original["in_dim"],
        "out_channels": original["out_dim"],
        "text_dim": original["text_dim"],
        "freq_dim": original["freq_dim"],
        "ffn_dim": original["ffn_dim"],
        "num_layers": original["num_layers"],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": original["eps"],
        "image_dim": image_dim,
        "added_kv_proj_dim": None if image_dim is None else original["dim"],
        "rope_max_seq_len": 1024,
    }


def _split_shards(
    named: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int
) -> list[dict[str, Tensor]]:
    """Split tensors into shards of at most `shard_bytes`; a larger tensor gets a separate shard."""
    # Keep the order of the names, as in the releases.
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in named.items():
        tensor_bytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if size + tensor_bytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor_bytes
    return shards


def _write_weights(
    out: Path,
    named: Mapping[str, Tensor],
    config: Config,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> list[Path]:
    """Write the shards and config.json under a temporary name, then rename."""
    # Check the output path before writing.
    shards = _split_shards(named, dtype, shard_bytes)
    single_file = out.suffix == ".safetensors"
    if out.exists():
        raise ConfigError(f"out={out}: exists already; give another path, or remove it")
    if single_file and len(shards) > 1:
        size = sum(t.numel() * (dtype or t.dtype).itemsize for t in named.values())
        raise ConfigError(
            f"out={out}: {size / 1e9:.2f} GB would be more than shard_gb={shard_bytes / 1e9:g}; "
            "give a folder, or raise shard_gb"
        )
    # Write to a folder with a temporary name, sync, then rename.
    partial = out.with_name(f".partial-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files = _write_shards(partial, shards, dtype)
        if single_file:
            files[0].replace(out)
            partial.rmdir()
            return [out]
        _write_json(partial / "config.json", config)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise WeightsError(
            f"{out}: could not be written ({error}); free disk space there, or give another path"
        ) from error
    return sorted(out.iterdir())


def _write_shards(
    folder: Path, shards: list[dict[str, Tensor]], dtype: torch.dtype | None
) -> list[Path]:
    """Write the shards, and an index if there are several; convert one shard at a time."""
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        files.append(folder / f"{FILE_STEM}{part}.safetensors")
        # Convert one shard at a time, to avoid a second copy of all weights in host memory.
        converted = {
            name: tensor.detach().to(dtype or tensor.dtype).contiguous()
            for name, tensor in shard.items()
        }
        save_file(converted, files[-1], {"format": "pt"})
        fsync(files[-1])
        weight_map |= dict.fromkeys(shard, files[-1].name)
        size += sum(tensor.nbytes for tensor in converted.values())
    # The index maps each tensor to its shard.
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / f"{FILE_STEM}.safetensors.index.json", index)
    return files


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file and flush it to disk."""
    path.write_text(json.dumps(content, indent=2) + "\n")
    fsync(path)
