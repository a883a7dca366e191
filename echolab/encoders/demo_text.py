"""Captions as vectors without a language model: the stand-in for umT5.

Each token stands for a word and the one after it, so that "blue eyes" and "blue shirt" differ; its
vector is a fixed draw from a hash of the two.
"""

import hashlib
import re

import torch
from torch import Tensor

TOKENS, SIZE = 32, 32


def word_vector(words: str) -> Tensor:
    """A standard normal vector [32] that depends on the words alone."""
    seed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest())
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def encode_words(caption: str) -> Tensor:
    """A caption to [32, 32], zero after its end; what is longer is cut."""
    words = re.findall(r"[\w']+", caption.lower())
    tokens = torch.zeros(TOKENS, SIZE)
    for place, pair in enumerate(zip(words, [*words[1:], ""], strict=False)):
        if place == TOKENS:
            break
        tokens[place] = word_vector(" ".join(pair))
    return tokens
