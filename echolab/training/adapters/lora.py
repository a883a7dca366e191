"""Low-rank adapters (LoRA) on linear layers, by peft; the base network is frozen and held once.

An adapted layer computes W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank]; B starts
at zero, so a newly adapted network equals its base.  Only the adapter parameters
(`blocks.0.self_attn.q.lora_A.default.weight`) are trained; averages and checkpoints contain only
trained parameters, hence only the adapters.  Source: Hu et al., arXiv 2106.09685.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from echolab.errors import ConfigError

if TYPE_CHECKING:  # importing peft takes seconds: import it at run time only if adapters are used
    from peft import LoraConfig

TRAINED, AVERAGE = "default", "reference"  # peft's names of the two sets of adapters


class Lora(NamedTuple):
    """Settings of LoRA: the target layers, rank, alpha and dropout."""

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0

    def check(self) -> "Lora":
        """Return self; raise ConfigError for a setting outside its range."""
        if self.rank < 1:
            raise ConfigError(f"lora.r={self.rank}: must be 1 or more; 8 to 128 is usual")
        if self.alpha <= 0:
            raise ConfigError(f"lora.lora_alpha={self.alpha:g}: must be above 0; the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout:g}: must lie in [0, 1); 0 is usual")
        return self

    def peft_config(self, layers: list[str]) -> "LoraConfig":
        """Return these settings as peft's LoraConfig, for the named layers."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=layers
        )


def _compile_target(target: str) -> re.Pattern[str]:
    """Compile a target such as `blocks.*.self_attn.{q,k}`; `*` matches one name part."""
    # Escape everything, then translate `*`, `{`, `}` and `,` to regular expressions.
    syntax = {r"\*": "[^.]*", r"\{": "(?:", r"\}": ")", ",": "|"}
    source = re.sub(r"\\[*{}]|,", lambda match: syntax[match[0]], re.escape(target))
    return re.compile(rf"(?:.*\.)?{source}(?:\..*)?")


def layers_matching(net: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Return the names of the linear layers that match a target or lie in a matching module.

    A target matches consecutive complete parts anywhere in a layer's name: `ffn` matches both
    layers of every feed-forward, `blocks.0` all layers of the first block,
    `cross_attn.{k,v}_audio` the audio branch.  Raise ConfigError for a target without a match.
    """
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    matching_layers: set[str] = set()
    for target in targets:
        matching = {name for name in linear if _compile_target(target).fullmatch(name)}
        # A target without a match is most likely misspelled.
        if not matching:
            near = ", ".join(sorted({name.split(".")[-1] for name in linear}))
            raise ConfigError(
                f"lora.target_modules={target}: names none of the network's {len(linear)} "
                "linear layers; "
                f"use blocks.*.self_attn, cross_attn, ffn, or one of {near}"
            )
        matching_layers |= matching
    return [name for name in linear if name in matching_layers]


def adapted_layers(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name in the base network, layer) for every layer with adapters."""
    from peft.tuners.lora import LoraLayer

    for name, module in net.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def base_fingerprint(net: nn.Module) -> str:
    """Hash the names, shapes and values of all parameters that are not adapters.

    The hash is the same with or without adapters.  Values are converted to fp32, so that a
    checkpoint and a released bf16 file with the same values have the same hash.
    """
    digest = blake2b(digest_size=16)
    for name, value in net.named_parameters():
        if ".lora_" not in name:
            # peft wraps adapted layers: restore the names of the plain network.
            plain = name.replace(".base_layer.", ".")
            digest.update(f"{plain} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()


def _inject_adapter(net: nn.Module, config: "LoraConfig", adapter: str) -> None:
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):  # peft draws values that are replaced afterwards
        inject_adapter_in_model(config, net, adapter)
    del net.peft_config  # each layer has its settings; peft warns if the network has them too
    for _, layer in adapted_layers(net):
        # peft activates the adapter that was added last.
        layer.set_adapter(TRAINED)
        for part in (layer.lora_A, layer.lora_B):
            part[adapter].float()  # adapters are trained in fp32, even on a bf16 base


def add_adapters(net: nn.Module, lora: Lora, seed: int) -> None:
    """Freeze `net` and add trainable adapters to its layers; raise ConfigError for wrong settings.

    The initial values depend only on the seed and the layer's name, not on the device.
    """
    layers = layers_matching(net, lora.check().targets)
    net.requires_grad_(False)
    _inject_adapter(net, lora.peft_config(layers), TRAINED)
    for name, layer in adapted_layers(net):
        down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
        # A memory estimate needs only the shapes.
        if down.is_meta:
            continue
        # One seed per layer: the values do not depend on which other layers are adapted.
        layer_seed = int.from_bytes(
            blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big"
        )
        generator = torch.Generator().manual_seed(layer_seed)  # on the CPU for any device
        bound = 1 / math.sqrt(down.shape[1])  # as in peft: kaiming_uniform with a = sqrt(5)
        value = torch.empty(down.shape, dtype=down.dtype).uniform_(
            -bound, bound, generator=generator
        )
        down.data.copy_(value)
        nn.init.zeros_(up)


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """Merge every adapter into the weight of its layer and remove the adapters."""
    for name, layer in list(adapted_layers(net)):
        layer.merge(safe_merge=True, adapter_names=[TRAINED])
        # Replace the adapted layer by its plain base layer.
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, layer.get_base_layer())
    net.requires_grad_(True)


class AdaptersOff:
    """The base of an adapted network as a frozen network, without a second copy of its weights.

    Not an nn.Module, so that the engine does not wrap it; see `models.frozen.Frozen`.
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.layers = [layer for _, layer in adapted_layers(net)]
        if not self.layers:
            raise ConfigError("ref_model=base: the network has no adapters; give lora=attention")

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Ignore `weights`: training the adapters does not change the base."""

    def to(self, device: torch.device | str) -> "AdaptersOff":
        """Return self: the base is on the device of its network."""
        del device
        return self

    def _switch(self, on: bool) -> None:
        for layer in self.layers:
            layer.enable_adapters(on)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the base network, computed without gradients."""
        self._switch(False)
        try:
            with torch.no_grad():
                return self.net(*args, **kwargs)
        finally:
            self._switch(True)


class AverageAdapters(AdaptersOff):
    """The base with a second, frozen set of adapters, such as an earlier average."""

    def __init__(self, net: nn.Module, lora: Lora):
        super().__init__(net)
        names = [name for name, _ in adapted_layers(net)]
        _inject_adapter(net, lora._replace(dropout=0.0).peft_config(names), AVERAGE)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy trained adapters, given by parameter name, into the frozen adapters."""
        parameters = dict(self.net.named_parameters())
        for name, tensor in weights.items():
            parameter = parameters[name.replace(f".{TRAINED}.", f".{AVERAGE}.")]
            with _gather_for_write(parameter):
                parameter.data.copy_(tensor)

    def _switch(self, on: bool) -> None:
        for layer in self.layers:
            layer.set_adapter(TRAINED if on else AVERAGE, inference_mode=not on)


def _gather_for_write(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Gather a parameter for writing; ZeRO 3 partitions parameters between uses."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], 0)
    return gathered
