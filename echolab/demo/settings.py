"""The demo's settings, folders and training plans."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echolab.encoders import demo_audio, demo_image, demo_text
from echolab.errors import ConfigError
from echolab.inference.judging import Sampling
from echolab.preference.settings import PreferenceSettings
from echolab.tasks.curriculum import Curriculum, Stage
from echolab.tasks.table import DEFAULT_TASK, TASKS
from echolab.training.schedule import Epoch, Schedule

SHIFT = 3.0  # of the noise levels: a second at 64 pixels wants less noise than 5 s at 480
ARCHITECTURE: dict[str, Any] = {
    "dim": 256, "ffn_dim": 1024, "num_heads": 4, "num_layers": 4, "in_channels": 36,
    "out_channels": 16, "text_dim": demo_text.SIZE, "image_dim": demo_image.SIZE,
    "audio_dim": demo_audio.SIZE, "freq_dim": 64,
}  # fmt: skip
LEARNING_RATE = 1e-3
PREFERENCE_RATE = (
    1e-4  # a tenth: a preference is a nudge, and larger steps only move both errors up
)
# What was rejected can be left in any direction: the error on it grows without bound unless the
# steps are small and the loss saturates (a beta that follows the margin never lets it).
NEGATIVE_RATE = 2e-5
BATCH = 16
AUDIO_SCALES = (0.0, 1.0, 2.0, 4.0)  # guidance of the candidates that pairs are chosen from
PREFERENCE = PreferenceSettings(beta=100.0, anchor=1.0)


@dataclass(frozen=True)
class DemoSettings:
    """How much of everything."""

    train_clips: int = field(default=640, metadata={"help": "talkers to train on"})
    held_out_clips: int = field(default=64, metadata={"help": "talkers to score on"})
    data_seed: int = field(default=0, metadata={"help": "of the talkers"})
    autoencoder_steps: int = field(default=500, metadata={"help": "of the video autoencoder"})
    sync_steps: int = field(default=220, metadata={"help": "of each of the two SyncNets"})
    feature_steps: int = field(default=160, metadata={"help": "of each feature network"})
    sft_steps: int = field(default=800, metadata={"help": "supervised steps over all tasks"})
    preference_steps: int = field(default=30, metadata={"help": "steps of each kind that follow"})
    prompts: int = field(default=128, metadata={"help": "training clips to sample pairs for"})
    candidates: int = field(default=4, metadata={"help": "samples a prompt"})
    sampling_steps: int = field(default=10, metadata={"help": "of the sampler"})

    def check(self) -> None:
        """ConfigError for figures that cannot be."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, int) and value < (0 if name.endswith("seed") else 1):
                raise ConfigError(f"{name}={value}: must be 1 or more")
        if self.prompts > self.train_clips or self.candidates < 2:
            raise ConfigError(
                f"prompts={self.prompts}, candidates={self.candidates}: at most train_clips="
                f"{self.train_clips} prompts, and 2 candidates or more"
            )
        if min(self.train_clips, self.held_out_clips) < BATCH:
            raise ConfigError(f"train_clips and held_out_clips must be {BATCH} or more")

    def sampling(self) -> Sampling:
        return Sampling(steps=self.sampling_steps, shift=SHIFT, audio_scale=1.5)


class Folder:
    """Where everything of a demo lies."""

    def __init__(self, root: Path, token: str) -> None:
        self.root, self.token = root, token
        self.raw_train, self.raw_held_out = root / "data/raw_train", root / "data/raw_held_out"
        self.train, self.held_out = root / "data/train", root / "data/held_out"
        self.networks, self.samples = root / "networks", root / "samples"
        self.scores, self.report = root / "scores.json", root / "report.html"

    def run(self, name: str, seed: int) -> Path:
        return self.root / f"seed_{seed}" / name

    def candidates(self, seed: int) -> Path:
        return self.root / f"seed_{seed}" / "candidates"

    def pairs(self, seed: int) -> Path:
        return self.root / f"seed_{seed}" / "pairs"


def curriculum_of(steps: int) -> Curriculum:
    """Hard to easy: text to video, then a picture is given, then both ends, the head, the lips.

    Text to video with sound is learnt slowest and helps the others least, so its stage is short.
    """
    lengths = (0.06, 0.44, 0.1, 0.1, 0.1, 0.2)
    stages = []
    for count, length in enumerate(lengths, start=1):
        targets = dict.fromkeys(TASKS[:count], 1.0)
        targets["t2v"] = 1.0 if count == 1 else 0.25
        if count > 1:
            targets[DEFAULT_TASK] = 2.0
        stages.append(Stage(max(1, round(length * steps)), targets))
    return Curriculum(stages, momentum=1 - 20 / max(steps, 40), floor=0.03)


def schedule_of(settings: DemoSettings, name: str) -> Schedule:
    """What each checkpoint is trained by; all but the first go on from `sft`."""
    steps = settings.preference_steps
    if name == "sft":
        rests = max(1, settings.sft_steps // 4)
        epochs = [
            Epoch("sft", max(1, settings.sft_steps - rests), LEARNING_RATE),
            Epoch("sft", rests, LEARNING_RATE / 4),
        ]
        return Schedule(epochs, warmup=min(50, settings.sft_steps // 4))
    total, warmup = 2 * (steps + max(1, steps // 4)), min(10, steps)
    if name == "sft_longer":
        return Schedule([Epoch("sft", total, PREFERENCE_RATE)], warmup=warmup)
    if name == "dpo":
        epochs = [
            Epoch("sft", max(1, steps // 4), PREFERENCE_RATE),
            Epoch("dpo", steps, PREFERENCE_RATE),
        ]
    else:  # nothing but the supervised half says where to go, so it gets as many steps
        epochs = [
            Epoch("sft", total // 2 - total // 4, PREFERENCE_RATE),
            Epoch("ndpo", total // 4, NEGATIVE_RATE),
        ]
    return Schedule(epochs, cycles=2, warmup=warmup)
