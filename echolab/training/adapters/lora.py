"""Low-rank adapters on linear layers, through peft: the base is unchanged, in memory once.

An adapted layer computes W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank]; B starts
at zero, so a newly adapted network equals its base.  Adapters have parameters of their own
(`blocks.0.self_attn.q.lora_A.default.weight`), which alone are trained; averages and checkpoints,
which hold what is trained, hold them alone.  Source: Hu et al., arXiv 2106.09685.
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

if TYPE_CHECKING:  # peft takes seconds to import: only runs with adapters pay for it
    from peft import LoraConfig

TRAINED, AVERAGE = "default", "reference"  # peft's names of the two sets of adapters


class Lora(NamedTuple):
    """Which layers are adapted, and how."""

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0

    def check(self) -> "Lora":
        """Return itself; raise ConfigError for a setting outside its range."""
        if self.rank < 1:
            raise ConfigError(f"lora.r={self.rank}: must be 1 or more; 8 to 128 is usual")
        if self.alpha <= 0:
            raise ConfigError(f"lora.lora_alpha={self.alpha:g}: must be above 0; the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout:g}: must lie in [0, 1); 0 is usual")
        return self

    def peft_config(self, layers: list[str]) -> "LoraConfig":
        """Return the same settings for peft."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=layers
        )


def _pattern(target: str) -> re.Pattern[str]:
    """Compile `blocks.*.self_attn.{q,k}`: `*` is one part of a name, `{q,k}` either."""
    # Escape everything, then give `*`, `{`, `}` and `,` their meaning.
    words = {r"\*": "[^.]*", r"\{": "(?:", r"\}": ")", ",": "|"}
    source = re.sub(r"\\[*{}]|,", lambda match: words[match[0]], re.escape(target))
    return re.compile(rf"(?:.*\.)?{source}(?:\..*)?")


def layers_matching(net: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Return the names of the linear layers that a target names, or that lie in what it names.

    A target is a run of complete parts anywhere in a layer's name: `ffn` is both layers of every
    feed-forward, `blocks.0` all of the first block, `cross_attn.{k,v}_audio` the audio branch.
    Raise ConfigError for a target that names no linear layer.
    """
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    matching_layers: set[str] = set()
    for target in targets:
        matching = {name for name in linear if _pattern(target).fullmatch(name)}
        # A target that matches nothing is a typing error.
        if not matching:
            near = ", ".join(sorted({name.split(".")[-1] for name in linear}))
            raise ConfigError(
                f"lora.target_modules={target}: names none of the network's {len(linear)} "
                "linear layers; "
                f"take blocks.*.self_attn, cross_attn, ffn, or one of {near}"
            )
        matching_layers |= matching
    return [name for name in linear if name in matching_layers]


def adapted_layers(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every layer that has adapters, by its name in the base."""
    from peft.tuners.lora import LoraLayer

    for name, module in net.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def base_fingerprint(net: nn.Module) -> str:
    """Hash names, shapes and values of all parameters that are not adapters.

    The hash is the same with adapters or without.  The values count in fp32: a checkpoint and a
    released bf16 file of the same numbers agree.
    """
    digest = blake2b(digest_size=16)
    for name, value in net.named_parameters():
        if ".lora_" not in name:
            # peft wraps adapted layers: their names are those of the plain network.
            plain = name.replace(".base_layer.", ".")
            digest.update(f"{plain} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()


def _inject(net: nn.Module, config: "LoraConfig", adapter: str) -> None:
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):  # peft draws values that are replaced anyway
        inject_adapter_in_model(config, net, adapter)
    del net.peft_config  # kept by the layers; peft warns where it finds it again
    for _, layer in adapted_layers(net):
        # peft activates the adapter that was added last.
        layer.set_adapter(TRAINED)
        for part in (layer.lora_A, layer.lora_B):
            part[adapter].float()  # what is trained is fp32, even on a bf16 base


def add_adapters(net: nn.Module, lora: Lora, seed: int) -> None:
    """Freeze `net` and give its layers adapters to train; raise ConfigError for wrong settings.

    The values are a pure function of the seed and the layer's name, on any device.
    """
    layers = layers_matching(net, lora.check().targets)
    net.requires_grad_(False)
    _inject(net, lora.peft_config(layers), TRAINED)
    for name, layer in adapted_layers(net):
        down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
        # Only shapes are wanted, as in an estimate.
        if down.is_meta:
            continue
        # A seed for each layer: values do not depend on which other layers are adapted.
        number = int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")
        generator = torch.Generator().manual_seed(number)  # on the CPU: the same on any device
        bound = 1 / math.sqrt(down.shape[1])  # peft's own: kaiming_uniform with a = sqrt(5)
        value = torch.empty(down.shape, dtype=down.dtype).uniform_(
            -bound, bound, generator=generator
        )
        down.data.copy_(value)
        nn.init.zeros_(up)


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """Add every adapter to its layer, and remove the adapters."""
    for name, layer in list(adapted_layers(net)):
        layer.merge(safe_merge=True, adapter_names=[TRAINED])
        # The plain layer takes the place of the adapted one.
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, layer.get_base_layer())
    net.requires_grad_(True)


class AdaptersOff:
    """The base of an adapted network, as a frozen network: no second copy of it is held.

    Not an nn.Module, as `models.frozen.Frozen` is not.
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.layers = [layer for _, layer in adapted_layers(net)]
        if not self.layers:
            raise ConfigError("ref_model=base: the network has no adapters; give lora=attention")

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Ignore the weights: the base does not change, whichever adapters are trained."""

    def to(self, device: torch.device | str) -> "AdaptersOff":
        """Return itself: it is on the device of its network."""
        del device
        return self

    def _switch(self, on: bool) -> None:
        for layer in self.layers:
            layer.enable_adapters(on)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the base returns, outside the graph."""
        self._switch(False)
        try:
            with torch.no_grad():
                return self.net(*args, **kwargs)
        finally:
            self._switch(True)


class AverageAdapters(AdaptersOff):
    """The same base with a second, frozen set of adapters, such as an earlier average."""

    def __init__(self, net: nn.Module, lora: Lora):
        super().__init__(net)
        names = [name for name, _ in adapted_layers(net)]
        _inject(net, lora._replace(dropout=0.0).peft_config(names), AVERAGE)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set the frozen adapters from trained ones by parameter name."""
        own = dict(self.net.named_parameters())
        for name, tensor in weights.items():
            parameter = own[name.replace(f".{TRAINED}.", f".{AVERAGE}.")]
            with _gathered(parameter):
                parameter.data.copy_(tensor)

    def _switch(self, on: bool) -> None:
        for layer in self.layers:
            layer.set_adapter(TRAINED if on else AVERAGE, inference_mode=not on)


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Gather a parameter for writing: under ZeRO 3 it is partitioned between uses."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], 0)
    return gathered
