"""What `echolab generate` takes, and what of it goes together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from echolab.diffusion.pipeline import PRESETS, Recipe, check_recipe
from echolab.errors import ConfigError
from echolab.geometry import WAN
from echolab.tasks.table import DEFAULT_TASK, LOCAL_TASKS, TASK_TABLE, TASKS, tasks_with

DEMO_CHECKPOINT = Path("runs/demo/seed_0/dpo")
DEMO_VIDEO = Path("runs/demo/networks/autoencoder.safetensors")
SIZES = {"demo": 64, "preview": 768, "flash": 768}  # pixels; of the released scripts
CROPS = {"demo": "head", "preview": "whole", "flash": "whole"}
CHUNK_OVERLAP = 8  # known frames of a chunk, as released
WAV2VEC = {"preview": "wav2vec2-base-960h", "flash": "chinese-wav2vec2-base"}
PRESET_OF = {None: "demo", "echomimicv3_flash": "flash"}  # of a model; the preview's for the rest
WHY = {
    "image": "the picture that speaks", "last": "the picture that it ends with",
    "source": "a video", "audio": "the sound to speak",
}  # fmt: skip
ALTERED = (  # arguments that replace a number of the preset
    "solver", "grid", "steps", "shift", "text_scale", "audio_scale", "decaying", "negative",
    "negative_scale", "negative_steps", "negative_mode", "window", "overlap",
)  # fmt: skip


@dataclass(frozen=True)
class GenerateArguments:
    """Make a picture speak, or make a part of a video anew.

    The task says what is given: t2v nothing but words, i2v a picture, flf2v the first and the last
    picture, avatar_sync and lip_sync a video of which the head or the mouth is made anew,
    continuation a video whose last eight frames are gone on from.  The video is as long as the
    sound.  Faces are found by YuNet (see `weights`), or given by `face` or `box`.

    What is not named is the preset's.  demo: Euler, 12 steps, shift 3, audio 2, windows of 25
    frames.  preview: Euler, 25 steps, shift 5, text 4, audio 2.9, decaying, windows of 113.
    flash: UniPC, 8 steps, shift 5, audio 3, windows of 81.
    """

    out: Path = field(metadata={"help": "the mp4 file to write"})
    task: str = field(default=DEFAULT_TASK, metadata={"help": f"one of {', '.join(TASKS)}"})
    image: Path | None = field(default=None, metadata={"help": "a picture with one face"})
    audio: Path | None = field(
        default=None, metadata={"help": "speech, any format that FFmpeg reads"}
    )
    last: Path | None = field(default=None, metadata={"help": "flf2v: the last picture"})
    source: Path | None = field(default=None, metadata={"help": f"{tasks_with('source')}: a video"})
    prompt: str = field(default="a talking person", metadata={"help": "what is to be seen"})
    negative: str | None = field(
        default=None, metadata={"help": "what is not to be seen; matters where text_scale is not 1"}
    )
    checkpoint: Path = field(
        default=DEMO_CHECKPOINT,
        metadata={"help": "a run, one of its checkpoints, or a released file (see model)"},
    )
    model: str | None = field(
        default=None, metadata={"help": "name of a released model, such as echomimicv3_preview"}
    )
    lora: Path | None = field(
        default=None,
        metadata={
            "help": "adapters to add to a released model: a folder of peft or diffusers, or a "
            "file of diffusers, kohya or ComfyUI"
        },
    )
    encoders: Path | None = field(
        default=None, metadata={"help": "folder of the released encoders (with model)"}
    )
    wav2vec: Path | None = field(
        default=None, metadata={"help": "folder of wav2vec2, where it is not in encoders"}
    )
    video: Path = field(
        default=DEMO_VIDEO, metadata={"help": "the autoencoder that a run was trained with"}
    )
    face: tuple[float, ...] | None = field(
        default=None, metadata={"help": "x0,y0,x1,y1 of the face in the picture or source, pixels"}
    )
    box: tuple[float, ...] | None = field(
        default=None,
        metadata={"help": "avatar_sync: as face; lip_sync: x0,y0,x1,y1 of a mouth that stays put"},
    )
    preset: Literal["demo", "preview", "flash"] | None = field(
        default=None, metadata={"help": "how to sample; the model's own where none is named"}
    )
    size: int | None = field(
        default=None, metadata={"help": "side of a square with the video's area, in pixels"}
    )
    width: int | None = field(default=None, metadata={"help": "of the video, with height"})
    height: int | None = field(default=None, metadata={"help": "of the video, with width"})
    crop: Literal["head", "whole"] | None = field(
        default=None, metadata={"help": "a square around the head, or the whole picture"}
    )
    solver: Literal["euler", "unipc", "dpmpp"] | None = field(
        default=None, metadata={"help": "of the velocity field"}
    )
    grid: Literal["even", "wan", "flow_match"] | None = field(
        default=None, metadata={"help": "of the noise levels, before the shift"}
    )
    steps: int | None = field(default=None, metadata={"help": "of the sampler"})
    shift: float | None = field(default=None, metadata={"help": "of the sampler's noise levels"})
    text_scale: float | None = field(default=None, metadata={"help": "guidance by words; 1: none"})
    audio_scale: float | None = field(default=None, metadata={"help": "guidance by sound; 1: none"})
    decaying: bool | None = field(default=None, metadata={"help": "guidance falls to its half"})
    negative_scale: float | None = field(
        default=None, metadata={"help": "of the negative text in the first steps"}
    )
    negative_steps: int | None = field(default=None, metadata={"help": "how many these are"})
    negative_mode: Literal["phase", "compounding"] | None = field(
        default=None, metadata={"help": "compounding: as the released code multiplies"}
    )
    long: Literal["windows", "chunks"] = field(
        default="windows", metadata={"help": "joint windows, or one chunk after another"}
    )
    window: int | None = field(
        default=None, metadata={"ge": 5, "help": "frames made at once, 4n+1"}
    )
    overlap: int | None = field(
        default=None,
        metadata={"ge": 0, "help": "latent frames that windows share; frames of chunks (8)"},
    )
    branches: Literal["batch", "sequence"] = field(
        default="batch", metadata={"help": "of guidance; in sequence they need less memory"}
    )
    devices: int = field(
        default=1, metadata={"help": "that share the video's tokens; must divide the heads"}
    )
    cache: float = field(
        default=0.0, metadata={"help": "TeaCache threshold, such as 0.1; 0 computes every step"}
    )
    match_colours: bool = field(
        default=False, metadata={"help": "give every frame the first one's colours"}
    )
    paste_known: bool = field(
        default=True,
        metadata={
            "help": "lip_sync, avatar_sync: the source's own pixels outside of what is made anew, "
            "with a feathered edge; false: all pixels as generated"
        },
    )
    seconds: float | None = field(default=None, metadata={"help": "of the sound to use"})
    seed: int = field(default=0, metadata={"ge": 0, "help": "of the noise"})
    weights: Path | None = field(default=None, metadata={"help": "folder of the face models"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})

    def check(self) -> None:
        """ConfigError for values that cannot be, or do not go together."""
        if self.out.suffix != ".mp4":
            raise ConfigError(f"out={self.out}: must end in .mp4")
        self._check_files()
        if self.seconds is not None and not 0 < self.seconds < 3600:
            raise ConfigError(f"seconds={self.seconds}: must be above 0 and below 3600")
        if not 0 <= self.cache < 100:
            raise ConfigError(f"cache={self.cache}: must be 0 or more; 0.1 is usual")
        if self.devices < 1 or (self.devices > 1 and self.cache):
            raise ConfigError(f"devices={self.devices}: must be 1 or more, and 1 with cache=")
        if (self.width is None) != (self.height is None):
            raise ConfigError("width= and height= go together; give both, or size=")
        for name in ("size", "width", "height"):
            side = getattr(self, name)
            if side is not None and (side < 32 or side % WAN.token_pixels):
                raise ConfigError(
                    f"{name}={side}: must be a multiple of {WAN.token_pixels}, and 32 or more"
                )
        for name in ("face", "box"):
            box = getattr(self, name)
            if box is not None and not (len(box) == 4 and box[0] < box[2] and box[1] < box[3]):
                raise ConfigError(
                    f"{name}={box}: give four numbers, x0,y0,x1,y1, with x0<x1 and y0<y1"
                )

    def _check_files(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task={self.task}: unknown; one of {', '.join(TASKS)}")
        needed, allowed = TASK_TABLE[self.task].inputs, TASK_TABLE[self.task].optional_inputs
        for name in WHY:
            given = getattr(self, name) is not None
            if name in needed and not given:
                raise ConfigError(f"task={self.task}: needs {name}=, {WHY[name]}")
            if given and name not in (*needed, *allowed):
                takes = ", ".join(f"{word}=" for word in (*needed, *allowed))
                raise ConfigError(f"task={self.task}: takes no {name}=; it is given {takes}")
        if self.audio is None and self.seconds is None:
            raise ConfigError("without audio= the length is not known; give seconds=")
        if self.face is not None and not TASK_TABLE[self.task].has_known:
            raise ConfigError(
                f"task={self.task}: takes no face=; it is given no picture, leave it out"
            )
        if self.wav2vec is not None and self.model is None:
            raise ConfigError(f"wav2vec={self.wav2vec}: is for model=; leave it out with a run")
        if self.box is not None and self.task not in LOCAL_TASKS:
            raise ConfigError(
                f"task={self.task}: takes no box=; that is for {', '.join(LOCAL_TASKS)}"
            )
        if (self.model is None) != (self.encoders is None):
            raise ConfigError("model= and encoders= go together: a released model and its encoders")
        if self.lora is not None and self.model is None:
            raise ConfigError(f"lora={self.lora}: is for model=; a run has its adapters with it")

    @property
    def speech(self) -> Literal["preview", "flash"]:
        """Which of the released sound encoders the model hears by."""
        return "flash" if self.model == "echomimicv3_flash" else "preview"

    @property
    def wav2vec_folder(self) -> Path:
        """Where wav2vec2 lies: by default beside the other encoders, under its own name."""
        return self.wav2vec or (self.encoders or Path()) / WAV2VEC[self.speech]

    @property
    def preset_name(self) -> str:
        """The preset asked for, or the model's."""
        return self.preset or PRESET_OF.get(self.model, "preview")

    def recipe(self) -> Recipe:
        """The preset with what was asked for instead; ConfigError where that cannot be."""
        asked = {name: getattr(self, name) for name in ALTERED}
        changes = {name: value for name, value in asked.items() if value is not None}
        if self.long == "chunks" and self.overlap is None:
            changes["overlap"] = CHUNK_OVERLAP
        recipe = check_recipe(PRESETS[self.preset_name]._replace(**changes))
        without = [name for name in changes if name.startswith("negative")]
        if without and recipe.text_scale == 1:
            raise ConfigError(
                f"{without[0]}={changes[without[0]]}: does nothing without guidance by words "
                "(text_scale=1); give text_scale=4, or leave it out"
            )
        return recipe
