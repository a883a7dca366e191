"""IQA and ASE: image quality and aesthetics by the words of a vision-language model (Q-Align).

Q-Align (Wu et al. 2023) asks a model for the quality of an image and reads the probabilities of
five words.  Its released network needs code from the hub, which is not run here; the same question
can be put to every model of transformers.  Values of two models cannot be compared, so the card
names the model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from echolab.encoders.files import sha256_of
from echolab.errors import ConfigError, WeightsError
from echolab.metrics.card import Card
from echolab.metrics.metric import Score, VideoClip, VideoMetric, mean_score
from echolab.metrics.one_face import image_of
from echolab.metrics.setup import Setup
from echolab.vision.faces import Image

WORDS = ("excellent", "good", "fair", "poor", "bad")
WEIGHTS = (1.0, 0.75, 0.5, 0.25, 0.0)
ASPECTS = {"iqa": "quality", "ase": "aesthetics"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CLIP_MEAN = (122, 116, 104)  # RGB, the mean color of CLIP's training images
QUESTION = "How would you rate the {aspect} of this image?"
ANSWER = "The {aspect} of the image is"


def unit_score(logits: Tensor) -> Tensor:
    """Return the score, 0 to 1, of logits [..., 5] of the words from excellent to bad.

    The softmax is over the five words only.
    """
    return logits.double().softmax(-1) @ torch.tensor(WEIGHTS, dtype=torch.float64)


def five_point_score(unit: Tensor) -> Tensor:
    """Convert scores of 0 to 1 to 1 to 5, the scale of papers and of the released `model.score`."""
    return 1 + 4 * unit


def pad_to_square(image: Image) -> Image:
    """Center an image [Y, X, 3] in a square of CLIP's mean color."""
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), CLIP_MEAN, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


class QAlign:
    """Rates images by a vision-language model from a local folder."""

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Load a folder in the layout of transformers.

        Raise WeightsError if it is missing, needs code of its own, has no safetensors, or splits
        one of the five words into several tokens.
        """
        if not folder.is_dir():
            raise WeightsError(f"{folder}: no such folder; download a vision-language model to it")
        # Files are read from the folder only, and code in it is never run.
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor = AutoProcessor.from_pretrained(folder, **local)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, use_safetensors=True, dtype=dtype, **local
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise WeightsError(
                f"{folder}: transformers cannot load it without code from the hub ({reason}); use "
                "a model that transformers has a class for"
            ) from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype
        self.name = f"{type(model).__name__} {folder.name}"
        self.sha256 = sha256_of(sorted(folder.glob("*.safetensors")))
        self.prompts = {name: self._prompt(aspect) for name, aspect in ASPECTS.items()}
        self.tokens = {name: self._word_tokens(prompt) for name, prompt in self.prompts.items()}

    def _prompt(self, aspect: str) -> str:
        """Return the question and the beginning of the answer, in the model's chat format."""
        question, answer = QUESTION.format(aspect=aspect), ANSWER.format(aspect=aspect)
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "text", "text": question}, {"type": "image"}]
            chat: str = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            return f"{chat.rstrip()} {answer}"
        # Q-Align's own format, that of LLaVA 1 and mPLUG-Owl2.
        return f"USER: {question}\n{self.processor.image_token}\nASSISTANT: {answer}"

    def _word_tokens(self, prompt: str) -> list[int]:
        """Return the token of each word, as it follows the prompt."""
        tokenizer = self.processor.tokenizer
        start = tokenizer.encode(prompt, add_special_tokens=False)
        tokens = []
        for word in WORDS:
            extended = tokenizer.encode(f"{prompt} {word}", add_special_tokens=False)
            # An unknown word would be one token too, so compare its text.
            is_one = extended[:-1] == start and tokenizer.decode(extended[-1:]).strip() == word
            if not is_one:
                raise WeightsError(
                    f"{self.name}: '{word}' is not one token; use a model whose vocabulary has "
                    f"{', '.join(WORDS)}"
                )
            tokens.append(extended[-1])
        return tokens

    def logits(self, image: Image, name: str) -> Tensor:
        """Return the logits [5] of the words for an image and the score `iqa` or `ase`."""
        # The processor scales to the size of the network; a square keeps the edges of the frame.
        square = PillowImage.fromarray(pad_to_square(image))
        inputs = self.processor(images=[square], text=[self.prompts[name]], return_tensors="pt")
        with torch.no_grad():
            output = self.model(**inputs.to(self.device, self.dtype))
        logits: Tensor = output.logits[0, -1, self.tokens[name]]
        return logits.float().cpu()

    def rate(self, image: Image, name: str) -> float:
        """Return the score of an image, 1 to 5, for the score `iqa` or `ase`."""
        return float(five_point_score(unit_score(self.logits(image, name))))


class Quality(VideoMetric):
    """Image quality and aesthetics on the scale of 1 to 5, `iqa` and `ase`; higher is better."""

    EMPTY = "no frames"
    NOT_FINITE = "logits that are not finite"
    reasons = (EMPTY, NOT_FINITE)

    def __init__(self, num_clips: int, judge: QAlign) -> None:
        super().__init__(num_clips)
        self.judge = judge
        for name in ASPECTS:
            self.add_table(name)

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the mean over one frame per second, the first of each."""
        # Neighboring frames have nearly the same quality, and each costs two passes of the model.
        step = max(1, round(clip.fps))
        images = [image_of(frame) for frame in clip.frames[::step]]
        if not images:
            return self.EMPTY
        # Half precision may overflow in a network that was trained in another one.
        means = [float(np.mean([self.judge.rate(i, name) for i in images])) for name in ASPECTS]
        if not np.isfinite(means).all():
            return self.NOT_FINITE
        for name, mean in zip(ASPECTS, means, strict=True):
            getattr(self, name)[index] = mean
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the means over clips."""
        return {name: mean_score(getattr(self, name)[scored]) for name in ASPECTS}

    def cards(self) -> dict[str, Card]:
        """Return the cards of both scores."""
        return {
            name: Card(
                metric=name,
                definition=f"Q-Align of {aspect}: softmax over {', '.join(WORDS)} with weights "
                "1, 0.75, 0.5, 0.25, 0, as 1 + 4 x (scale 1 to 5, not 0 to 1); mean of one frame "
                "per second, then over clips",
                preprocessing="padded to a square of CLIP's mean color, then the model's processor",
                network=self.judge.name,
                weights=self.judge.sha256,
                license="that of the model",
                settings={
                    "scale": "1 to 5",
                    "prompt": self.judge.prompts[name],
                    "dtype": str(self.judge.dtype),
                },
            )
            for name, aspect in ASPECTS.items()
        }


# -- the functions that a configuration names ------------------------------------------------------


def qalign(
    setup: Setup, *, folder: str, device: str = "cpu", dtype: str = "bfloat16"
) -> VideoMetric:
    """Build IQA and ASE with the vision-language model in a folder of the setup's networks.

    Raise ConfigError for a type that is not bfloat16, float16 or float32, and WeightsError.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: not one of {', '.join(DTYPES)}; give one")
    return Quality(setup.num_clips, QAlign(setup.file(folder), device=device, dtype=DTYPES[dtype]))
