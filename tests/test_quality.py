"""Q-Align's arithmetic, and a tiny vision-language model of a released class from a folder."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scored import constant_frames, flags_of, scores_of
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from echolab.errors import WeightsError
from echolab.metrics.metric import VideoClip
from echolab.metrics.quality import (
    CLIP_MEAN,
    WORDS,
    QAlign,
    Quality,
    five_point_score,
    pad_to_square,
    unit_score,
)


def test_the_head_weighs_the_five_words_by_hand() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0])
    share = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
    expected = share @ [1, 0.75, 0.5, 0.25, 0]
    assert float(unit_score(logits)) == pytest.approx(expected, rel=1e-6)
    assert unit_score(torch.zeros(5)).item() == pytest.approx(0.5)
    sure = torch.eye(5) * 1e4
    assert unit_score(sure).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    # A shift of all logits changes nothing.
    assert float(unit_score(logits + 7)) == pytest.approx(expected, rel=1e-6)


def test_the_two_scales_of_published_values() -> None:
    """The released `model.score` returns 1 to 5, the repository's scorers 0 to 1."""
    assert five_point_score(torch.tensor([0.0, 0.5, 1.0])).tolist() == [1, 3, 5]
    assert float(five_point_score(torch.tensor(0.22775))) == pytest.approx(1.911)


def test_images_are_centered_in_a_square_of_the_mean_color() -> None:
    image = np.full((40, 30, 3), 7, np.uint8)
    square = pad_to_square(image)
    assert square.shape == (40, 40, 3)
    assert (square[:, 5:35] == 7).all()
    assert (square[:, :5] == CLIP_MEAN).all() and (square[:, 35:] == CLIP_MEAN).all()
    assert np.array_equal(pad_to_square(image[:30]), image[:30])


TEXT = "USER : How would you rate the quality aesthetics of this image ? ASSISTANT The is"


def write_model(folder: Path, words: str, chat_template: str | None = None) -> Path:
    """Write a tiny LLaVA with random weights and a vocabulary of words."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocabulary = ["<unk>", "<image>", *TEXT.split(), *words.split()]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    side = {"height": 28, "width": 28}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side),
        tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat_template,
    ).save_pretrained(folder)  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                num_hidden_layers=2, image_size=28, patch_size=14, **small
            ),
            text_config=LlamaConfig(
                vocab_size=len(vocabulary), num_hidden_layers=1, num_key_value_heads=2, **small
            ),
            image_token_index=1,
        )
    )
    model.save_pretrained(folder)
    return folder


@cache
def judge(folder: Path) -> QAlign:
    """Return a tiny model in fp32."""
    return QAlign(write_model(folder, " ".join(WORDS)), dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QAlign:
    """Return one tiny model for all tests."""
    return judge(tmp_path_factory.mktemp("tiny") / "tiny-llava")


def test_the_question_of_qalign_is_put_to_the_model(model: QAlign) -> None:
    assert model.prompts["iqa"] == (
        "USER: How would you rate the quality of this image?\n<image>\nASSISTANT: The quality of "
        "the image is"
    )
    names = model.processor.tokenizer.convert_ids_to_tokens(model.tokens["ase"])
    assert tuple(names) == WORDS


def test_the_logits_are_those_of_the_next_token(model: QAlign) -> None:
    """They depend on the image, the question, and the five rows of the output layer."""
    image = np.random.default_rng(0).integers(0, 255, (20, 40, 3)).astype(np.uint8)
    logits = model.logits(image, "iqa")
    assert logits.shape == (5,)
    assert not torch.allclose(logits, model.logits(image, "ase"))
    assert not torch.allclose(logits, model.logits(255 - image, "iqa"))
    head = model.model.lm_head.weight.data
    head[model.tokens["iqa"][2]] *= 2
    changed = model.logits(image, "iqa")
    head[model.tokens["iqa"][2]] /= 2
    torch.testing.assert_close(changed / logits, torch.tensor([1.0, 1, 2, 1, 1]))


def test_a_video_is_scored_once_per_second(model: QAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted logits: bright images are excellent, dark ones bad."""
    seen = []

    def logits(image: np.ndarray, name: str) -> torch.Tensor:
        seen.append((int(image[0, 0, 0]), name))
        return torch.eye(5)[0 if image[0, 0, 0] > 128 else 4] * 1e4

    monkeypatch.setattr(model, "logits", logits)
    frames = constant_frames([200] * 25 + [10] * 25 + [200] * 10, 28)
    scores = scores_of(Quality(1, model), VideoClip("a", frames))
    assert scores["iqa"].value == scores["ase"].value == pytest.approx((5 + 1 + 5) / 3)
    assert [level for level, name in seen if name == "iqa"] == [200, 10, 200]
    card = Quality(1, model).cards()["iqa"]
    assert card.network == "LlavaForConditionalGeneration tiny-llava" and len(card.weights) == 64
    assert card.settings["scale"] == "1 to 5" and "quality" in card.settings["prompt"]


def test_clips_without_frames_or_finite_logits_are_flagged(
    model: QAlign, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = VideoClip("a", constant_frames([]))
    assert flags_of(lambda n: Quality(n, model), empty) == {"no frames"}
    monkeypatch.setattr(model, "logits", lambda image, name: torch.full((5,), torch.nan))
    one = VideoClip("a", constant_frames([100] * 5, 28))
    assert flags_of(lambda n: Quality(n, model), one) == {"logits that are not finite"}


def test_a_chat_format_of_the_model_is_used(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }} : {% for c in m.content %}"
        "{{ c.text if c.type == 'text' else ' <image>' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT : {% endif %}"
    )
    folder = write_model(tmp_path / "chat", " ".join(WORDS), template)
    chat = QAlign(folder, dtype=torch.float32)
    assert chat.prompts["ase"] == (
        "user : How would you rate the aesthetics of this image? <image> ASSISTANT : The "
        "aesthetics of the image is"
    )
    assert 1 <= chat.rate(np.zeros((28, 28, 3), np.uint8), "ase") <= 5


def test_models_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such folder; download"):
        QAlign(tmp_path / "missing")
    # Code of a repository is not run: such a model has a type that transformers does not know.
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text('{"model_type": "mplug_owl2"}')
    with pytest.raises(WeightsError, match="without code from the hub"):
        QAlign(hub)
    short = write_model(tmp_path / "short", "excellent good fair poor")
    with pytest.raises(WeightsError, match="'bad' is not one token; use a model"):
        QAlign(short)
