"""The umT5 text encoder, on tiny checkpoints in the released file formats."""

import math
import warnings
from pathlib import Path

import pytest
import released
import torch
from torch import Tensor
from torch.nn import functional
from transformers import UMT5EncoderModel

from echolab.encoders.umt5 import LENGTH, as_written, cleaned, load_text_encoder, load_tokenizer
from echolab.errors import WeightsError

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "Wan2.1-Fun-V1.1-1.3B-InP"
    released.write_release(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    released.write_pipeline(folder)
    return folder


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wan_text_states(tensors: dict[str, Tensor], ids: Tensor, heads: int = 4) -> Tensor:
    """Compute Wan's text encoder by its own names, as `wan/modules/t5.py` describes it: [L, D]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * tensors[f"{name}.weight"]

    distance = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]
    far = 8 + (distance.abs() / 8).clamp(min=1).log() / math.log(128 / 8) * 8
    bucket = torch.where(distance.abs() < 8, distance.abs(), far.long().clamp(max=15))
    bucket = bucket + 16 * (distance > 0)
    x = tensors["token_embedding.weight"][ids]
    for n in range(released.TEXT_LAYERS):
        weight = {k: tensors[f"blocks.{n}.{k}.weight"] for k in (
            "attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2",
            "pos_embedding.embedding")}  # fmt: skip
        y = norm(x, f"blocks.{n}.norm1")
        q, k, v = ((y @ weight[f"attn.{a}"].T).unflatten(-1, (heads, -1)) for a in "qkv")
        scores = torch.einsum("inc,jnc->nij", q, k)
        bias = weight["pos_embedding.embedding"][bucket].permute(2, 0, 1)
        mixed = torch.einsum("nij,jnc->inc", (scores + bias).softmax(-1), v).flatten(1)
        x = x + mixed @ weight["attn.o"].T
        y = norm(x, f"blocks.{n}.norm2")
        gate = functional.gelu(y @ weight["ffn.gate.0"].T, approximate="tanh")
        x = x + (gate * (y @ weight["ffn.fc1"].T)) @ weight["ffn.fc2"].T
    return norm(x, "norm")


def test_states_equal_those_of_transformers_then_zeros_for_padding(pipeline: Path) -> None:
    oracle = UMT5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
    ours = load_text_encoder(pipeline / "text_encoder", pipeline / "tokenizer", CPU, FP32)
    text = "a talking person - a blue person, talking"
    ids = released.tokenizer().encode(text).ids
    padded = torch.tensor([ids + [0] * (LENGTH - len(ids))])
    mask = (torch.arange(LENGTH) < len(ids)).long()[None]
    with torch.no_grad():
        expected = oracle(padded, attention_mask=mask).last_hidden_state[0, : len(ids)]
    states = ours(text)
    assert states.shape == (LENGTH, 16) and states.dtype == FP32
    torch.testing.assert_close(states[: len(ids)], expected, rtol=1e-4, atol=1e-5)
    assert bool(states[: len(ids)].abs().sum(1).all()) and not states[len(ids) :].any()


def test_states_equal_those_of_wans_own_layers(release: Path) -> None:
    ours = load_text_encoder(release / released.TEXT, release / "google/umt5-xxl", CPU, FP32)
    ids = [4, 5, 6] * 15 + [1]  # far enough for the buckets of long distances
    tensors = released.umt5_original(released.umt5())
    expected = wan_text_states(tensors, torch.tensor(ids))
    with torch.no_grad():
        states = ours.net(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_the_authors_names_give_the_same_text_encoder(release: Path, pipeline: Path) -> None:
    words = release / "google/umt5-xxl"
    original = load_text_encoder(release / released.TEXT, words, CPU, FP32)
    folder = load_text_encoder(pipeline / "text_encoder", words, CPU, FP32)
    assert same_state(original.net, folder.net) and same_state(folder.net, released.umt5())
    assert torch.equal(original("a blue person"), folder("a blue person"))
    assert original.net.encoder.embed_tokens.weight is original.net.shared.weight  # 2 GB of 11
    half = load_text_encoder(release / released.TEXT, words, CPU, torch.bfloat16)
    assert {p.dtype for p in half.net.parameters()} == {torch.bfloat16}
    assert half("a person").dtype == FP32


@pytest.mark.parametrize("words", [1, 40, 510, 511, 512, 700])
def test_a_truncated_text_keeps_its_end_token(pipeline: Path, words: int) -> None:
    ours = load_text_encoder(pipeline / "text_encoder", pipeline / "tokenizer", CPU, FP32)
    given = []
    ours.net.register_forward_pre_hook(lambda net, inputs: given.append(inputs[0][0].tolist()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        states = ours(" ".join(["blue"] * words))
    cut = [str(one.message) for one in caught if "tokens is cut" in str(one.message)]
    assert len(cut) == (words + 1 > LENGTH)
    assert len(given[0]) == min(words + 1, LENGTH) and given[0][-1] == 1
    assert int(states.any(dim=1).sum()) == len(given[0])


def test_cleaning_equals_that_of_wan() -> None:
    assert cleaned("  a &amp;amp; b\n\n c\t“d” ") == 'a & b c "d"'
    assert cleaned("schÃ¶n") == "schön"
    assert as_written(" a\n&amp; ") == " a\n&amp; "


def test_cleaning_is_optional(pipeline: Path) -> None:
    paths = pipeline / "text_encoder", pipeline / "tokenizer"
    plain = load_text_encoder(*paths, CPU, FP32)
    clean = load_text_encoder(*paths, CPU, FP32, clean=cleaned)
    assert torch.equal(clean("a   blue\nperson"), plain("a blue person"))
    assert not torch.equal(plain("a   blue\nperson"), plain("a blue person"))


def test_a_tokenizer_other_than_umt5s_is_refused(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer.json: not there.*google/umt5-xxl"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="tokenizer.json: damaged"):
        load_tokenizer(tmp_path)
    endless = released.tokenizer()
    endless.post_processor = None
    endless.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WeightsError, match="does not end a text with </s>"):
        load_tokenizer(tmp_path)
    larger = released.tokenizer()
    larger.add_tokens([f"<extra_{n}>" for n in range(30)])
    larger.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WeightsError, match="50 tokens, the text encoder .* has 20"):
        load_text_encoder(pipeline / "text_encoder", tmp_path, CPU, FP32)
