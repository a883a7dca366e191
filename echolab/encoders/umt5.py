"""The umT5-XXL text encoder as transformers' UMT5EncoderModel.

Weights come from Wan's file or from a transformers folder.

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
    # Separate the block index, if any, from the name within the block.
    block = re.match(r"blocks\.(\d+)\.", name)
    start, rest = (f"encoder.block.{block[1]}.", name[block.end() :]) if block else ("", name)
    for old, new in (_BLOCK if block else _TOP).items():
        if rest.startswith(old):
            return start + new + rest.removeprefix(old)
    return name


def as_written(text: str) -> str:
    """Return the text unchanged, as EchoMimicV3 and VideoX-Fun pass it to the tokenizer."""
    return text


def cleaned(text: str) -> str:
    """Clean a text as Wan and diffusers do: repair mojibake, HTML entities and white space."""
    # Unescape twice, since entities in captions from the web may be escaped twice.
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class TextEncoder:
    """Maps a text to its hidden states [512, D] in fp32, zero-padded."""

    def __init__(
        self, net: UMT5EncoderModel, tokenizer: Tokenizer, clean: Callable[[str], str]
    ) -> None:
        self.net, self.tokenizer, self.clean = net, tokenizer, clean

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        """Return the hidden states; truncate a text of over 512 tokens, with a warning."""
        encoded = self.tokenizer.encode(self.clean(text))
        tokens = encoded.ids
        if encoded.overflowing:
            warnings.warn(f"a text of over {LENGTH} tokens is cut: {text[:60]!r}...", stacklevel=2)
        # The release pads to 512 tokens and masks the padding, which is equivalent but slower.
        states = self.net(torch.tensor([tokens], device=self.net.device)).last_hidden_state[0]
        return functional.pad(states.float().cpu(), (0, 0, 0, LENGTH - len(tokens)))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder such as `google/umt5-xxl`, from its tokenizer.json."""
    path = require(folder / "tokenizer.json", "the tokenizer of google/umt5-xxl")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise WeightsError(f"{path}: damaged ({error}); download or copy it again") from error
    # Disable padding, which would only cost time: states after the end are zeros.
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
    """Load the text encoder from a transformers folder or from Wan's file (original names)."""
    tokenizer = load_tokenizer(tokenizer_folder)
    net = (
        from_folder(UMT5EncoderModel, path, dtype)
        if path.is_dir()
        else _from_file(path, device, dtype)
    )
    # The tokenizer of another model could index beyond the embedding table.
    tokens, rows = tokenizer.get_vocab_size(), net.shared.weight.shape[0]
    if tokens > rows:
        raise WeightsError(
            f"{tokenizer_folder}: {tokens} tokens, the text encoder {path} has {rows}; give the "
            "tokenizer of google/umt5-xxl"
        )
    return TextEncoder(frozen(net, device), tokenizer, clean)


def _from_file(path: Path, device: torch.device, dtype: torch.dtype) -> UMT5EncoderModel:
    tensors = {to_transformers(name): tensor for name, tensor in read_file(path).items()}
    # Derive all sizes of the network from tensor shapes.
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
    # The library's class has two names for one shared embedding table.
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    assign_parameters(net, tensors, path, device, dtype)
    net.set_input_embeddings(net.shared)  # tie the two names again
    return net
