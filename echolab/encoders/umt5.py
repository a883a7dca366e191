"""The umT5-XXL text encoder: transformers' UMT5EncoderModel, from either kind of file.

Shapes: L = 512 text tokens, D = 4096.
"""

import html
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel

from echolab.encoders.files import (
    assign_parameters,
    from_folder,
    frozen,
    read_file,
    require,
    shape_of,
)
from echolab.errors import WeightsError

LENGTH = 512
END = "</s>"
WHAT = "the encoder of umT5-XXL, such as models_t5_umt5-xxl-enc-bf16.pth"

_BLOCK = {
    "norm1.": "layer.0.layer_norm.",
    "attn.": "layer.0.SelfAttention.",
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "norm2.": "layer.1.layer_norm.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
}
_TOP = {"token_embedding.": "shared.", "norm.": "encoder.final_layer_norm."}


def to_transformers(name: str) -> str:
    """Return the name in UMT5EncoderModel of a tensor of Wan's text encoder.

    Source: Wan-Video/Wan2.1, `wan/modules/t5.py`.
    """
    # Within a block, or one of the few names outside the blocks.
    block = re.match(r"blocks\.(\d+)\.", name)
    start, rest = (f"encoder.block.{block[1]}.", name[block.end() :]) if block else ("", name)
    for old, new in (_BLOCK if block else _TOP).items():
        if rest.startswith(old):
            return start + new + rest.removeprefix(old)
    return name


def as_written(text: str) -> str:
    """Return the text itself, as EchoMimicV3 and VideoX-Fun give it to the tokenizer."""
    return text


def cleaned(text: str) -> str:
    """Return a text as Wan and diffusers clean it: no mojibake, entities or runs of spaces."""
    # Entities may be escaped twice in captions from the web.
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class TextEncoder:
    """Maps a text to its states [512, D] in fp32, zero after its end."""

    def __init__(
        self, net: UMT5EncoderModel, tokenizer: Tokenizer, clean: Callable[[str], str]
    ) -> None:
        self.net, self.tokenizer, self.clean = net, tokenizer, clean

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """Return the states; a text of over 512 tokens is cut, with a warning."""
        encoded = self.tokenizer.encode(self.clean(text))
        tokens = encoded.ids
        if encoded.overflowing:
            warnings.warn(f"a text of over {LENGTH} tokens is cut: {text[:60]!r}...", stacklevel=2)
        # The release pads to 512, masks the padding and drops its states: the same, but slower.
        states = self.net(torch.tensor([tokens], device=self.net.device)).last_hidden_state[0]
        return functional.pad(states.float().cpu(), (0, 0, 0, LENGTH - len(tokens)))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder such as `google/umt5-xxl`, from its tokenizer.json."""
    path = require(folder / "tokenizer.json", "the tokenizer of google/umt5-xxl")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise WeightsError(f"{path}: damaged ({error}); download or copy it again") from error
    # Padding would only cost time: states after the end are zeros.
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    if tokenizer.encode("a").tokens[-1:] != [END]:
        raise WeightsError(
            f"{path}: does not end a text with {END}; give the tokenizer of google/umt5-xxl"
        )
    return tokenizer


def load_text_encoder(
    path: Path,
    tokenizer_folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    clean: Callable[[str], str] = as_written,
) -> TextEncoder:
    """Load the text encoder of a transformers folder, or of Wan's file in its original names."""
    tokenizer = load_tokenizer(tokenizer_folder)
    net = (
        from_folder(UMT5EncoderModel, path, dtype)
        if path.is_dir()
        else _from_file(path, device, dtype)
    )
    # A tokenizer of another model would index beyond the table.
    tokens, rows = tokenizer.get_vocab_size(), net.shared.weight.shape[0]
    if tokens > rows:
        raise WeightsError(
            f"{tokenizer_folder}: {tokens} tokens, the text encoder {path} has {rows}; give the "
            "tokenizer of google/umt5-xxl"
        )
    return TextEncoder(frozen(net, device), tokenizer, clean)


def _from_file(path: Path, device: torch.device, dtype: torch.dtype) -> UMT5EncoderModel:
    tensors = {to_transformers(name): tensor for name, tensor in read_file(path).items()}
    # All sizes of the network follow from shapes in the file.
    vocabulary, width = shape_of(tensors, "shared.weight", path, WHAT)
    first = "encoder.block.0.layer.{}.weight"
    attention = shape_of(tensors, first.format("0.SelfAttention.q"), path, WHAT)[0]
    bias = first.format("0.SelfAttention.relative_attention_bias")
    buckets, heads = shape_of(tensors, bias, path, WHAT)
    hidden = shape_of(tensors, first.format("1.DenseReluDense.wi_0"), path, WHAT)[0]
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=attention // heads,
        d_ff=hidden,
        num_heads=heads,
        num_layers=len({name.split(".")[2] for name in tensors if ".block." in name}),
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        net = UMT5EncoderModel(config)
    # The library's class takes two names for its one table of words.
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    assign_parameters(net, tensors, path, device, dtype)
    net.set_input_embeddings(net.shared)  # one table, under two names
    return net
