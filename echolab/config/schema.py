"""Every setting of `echolab train`: its type, range, choices and meaning.  Imports no torch.

The defaults are in conf/, one file for each choice of a group; this module defines the valid
values.  `check.check` validates a resolved configuration.  Most fields have no default here, so a
setting that is missing here or in conf/ is refused by name.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from echolab.geometry import WAN
from echolab.tasks.table import TASKS

# A limit far above any run, which catches a mistyped exponent.
MANY = 10**9  # steps, clips or samples
SPELLED = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}  # YAML's floats


def as_number(value: Any) -> Any:
    """Return `value` with text read as a number: YAML and the environment give `1e-4` as text.

    Raise ValueError for true and false, which Python counts as 1 and 0.
    """
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    for read in (int, float):
        try:
            return read(SPELLED.get(text, text))
        except ValueError:
            continue
    return value


def as_text(value: Any) -> Any:
    """Return an integer as text, since the command line reads `run_dir=2027` as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


# Types of settings with their ranges; `check.described` puts them into words.
NUMBER = BeforeValidator(as_number)
Size = Annotated[int, Field(ge=1, le=2**18), NUMBER]
Count = Annotated[int, Field(ge=1, le=MANY), NUMBER]
CountOrZero = Annotated[int, Field(ge=0, le=MANY), NUMBER]
Positive = Annotated[float, Field(gt=0), NUMBER]
PositiveOrZero = Annotated[float, Field(ge=0), NUMBER]
Fraction = Annotated[float, Field(ge=0, lt=1), NUMBER]
Seconds = Positive
Shift = Annotated[float, Field(gt=0, le=1000), NUMBER]
Seed = Annotated[int, Field(ge=0, lt=2**63), NUMBER]
# Text without control characters: names of files, or addresses.
Text = Annotated[
    str, BeforeValidator(as_text), StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")
]
# The choices come from the table of tasks, which mypy cannot read.
if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[TASKS]
# Lists that must not be empty.
Tasks = Annotated[list[Task], Field(min_length=1)]
Weights = Annotated[list[PositiveOrZero], Field(min_length=1)]
Datasets = Text | Annotated[list[Text], Field(min_length=1)]


class Section(BaseModel):
    """A part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    """conf/model: sizes of the network."""

    # Sizes of the transformer.
    dim: Size = Field(description="width of the network")
    ffn_dim: Size = Field(description="width of the feed-forward layers")
    num_heads: Size = Field(description="attention heads; 2 x num_heads must divide dim")
    num_layers: Size = Field(description="number of transformer blocks")
    in_channels: Size = Field(
        description="channels of the input: out_channels; with known pixels 2 x that + time_stride"
    )
    out_channels: Size = Field(description="channels of the latents")
    # Widths of the conditions.
    text_dim: Size = Field(description="width of the text features")
    image_dim: Size | None = Field(description="width of the image features; null: no image branch")
    audio_dim: Size | None = Field(description="width of the audio features; null: no audio branch")
    freq_dim: Annotated[int, Field(ge=2, le=2**18, multiple_of=2), NUMBER] = Field(
        description="width of the sinusoidal timestep embedding"
    )
    # Settings with a default here may be missing in YAML files of users.
    audio_layers: Size | None = Field(
        default=None,
        description="wav2vec2 layers that Flash projects; null: the preview's audio projection",
    )
    eps: Positive = Field(default=1e-6, description="epsilon of the normalization layers")
    # Latent geometry: tokens, and the strides of the autoencoder.
    patch_size: Annotated[list[Size], Field(min_length=3, max_length=3)] = Field(
        default=[1, WAN.patch, WAN.patch], description="latents per token: frames, height, width"
    )
    time_stride: Size = Field(
        default=WAN.time_stride, description="frames per latent frame of the video autoencoder"
    )
    space_stride: Size = Field(
        default=WAN.space_stride,
        description="pixels per latent of the video autoencoder, in one direction",
    )


class Data(Section):
    """conf/data: training data, their order, and validation data."""

    # Training sets and their mixture.
    clips: Datasets = Field(description="dataset of clips, encoded or for SyncNet raw, or a list")
    clip_weights: Weights | None = Field(
        description="sampling weight of each dataset of data.clips; null: its number of clips"
    )
    pairs: Datasets | None = Field(
        description="dataset of preference pairs, or a list of them; ndpo and dpo epochs need it"
    )
    pair_weights: Weights | None = Field(
        description="sampling weight of each dataset of data.pairs; null: its number of pairs"
    )
    # Order of samples and size of batches.
    shuffle_block_size: Count = Field(
        description="consecutive samples of a shard that are shuffled as one block"
    )
    shuffle_buffer: CountOrZero = Field(
        description="samples in the shuffle buffer after the blocks are shuffled"
    )
    last_batch: Literal["carry", "drop", "pad"] = Field(
        description="last partial batch of an epoch: carry it into the next, drop it, or pad it"
    )
    token_budget: Count | None = Field(
        description="latents for each clip of batch_size; null: those of the largest clip"
    )
    # Records, bad samples, changed data.
    log_samples: bool = Field(
        description="record the samples of every step, for `echolab data audit`"
    )
    max_bad_fraction: Fraction = Field(
        description="fraction of samples, of each shard and of all, that may be bad"
    )
    changed: Literal["refuse", "accept"] = Field(
        default="refuse",
        description="accept: the run may resume with other clips or pairs than it was trained on",
    )
    # Cache of remote datasets.
    cache_dir: Text | None = Field(
        description="folder for shards of remote datasets; null: $ECHOLAB_CACHE or ~/.cache/echolab"
    )
    cache_gb: Positive = Field(description="size of data.cache_dir in GB")
    # Validation.
    val_clips: Text | None = Field(description="dataset of encoded clips for the held-out error")
    val_num_clips: Count = Field(description="held-out clips that are used")
    val_batch_size: Count = Field(description="held-out clips in one forward")
    val_tasks: Tasks = Field(description="tasks of the held-out error")
    val_overlaps: Literal["refuse", "accept"] = Field(
        default="refuse",
        description="accept: held-out clips may be in the training set, for trials only",
    )
    num_workers: Annotated[int, Field(ge=0, le=1024), NUMBER] = Field(
        description="loader processes of each rank; 0: the rank reads by itself"
    )


class Stage(Section):
    """One stage of the curriculum."""

    steps: Count = Field(description="supervised steps of the stage")
    targets: Annotated[dict[Task, PositiveOrZero], Field(min_length=1)] = Field(
        description="sampling weight of each task, on any scale, one of them above 0"
    )


class Curriculum(Section):
    """conf/tasks: how often each task is trained."""

    # Explicit stages, or one stage for each task.
    stages: Annotated[list[Stage], Field(min_length=1)] | None = Field(
        description="stages of the curriculum; null: one for each task of tasks.tasks"
    )
    tasks: Tasks = Field(description="tasks from hard to easy; each stage adds the next")
    steps_per_stage: Count = Field(description="supervised steps of each stage of tasks.tasks")
    ema_decay: Fraction = Field(
        description="decay of the moving average with which sampling follows its targets"
    )
    min_prob: Fraction = Field(
        description="least sampling probability of a task that was introduced"
    )
    restart: bool = Field(
        default=False,
        description="true: a run with init_from= begins with the first stage again",
    )


class Phases(Section):
    """conf/phases: weight of each modality by noise level."""

    schedule: Literal["phda", "phda_by_progress", "flat"] = Field(
        description="curve of modality weights over the noise levels"
    )
    mode: Literal["dropout", "scale"] = Field(
        description="use of the curve: probability to keep a modality, or a factor on it"
    )


class Epoch(Section):
    """One epoch of the schedule."""

    kind: Literal["sft", "ndpo", "dpo", "sync"] = Field(description="objective of the epoch")
    steps: Count = Field(description="optimizer steps of the epoch")
    lr_scale: PositiveOrZero = Field(default=1.0, description="factor on optim.lr during the epoch")


class Schedule(Section):
    """conf/schedule: epochs and learning rates."""

    epochs: Annotated[list[Epoch], Field(min_length=1)] = Field(description="epochs of one cycle")
    cycles: Annotated[int, Field(ge=1, le=10**4), NUMBER] = Field(
        description="number of times that the epochs are repeated"
    )
    warmup: CountOrZero = Field(description="steps over which the learning rate rises from 0")
    decay: Literal["constant", "cosine"] = Field(
        description="decay of the learning rate over the run"
    )


class Objective(Section):
    """conf/objective: the objectives of ndpo and dpo epochs, with trl's parameter names."""

    beta: Positive = Field(description="beta of DPO: strength of the pull to the reference model")
    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
    ] = Field(description="loss of dpo epochs")  # fmt: skip
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), NUMBER] = Field(
        description="fraction of labels taken to be wrong"
    )
    sft_weight: PositiveOrZero = Field(
        description="factor of the chosen clip's own error in the loss"
    )
    target_grad_factor: Annotated[float, Field(gt=0, lt=0.5), NUMBER] | None = Field(
        description="gradient factor that beta follows; null: beta is constant"
    )
    ref_model_sync_steps: CountOrZero = Field(
        default=0,
        description="steps between updates of the reference model by the weights, in ndpo and dpo "
        "epochs; 0: never",
    )
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1), NUMBER] = Field(
        default=0.6, description="share of the trained weights in an update of the reference model"
    )


class Optim(Section):
    """conf/optim: AdamW and the averages of the weights."""

    # AdamW.
    lr: PositiveOrZero = Field(description="learning rate; schedule.epochs may scale it")
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        description="decays of AdamW's first and second moment"
    )
    eps: Positive = Field(description="epsilon of AdamW")
    weight_decay: PositiveOrZero = Field(description="weight decay of AdamW, for matrices only")
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True), NUMBER] = Field(
        description="limit of the gradient's norm; .inf: no limit"
    )
    # Averages of the weights.
    ema_decay: Fraction = Field(description="decay of the average that is evaluated and exported")
    extra_ema_decays: list[Fraction] = Field(description="decays of further averages")
    posthoc_ema_stds: list[Annotated[float, Field(ge=1e-4, lt=0.2886), NUMBER]] = Field(
        description="relative widths of power averages, from which export makes any width"
    )


class Lora(Section):
    """conf/lora: adapters."""

    target_modules: list[Text] = Field(
        description="layers that get adapters; []: all weights are trained"
    )
    r: Size = Field(description="rank of the adapters")
    lora_alpha: Positive = Field(description="the adapters' product is scaled by lora_alpha / r")
    dropout: Fraction = Field(description="dropout rate of the adapters' inputs")
    init_from: Text | None = Field(description="adapters in peft's format to start from")


class Trainer(Section):
    """conf/trainer: devices, and how they share the work."""

    # Ranks and devices.
    strategy: Literal["single", "ddp", "zero1", "zero2", "zero3"] = Field(
        description="how ranks share weights, gradients and moments"
    )
    devices: Annotated[int, Field(ge=1, le=1024), NUMBER] = Field(description="ranks of each node")
    num_nodes: Annotated[int, Field(ge=1, le=10**5), NUMBER] = Field(description="nodes")
    accelerator: Literal["cpu", "gpu", "cuda"] = Field(description="device type of every rank")
    precision: Text = Field(
        description="precision of compute: 32-true or bf16-mixed"
    )  # `machine.conflict` has reasons
    # Kernels, memory and parallelism within a rank.
    zero3_shard_small: bool = Field(description="ZeRO 3 shards small tensors too: for tests")
    attention: Literal["auto", "sdpa", "cudnn", "flash2", "flash3"] = Field(
        description="attention kernel; auto: the fastest on this device"
    )
    activation_checkpointing: Literal["none", "selective", "full", "offload"] = Field(
        description="blocks' activations: kept, recomputed except for attention, "
        "recomputed, or moved to host memory (trl's activation offloading, on GPUs)"
    )
    compile: bool = Field(description="compile the blocks by torch.compile")
    sequence_parallel: Annotated[int, Field(ge=1, le=1024), NUMBER] = Field(
        description="ranks that share one clip"
    )
    offload: Literal["none", "optimizer"] = Field(
        description="optimizer: ZeRO's fp32 masters and moments are in host memory"
    )


class Logger(Section):
    """conf/logger: Weights & Biases."""

    project: Text = Field(description="project on Weights & Biases")
    mode: Literal["auto", "offline", "online", "disabled"] = Field(
        description="auto: online if logged in, else offline"
    )


class Launcher(Section):
    """conf/launcher: where members of a sweep are started."""

    kind: Literal["local", "slurm"] = Field(description="local: one after another; slurm: as jobs")


class CustomCallback(Section):
    """A callback of the user's own."""

    target: Text = Field(
        description="class below echolab.training.callbacks or below an entry point of the group "
        "echolab.callbacks, as package.module:Class, or the name of such an entry point"
    )
    args: dict[Text, Any] = Field(description="arguments of the class, by name")


class Callbacks(Section):
    """conf/callbacks: callbacks of the user's own."""

    custom: list[CustomCallback] = Field(
        description="list of your own callbacks, called in this order after each step"
    )


class Evaluation(Section):
    """conf/evaluation: samples of held-out clips and their scores during training."""

    every: CountOrZero = Field(description="steps between evaluations; 0: never")
    raw: Text | None = Field(description="held-out clips, raw; required by evaluation.every")
    clips: Text | None = Field(description="the same clips, encoded; required as well")
    vae: Text | None = Field(description="autoencoder of the clips, of the demo or released")
    num_clips: Count = Field(description="clips to sample and score")
    batch_size: Count = Field(description="clips in one call of the network")
    num_videos: CountOrZero = Field(description="samples to keep as mp4 with audio")
    max_seconds: Positive | None = Field(description="time limit; it reduces the number of clips")
    task: Task = Field(description="task to sample")
    num_steps: Count = Field(description="solver steps")
    flow_shift: Shift = Field(description="flow shift of the sampler's noise levels")
    audio_guidance_scale: PositiveOrZero = Field(description="audio guidance; 1 is no guidance")
    seed: Seed = Field(description="seed of the noise")


class Metric(Section):
    """One metric of conf/metrics."""

    names: Annotated[list[Text], Field(min_length=1)] = Field(description="names of its scores")
    target: Text = Field(description="function of echolab.metrics or of an entry point of it")
    args: dict[Text, Any] = Field(default={}, description="arguments of the function, by name")


class Metrics(Section):
    """conf/metrics: the scores of an evaluation."""

    networks: Text | None = Field(description="folder of the metrics' networks")
    real: Text | None = Field(description="raw clips that Frechet distances compare with")
    scores: list[Metric] = Field(description="metrics to compute")


class LossSpike(Section):
    """Spikes of the loss and of the gradient's norm."""

    # Reaction, detection, and limits of rollbacks.
    policy: Literal["record", "recompute", "rollback"] = Field(
        description="on a spike: record it, recompute from the last checkpoint, or roll back"
    )
    threshold: Positive = Field(
        description="robust standard deviations above the median from which a value is a spike"
    )
    window: Annotated[int, Field(ge=2, le=10**6), NUMBER] = Field(
        description="steps of the same kind that a step is compared with"
    )
    min_history: Annotated[int, Field(ge=2, le=10**6), NUMBER] = Field(
        description="steps in the window before spikes are detected; at most loss_spike.window"
    )
    rollback_steps: CountOrZero = Field(description="least number of steps of a rollback")
    skip_batches: CountOrZero = Field(description="batches around a spike that a rollback skips")
    max_rollbacks: CountOrZero = Field(description="most rollbacks of a run")


class SignalGrace(Section):
    """Seconds from a signal of Slurm to the kill."""

    TERM: PositiveOrZero = Field(description="seconds from SIGTERM to the kill (KillWait)")
    USR1: PositiveOrZero = Field(description="seconds from SIGUSR1 to the kill")
    USR2: PositiveOrZero = Field(description="seconds from SIGUSR2 to the kill")


class Timeouts(Section):
    """Seconds in a section after which a rank counts as hung."""

    # Timeouts of sections; the timeout of a step follows from the earlier steps.
    init: Seconds = Field(description="seconds for imports, data, weights and the first collective")
    first_step: Seconds = Field(description="seconds for the first step, with compilation")
    step: Seconds = Field(
        description="seconds for each of forward, backward, optimizer and step sync"
    )
    eval: Seconds = Field(description="seconds for a validation")
    save: Seconds = Field(description="seconds for a checkpoint")
    data_wait: Seconds = Field(description="seconds for the next batch")
    teardown: Seconds = Field(description="seconds for the end of the process")
    safety_factor: Positive = Field(
        description="timeout of a step, in multiples of the longest step so far"
    )
    min_step_timeout: Seconds = Field(description="least timeout of a step, in seconds")


class Settings(Section):
    """conf/train.yaml: a run."""

    run_dir: Text = Field(title="Run", description="folder of the run; of all members of a sweep")
    seed: Seed = Field(description="seed of all randomness")
    batch_size: Count = Field(description="clips in one optimizer step, over all ranks")
    micro_batch_size: Count | None = Field(
        description="clips in one forward of a rank; null: all of its clips of the step"
    )
    flow_shift: Shift = Field(description="flow shift of the training noise levels")
    init_from: Text | None = Field(
        title="Start", description="run or checkpoint whose averaged weights training starts from"
    )
    pretrained: Text | None = Field(description="released weights that training starts from")
    ref_model: Text | None = Field(
        description="run or checkpoint of the reference of preference epochs; base: the adapters' "
        "base; null: the average at the start of each epoch"
    )
    max_host_memory_gb: Positive | None = Field(
        title="Safety",
        description="GB of a rank and its loader workers above which the run saves and restarts",
    )
    verify_export: bool = Field(
        description="compare samples of the export with the trained model before the run is done"
    )
    # One section for each group of conf/.
    model: Model = Field(description="sizes of the network")
    data: Data = Field(description="datasets and their order")
    tasks: Curriculum = Field(description="curriculum of tasks")
    phases: Phases = Field(description="weights of the modalities by noise level")
    schedule: Schedule = Field(description="epochs and learning rates")
    objective: Objective = Field(description="objectives of ndpo and dpo epochs")
    optim: Optim = Field(description="optimizer and averages")
    lora: Lora = Field(description="adapters")
    trainer: Trainer = Field(description="devices and parallelism")
    logger: Logger = Field(description="Weights & Biases")
    callbacks: Callbacks = Field(description="callbacks of your own")
    evaluation: Evaluation = Field(description="samples and scores during training")
    metrics: Metrics = Field(description="scores of an evaluation")
    launcher: Launcher = Field(description="launcher of a sweep's members")
    log_every: CountOrZero = Field(
        title="Intervals, in optimizer steps",
        description="steps between lines of metrics.jsonl; 0: never",
    )
    save_every: CountOrZero = Field(
        description="steps between checkpoints; 0: only at the end of each epoch"
    )
    val_every: CountOrZero = Field(description="steps between validations; 0: never")
    replica_check_every: CountOrZero = Field(
        description="steps between comparisons of the replicas of all ranks; 0: never"
    )
    snapshot_every: CountOrZero = Field(
        description="steps between kept averages of optim.posthoc_ema_stds, a multiple of "
        "save_every; 0: never"
    )
    max_infra_restarts: CountOrZero = Field(
        description="restarts after failures of machines (slurm/train.sbatch)"
    )
    loss_spike: LossSpike = Field(description="detection of loss and gradient spikes")
    signal_grace_seconds: SignalGrace = Field(
        description="seconds from a signal of Slurm to the kill"
    )
    timeouts: Timeouts = Field(description="timeouts of the sections of a run, in seconds")
