"""The arguments of `echolab generate`, checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from echolab.arguments import argument, check_exists
from echolab.config.folders import architecture_of
from echolab.errors import ConfigError
from echolab.geometry import WAN
from echolab.tasks.table import DEFAULT_TASK, LOCAL_TASKS, TASK_TABLE, TASKS, tasks_with

if TYPE_CHECKING:
    from echolab.diffusion.pipeline import SamplerConfig

DEMO_CHECKPOINT = Path("runs/demo/seed_0/dpo")
DEMO_VAE = Path("runs/demo/networks/autoencoder.safetensors")
SIZES = {"demo": 64, "preview": 768, "flash": 768}  # pixels, as in the released scripts
CROPS = {"demo": "head", "preview": "frame", "flash": "frame"}
# Default of the released scripts.
CHUNK_OVERLAP = 8  # frames that a chunk shares with the previous one
# The speech encoder of each released model.
WAV2VEC = {"preview": "wav2vec2-base-960h", "flash": "chinese-wav2vec2-base"}
# Preset by model; other models use preview.
PRESET_OF = {None: "demo", "echomimicv3_flash": "flash"}
INPUT_TITLES = {
    "image": "the image to animate", "last_image": "the image to end with",
    "source_video": "a video", "audio": "the speech",
}  # fmt: skip
# Arguments that replace a field of the preset.
PRESET_FIELDS = (
    "solver", "sigma_schedule", "num_steps", "flow_shift", "guidance_scale", "audio_guidance_scale",
    "dynamic_guidance", "negative_prompt", "negative_scale", "negative_steps", "negative_mode",
    "window", "overlap",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Animate an image, or regenerate a part of a video, from speech.

    Presets: demo is Euler, 12 steps, shift 3, audio guidance 2, windows of 25 frames.  preview is
    Euler, 25 steps, shift 5, text guidance 4, audio guidance 2.9, dynamic, windows of 113.  flash
    is UniPC, 8 steps, shift 5, audio guidance 3, windows of 81.
    """

    task: str = argument(
        "; ".join(f"{task.name}: {task.given}" for task in TASK_TABLE.values()), DEFAULT_TASK,
        section="Inputs", choices=TASKS,
    )  # fmt: skip
    image: Path | None = argument(f"image with one face; {tasks_with('image')}", None)
    last_image: Path | None = argument(
        f"last image; {tasks_with('last_image')}", None, aka=("last", "image_end")
    )
    source_video: Path | None = argument(
        f"video; {tasks_with('source_video')}", None, aka=("source", "video")
    )
    audio: Path | None = argument(
        "speech, in any format that FFmpeg reads; sets the video's length", None,
        aka=("sound", "speech"),
    )  # fmt: skip
    seconds: float | None = argument(
        "seconds of the audio to use", None, gt=0, lt=3600, default_text="all"
    )
    prompt: str = argument("text prompt", "a talking person", aka=("text",))
    face: tuple[float, ...] | None = argument(
        "x0,y0,x1,y1 of the face in the image or video, pixels", None, default_text="detected"
    )
    box: tuple[float, ...] | None = argument(
        "x0,y0,x1,y1 of a still face (avatar_sync) or mouth (lip_sync), pixels", None,
        default_text="tracked",
    )  # fmt: skip

    out: Path = argument("MP4 file to write", section="Output")
    size: int | None = argument(
        "side of a square with the video's area, pixels", None, ge=32, default_text="preset's"
    )
    width: int | None = argument("width with height=, pixels", None, ge=32, default_text="by size")
    height: int | None = argument("height with width=, pixels", None, ge=32, default_text="by size")
    crop: Literal["head", "frame"] | None = argument(
        "square around the head, or the full frame", None, default_text="preset's"
    )
    paste_known: bool = argument(
        "copy the source's pixels outside the regenerated part, with a feathered edge; "
        f"{', '.join(LOCAL_TASKS)}", True,
    )  # fmt: skip
    match_colors: bool = argument(
        "match the colors of every frame to the first", False, aka=("match_colours",)
    )
    format: Literal["text", "json"] = argument("summary format", "text")

    preset: Literal["demo", "preview", "flash"] | None = argument(
        "defaults of sampling", None, section="Sampling", default_text="model's"
    )
    solver: Literal["euler", "unipc", "dpmpp"] | None = argument(
        "ODE solver", None, default_text="preset's", aka=("sampler", "scheduler")
    )
    num_steps: int | None = argument(
        "solver steps", None, ge=1, default_text="preset's", aka=("steps", "num_inference_steps")
    )
    sigma_schedule: Literal["even", "wan", "flow_match"] | None = argument(
        "noise levels before the shift", None, default_text="preset's", aka=("grid", "sigmas")
    )
    flow_shift: float | None = argument(
        "shift of the noise levels", None, gt=0, lt=100, default_text="preset's", aka=("shift",)
    )
    seed: int = argument("noise seed", 0, ge=0)

    guidance_scale: float | None = argument(
        "text guidance, 1 for none", None, section="Guidance", ge=0, default_text="preset's",
        aka=("text_scale", "cfg_scale", "scale"),
    )  # fmt: skip
    audio_guidance_scale: float | None = argument(
        "audio guidance, 1 for none", None, ge=0, default_text="preset's", aka=("audio_scale",)
    )
    dynamic_guidance: bool | None = argument(
        "decay guidance to half over the steps", None, default_text="preset's", aka=("decaying",)
    )
    negative_prompt: str | None = argument(
        "negative prompt; needs guidance_scale other than 1", None, default_text="preset's",
        aka=("negative",),
    )  # fmt: skip
    negative_scale: float | None = argument(
        "scale of the negative prompt's states in the first steps", None, default_text="preset's"
    )
    negative_steps: int | None = argument(
        "steps with negative_scale", None, ge=0, default_text="preset's"
    )
    negative_mode: Literal["phase", "compounding"] | None = argument(
        "apply negative_scale once, or multiplied from step to step as released", None,
        default_text="preset's",
    )  # fmt: skip

    long_video: Literal["joint", "chunked"] = argument(
        "denoise windows jointly, or generate one chunk after another", "joint",
        section="Long video", aka=("long",),
    )  # fmt: skip
    window: int | None = argument(
        "frames of a window or chunk, 4n+1", None, ge=5, default_text="preset's"
    )
    overlap: int | None = argument(
        "latent frames that windows share, or frames that chunks share", None, ge=0,
        default_text="preset's, 8 for chunks",
    )  # fmt: skip

    cfg: Literal["batched", "sequential"] = argument(
        "guidance branches in one batch, or one by one with less memory", "batched",
        section="Memory and speed", aka=("branches",),
    )  # fmt: skip
    devices: int = argument(
        "devices that share the tokens of the video; must divide the attention heads", 1, ge=1
    )
    teacache_threshold: float = argument(
        "TeaCache threshold, 0 to compute every step, 0.1 usual", 0.0, ge=0, lt=100,
        aka=("cache", "teacache"),
    )  # fmt: skip

    checkpoint: Path = argument(
        "run, checkpoint, or released weights with model=", DEMO_CHECKPOINT, section="Weights",
        aka=("run", "run_dir", "weights"),
    )  # fmt: skip
    vae: Path = argument("demo autoencoder of a run", DEMO_VAE, aka=("video",))
    model: str | None = argument(
        "architecture of released weights, a name in conf/model", None, default_text="run's"
    )
    lora: Path | None = argument(
        "adapters for model=: folder of peft or diffusers, file of diffusers, kohya or ComfyUI",
        None,
    )
    encoder_dir: Path | None = argument(
        "folder of released encoders, with model=", None, aka=("encoders",)
    )
    wav2vec: Path | None = argument("folder of wav2vec2", None, default_text="in encoder_dir")
    face_models: Path | None = argument(
        "folder of the face detector and landmark models", None,
        default_text="ECHOLAB_WEIGHTS, cache", aka=("weights",),
    )  # fmt: skip

    def check(self) -> None:
        """Raise ConfigError for values that are out of range or cannot be combined."""
        if self.out.suffix != ".mp4":
            raise ConfigError(f"out={self.out}: must end in .mp4")
        self._check_inputs()
        # Options that cannot be combined.
        if self.devices > 1 and self.teacache_threshold:
            raise ConfigError(f"devices={self.devices}: must be 1 with teacache_threshold=")
        if (self.width is None) != (self.height is None):
            raise ConfigError("width= and height= go together; give both, or size=")
        # Sides are multiples of a token, boxes have a positive area.
        for name in ("size", "width", "height"):
            side = getattr(self, name)
            if side is not None and side % WAN.token_pixels:
                raise ConfigError(f"{name}={side}: must be a multiple of {WAN.token_pixels}")
        for name in ("face", "box"):
            box = getattr(self, name)
            if box is not None and not (len(box) == 4 and box[0] < box[2] and box[1] < box[3]):
                raise ConfigError(
                    f"{name}={box}: give four numbers, x0,y0,x1,y1, with x0<x1 and y0<y1"
                )

    def check_files(self) -> None:
        """Raise ConfigError for an input, weights or a folder of models that does not exist."""
        # Inputs first, then the weights of the released model or of the run.
        check_exists(self, "image", "last_image", "source_video", "audio", "face_models")
        if self.model is None:
            check_exists(self, "checkpoint", "vae")
        else:
            architecture_of(self.model)
            check_exists(self, "checkpoint", "encoder_dir", "wav2vec", "lora")

    def _check_inputs(self) -> None:
        """Raise ConfigError unless the given files are the inputs of the task."""
        # Each given file must be an input of the task.
        task = TASK_TABLE[self.task]
        required, optional = task.inputs, task.optional_inputs
        for name, title in INPUT_TITLES.items():
            is_given = getattr(self, name) is not None
            if name in required and not is_given:
                raise ConfigError(f"task={self.task}: needs {name}=, {title}")
            if is_given and name not in (*required, *optional):
                inputs = ", ".join(f"{word}=" for word in (*required, *optional))
                raise ConfigError(f"task={self.task}: takes no {name}=; its inputs are {inputs}")
        # The audio sets the length, unless seconds= does.
        if self.audio is None and self.seconds is None:
            raise ConfigError("seconds=none: the length is unknown without audio=; give seconds=")
        if self.face is not None and not task.has_known:
            raise ConfigError(
                f"task={self.task}: takes no face=, since it has no image; leave it out"
            )
        if self.box is not None and not task.local:
            raise ConfigError(
                f"task={self.task}: takes no box=; that is for {', '.join(LOCAL_TASKS)}"
            )
        if (self.model is None) != (self.encoder_dir is None):
            raise ConfigError(
                "model= and encoder_dir= go together: a released model and its encoders"
            )
        if self.wav2vec is not None and self.model is None:
            raise ConfigError(f"wav2vec={self.wav2vec}: is for model=; leave it out with a run")
        if self.lora is not None and self.model is None:
            raise ConfigError(f"lora={self.lora}: is for model=; a run has its adapters with it")

    @property
    def speech(self) -> Literal["preview", "flash"]:
        """The released speech encoder of the model."""
        return "flash" if self.model == "echomimicv3_flash" else "preview"

    @property
    def wav2vec_folder(self) -> Path:
        """The folder of wav2vec2; default: its released name in `encoder_dir`."""
        return self.wav2vec or (self.encoder_dir or Path()) / WAV2VEC[self.speech]

    @property
    def preset_name(self) -> str:
        """The requested preset, or the default preset of the model."""
        return self.preset or PRESET_OF.get(self.model, "preview")

    def recipe(self) -> SamplerConfig:
        """Return the preset with the requested changes; raise ConfigError for invalid changes."""
        from echolab.diffusion.pipeline import PRESETS, check_sampler

        requested = {name: getattr(self, name) for name in PRESET_FIELDS}
        changes = {name: value for name, value in requested.items() if value is not None}
        if self.long_video == "chunked" and self.overlap is None:
            changes["overlap"] = CHUNK_OVERLAP
        recipe = check_sampler(PRESETS[self.preset_name]._replace(**changes))
        unused = [name for name in changes if name.startswith("negative")]
        if unused and recipe.guidance_scale == 1:
            raise ConfigError(
                f"{unused[0]}={changes[unused[0]]}: does nothing without text guidance "
                "(guidance_scale=1); give guidance_scale=4, or leave it out"
            )
        return recipe
