"""Every setting of conf/ has a type and a range, and invalid values never reach a rank."""

import inspect
import math
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from echolab.cli.__main__ import main
from echolab.config import build as objects
from echolab.config import parts, schema
from echolab.config.check import check, names, shown
from echolab.config.compose import compose
from echolab.config.folders import CONF
from echolab.config.networks import lora_from
from echolab.data.batch_sampler import LAST_BATCH_MODES
from echolab.diffusion.objectives import Preference
from echolab.diffusion.preference_losses import PAIR_LOSSES
from echolab.errors import ConfigError
from echolab.models import attention
from echolab.models.transformer import EchoTransformer
from echolab.tasks.table import TASKS
from echolab.tracking.wandb_run import MODES
from echolab.training.config import TrainConfig
from echolab.training.engine import machine
from echolab.training.engine.activation_checkpointing import KEPT, OFFLOAD
from echolab.training.engine.ema import WIDEST
from echolab.training.schedule import KINDS

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
GROUPS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "debug") and path.stem != "default"
)
NEEDED = ["data.clips=x", "data.pairs=y"]
BASE = compose(NEEDED)
Where = tuple[str | int, ...]


# -- wrong values, made from the types --------------------------------------------------------


def limits(metadata: Any) -> dict[str, Any]:
    """Return the bounds of a field."""
    bounds: dict[str, Any] = {}
    for one in metadata:
        bounds |= limits(one.metadata) if isinstance(one, FieldInfo) else {}
        bounds |= {n: getattr(one, n) for n in dir(one) if n in ("ge", "gt", "le", "lt")}
        bounds |= {n: getattr(one, n) for n in dir(one) if n in ("min_length", "max_length")}
        bounds |= {"inf": True} if getattr(one, "allow_inf_nan", False) else {}
    return bounds


def wrong(annotation: Any, metadata: Any = ()) -> list[Any]:
    """Return values of another type, out of range, of the wrong length, or not finite."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return wrong(inner[0], [*inner[1:], *metadata])
    if origin in (types.UnionType, typing.Union):
        first, *others = [wrong(part) for part in inner if part is not type(None)]
        values = [v for v in first if all(any(v is w or v == w for w in o) for o in others)]
        return [v for v in values if v is not None or type(None) not in inner]
    bound = limits(metadata)
    if annotation in (int, float):
        return [*numbers(annotation, bound), "abc", "", True, False, [1], [], {"a": 1}, {}, None]
    if annotation is bool:
        return ["abc", "", 2, -1, 2.5, math.nan, [True], [], {"a": True}, {}, None]
    if annotation is str:
        return ["", "a\0b", "a\nb", 2.5, math.nan, True, ["a"], [], {"a": "b"}, {}, None]
    if origin is Literal:
        return ["nonsense", "", 1, 2.5, True, [inner[0]], [], {"a": inner[0]}, {}, None]
    if origin is list:
        good = right(inner[0])
        values = ["abc", 1, 2.5, True, {}, {"a": 1}, None]
        values += [[bad] * bound.get("min_length", 1) for bad in wrong(inner[0])]
        values += [[good] * (bound["min_length"] - 1)] if bound.get("min_length") else []
        return values + ([[good] * (bound["max_length"] + 1)] if "max_length" in bound else [])
    if origin is dict:
        good = right(inner[0])
        return ["abc", 1, True, [], None, {}, {"nonsense": 1}] + [
            {good: v} for v in wrong(inner[1])
        ]
    assert issubclass(annotation, BaseModel)
    return ["abc", 1, True, [], None, {"nonsense": 1}]


def numbers(kind: type, bound: dict[str, Any]) -> list[Any]:
    values: list[Any] = [math.nan, "nan", ".nan", -math.inf, "-.inf"]
    values += [] if bound.get("inf") else [math.inf, ".inf", "1e999"]
    values += [10**30] if kind is int or "le" in bound or "lt" in bound else []
    values += [2.5, "2.5"] if kind is int else []
    step = 1 if kind is int else 1e-9
    values += [bound["ge"] - step] if "ge" in bound else []
    values += [bound["le"] + step * 1e6] if "le" in bound else []
    return values + [bound[name] for name in ("gt", "lt") if name in bound]


def right(annotation: Any, metadata: Any = ()) -> Any:
    """Return one valid value."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return right(inner[0], [*inner[1:], *metadata])
    if origin is Literal:
        return inner[0]
    if annotation is str:
        return "x"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {n: right(f.annotation, f.metadata) for n, f in annotation.model_fields.items()}
    if origin is dict:
        return {right(inner[0]): right(inner[1])}
    bound = limits(metadata)
    return max(bound.get("ge", 0), 1) if annotation is int else bound.get("ge", 0.25)


def fields(section: type[BaseModel] = schema.Settings, at: Where = ()) -> Iterator[Any]:
    """Return (path, field) of every setting, including those of list items."""
    for name, field in section.model_fields.items():
        where = (*at, field.alias or name)
        yield where, field
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, where)
        elif where == ("schedule", "epochs"):
            yield from fields(schema.Epoch, (*where, 0))
        elif where == ("tasks", "stages"):
            yield from fields(schema.Stage, (*where, 0))


def changed(config: Any, where: Where, value: Any) -> Any:
    """Return a copy with another value at a path; create missing parents."""
    if not where:
        return value
    if where[0] == 0:
        return [changed((config or [{"steps": 1, "targets": {"t2v": 1.0}}])[0], where[1:], value)]
    return {**config, where[0]: changed(config.get(where[0]), where[1:], value)}


def dotted(where: Where) -> str:
    return ".".join(map(str, where)).replace(".0", "[0]")


@pytest.mark.parametrize(
    ("where", "field"), [pytest.param(w, f, id=dotted(w)) for w, f in fields()]
)
def test_every_setting_has_a_type_and_a_range(where: Where, field: FieldInfo) -> None:
    assert field.description
    values = wrong(field.annotation, field.metadata)
    assert len(values) > 3
    for value in values:
        with pytest.raises(ConfigError) as error:
            check(changed(BASE, where, value))
        line = str(error.value)
        assert line.startswith(dotted(where)) and "; " in line, (value, line)
        assert line.isprintable() and len(line) < 600, line


def test_known_bad_values_are_refused_by_the_parent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for word in (
        "batch_size=abc", "batch_size=0", "save_every=abc", "save_every=-1", "save_every=2.5",
        "optim.max_grad_norm=abc", "optim.max_grad_norm=nan", "optim.betas=[2,0.9]",
        "optim.betas=[0.9]",
        "schedule.warmup=-5", "schedule.warmup=abc", "flow_shift=-1", "flow_shift=0", "seed=-1",
        "seed=null",
        "micro_batch_size=0", "+foo=1", "+data.foo=1", "trainer.devices=two", "~seed", "sede=1",
        "model.dim=wide", "schedule.epochs=[{kind:sft,steps:0}]", "data.num_workers=true",
        "data=[1]", "model=nothing", "timeouts.save=soon", "logger.mode=loud",
    ):  # fmt: skip
        assert main(["train", *NEEDED, f"run_dir={run}", word]) == 1, word
        said = capsys.readouterr().err
        key = word.lstrip("+~").partition("=")[0]
        assert said.startswith(f"echolab: error: {key}") and said.count("\n") == 1, said
        assert not run.exists()


def test_a_refusal_needs_no_torch_and_no_rank() -> None:
    program = (
        "import sys; from echolab.cli.__main__ import main\n"
        "code = main(['train', 'data.clips=x', 'batch_size=0'])\n"
        "print(code, sorted({'torch', 'numpy', 'pytorch_lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "1 []\n", done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch_size=6", "micro_batch_size=4"], "batch_size=6: not a multiple of 1 ranks x micro"),
        (["save_every=4", "snapshot_every=6"], "snapshot_every=6: must be a multiple of"),
        (["data.pairs=null", "schedule=dpo"], "data.pairs=null: ndpo and dpo epochs need"),
        (["data.clip_weights=[1,2]"], "data.clip_weights=[1.0,2.0]: 2 weights for 1 datasets"),
        (["data.clips=[x,y]", "data.clip_weights=[0,0]"], "data.clip_weights=[0.0,0.0]: all are 0"),
        (["loss_spike.min_history=200"],
         "loss_spike.min_history=200: must be 2 or more and at most loss_spike.window"),
        (["tasks.min_prob=0.2"], "tasks.min_prob=0.2: times 5 tasks must stay below 1"),
        (["tasks.stages=[{steps:1,targets:{t2v:0}}]"], 'tasks.stages[0].targets={"t2v":0.0}'),
        (["trainer=ddp", "trainer.strategy=single"], "trainer.strategy=single: not for 8 ranks"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed: under DeepSpeed it is pure"),
        (["trainer.precision=32"], "trainer.precision=32: unknown; one of 32-true"),
        (["trainer.offload=optimizer"], "trainer.offload=optimizer: single keeps"),
        (["trainer=zero3", "trainer.compile=true"], "trainer.compile=true: torch.compile traces"),
        (["trainer=ddp", "trainer.sequence_parallel=8", "batch_size=8"],
         "trainer.sequence_parallel=8: must divide model.num_heads=4"),
        (["model.num_heads=3"], "model.dim=256: must be a multiple of 2 x model.num_heads=3"),
        (["model.in_channels=20"], "model.in_channels=20: must be model.out_channels=16, or 36"),
        (["ref_model=base"], "ref_model=base: requires adapters"),
        (["lora.init_from=folder"], "lora.init_from=folder: this run has no adapters"),
        (["optim.extra_ema_decays=[0.9,0.9]"],
         "optim.extra_ema_decays=[0.9,0.9]: one is given twice"),
        (["objective.loss_type=exo_pair"], "objective.loss_type=exo_pair: infinite at"),
        (["data.clips=???"], "data.clips: is missing; give data.clips=..., dataset"),
    ],
)  # fmt: skip
def test_conflicting_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([*NEEDED, *words])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_numbers_may_be_spelled_as_in_yaml_and_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RATE", "1e-4")
    config = compose(
        [
            *NEEDED, "optim.eps='1e-4'", "optim.max_grad_norm=.inf", "batch_size='16'",
            "save_every=1e3",
            "schedule.epochs=[{kind:sft,steps:'5',lr_scale:'1e-1'}]", "optim.lr=${oc.env:RATE}",
            "flow_shift=3",
            "run_dir=2027",
        ]
    )  # fmt: skip
    assert config["optim"]["eps"] == 1e-4 and config["optim"]["max_grad_norm"] == math.inf
    assert config["batch_size"] == 16 and config["optim"]["lr"] == 1e-4
    assert config["schedule"]["epochs"] == [{"kind": "sft", "steps": 5, "lr_scale": 0.1}]
    assert config["save_every"] == 1000 and type(config["save_every"]) is int
    assert type(config["flow_shift"]) is float and config["run_dir"] == "2027"


# -- the shipped settings ---------------------------------------------------------------------


def leaves(config: Any, at: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{at}{key}.")
        else:
            yield f"{at}{key}"


def test_the_shipped_files_have_all_settings_and_no_others() -> None:
    given = ("audio_layers", "eps", "patch_size", "time_stride", "space_stride")
    optional = {f"model.{name}" for name in given}  # the network has defaults of them
    assert set(leaves(BASE)) | optional == set(names())


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_every_group_passes(group: str) -> None:
    # SyncNet needs sync epochs, which its experiment has, and has no adapters.
    experiment = ["experiment=demo_syncnet"] if group.startswith("model=syncnet") else []
    lora = ["lora=attention"] if "lora" not in group and not experiment else []
    compose([*experiment, *NEEDED, group, *lora])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("trainer", sorted(p.stem for p in (CONF / "trainer").glob("*.yaml")))
def test_every_experiment_passes_with_every_trainer(experiment: str, trainer: str) -> None:
    words = [f"experiment={experiment}", f"trainer={trainer}", "batch_size=64", *NEEDED]
    if "syncnet" in experiment and "zero" in trainer:
        with pytest.raises(ConfigError, match="SyncNet cannot be trained with it; use single or"):
            compose(words)
        return
    config = compose(words)
    assert check(config) == config, "what passed passes again as it is"


def choices(section: type[BaseModel], name: str) -> tuple[str, ...]:
    return typing.get_args(section.model_fields[name].annotation)


def test_the_choices_equal_those_of_the_code() -> None:
    assert typing.get_args(schema.Task) == TASKS
    assert choices(schema.Epoch, "kind") == KINDS
    assert choices(schema.Data, "last_batch") == LAST_BATCH_MODES
    assert choices(schema.Objective, "loss_type") == tuple(PAIR_LOSSES)
    assert choices(schema.Phases, "schedule") == tuple(objects.PHASES)
    assert choices(schema.Phases, "mode") == tuple(objects.ALLOCATORS)
    assert choices(schema.Logger, "mode") == MODES
    assert choices(schema.Trainer, "attention") == attention.NAMES
    assert choices(schema.Trainer, "strategy") == machine.STRATEGIES
    assert choices(schema.Trainer, "offload") == machine.OFFLOADS
    kinds = {"none", *KEPT, OFFLOAD}
    assert set(choices(schema.Trainer, "activation_checkpointing")) == kinds
    assert set(machine.CHECKPOINTINGS) == kinds
    assert limits([schema.Optim.model_fields["posthoc_ema_stds"]]) or WIDEST > 0.2886


def test_the_settings_equal_the_arguments_of_the_code() -> None:
    """Every setting reaches an argument, and every argument has a setting."""
    assert set(schema.Model.model_fields) == set(inspect.signature(EchoTransformer).parameters)

    def distinct(section: type[BaseModel], **given: Any) -> dict[str, Any]:
        numbers = {name: 2.0 + i for i, name in enumerate(section.model_fields)}
        return {**numbers, **given}

    def reach(part: tuple[Any, ...], settings: dict[str, Any]) -> bool:
        return sorted(map(str, part)) == sorted(map(str, settings.values()))

    trainer, timeouts = distinct(schema.Trainer), distinct(schema.Timeouts)
    assert reach(parts.machine_from(trainer), trainer)
    assert reach(parts.timeouts_from(timeouts), timeouts)
    spike = distinct(schema.LossSpike, policy="record", min_history=2, window=99)
    assert reach(parts.spike_config_from(spike), spike)
    intervals = dict(zip(parts.INTERVALS, (1, 2, 3, 5, 4), strict=True))
    assert reach(tuple(vars(parts.intervals_from(intervals)).values()), intervals)
    optim = distinct(schema.Optim, betas=(0.1, 0.2), extra_ema_decays=(), posthoc_ema_stds=(0.3,))
    assert reach((*objects.optim_from(optim), optim["lr"]), optim)
    lora = distinct(schema.Lora, target_modules=("a",))
    assert reach((*lora_from(lora), lora["init_from"]), lora)
    arguments = set(inspect.signature(Preference).parameters) - {"phases", "reference"}
    mixing = {"ref_model_sync_steps", "ref_model_mixup_alpha"}  # settings of the loop
    assert mixing <= set(inspect.signature(TrainConfig).parameters)
    assert set(schema.Objective.model_fields) == arguments | mixing


# -- what passes is understood ----------------------------------------------------------------

INTEGERS = st.one_of(st.integers(-2, 10**6), st.floats(-2, 100), st.sampled_from(["3", "1e3", "x"]))
REAL = st.one_of(st.floats(), st.integers(-2, 10**6), st.sampled_from(["1e-4", ".inf", "x", None]))
EPOCH = st.fixed_dictionaries(
    {"kind": st.sampled_from([*KINDS, "x"]), "steps": INTEGERS, "lr_scale": REAL}
)
STAGE = st.fixed_dictionaries(
    {"steps": INTEGERS, "targets": st.dictionaries(st.sampled_from(TASKS), REAL, max_size=3)}
)


@given(
    lr=REAL, epochs=st.lists(EPOCH, max_size=3), warmup=INTEGERS, cycles=st.integers(-1, 20),
    stages=st.none() | st.lists(STAGE, max_size=3), ema_decay=REAL, min_prob=REAL,
)  # fmt: skip
def test_accepted_values_are_accepted_by_the_code(
    lr: Any, epochs: Any, warmup: Any, cycles: Any, stages: Any, ema_decay: Any, min_prob: Any
) -> None:
    schedule = {"epochs": epochs, "warmup": warmup, "cycles": cycles, "decay": "cosine"}
    tasks = {**BASE["tasks"], "stages": stages, "ema_decay": ema_decay, "min_prob": min_prob}
    try:
        optim = {**BASE["optim"], "lr": lr}
        config = check({**BASE, "schedule": schedule, "tasks": tasks, "optim": optim})
    except ConfigError:
        return
    planned = objects.schedule_from(config)
    assert planned.steps > 0 and all(math.isfinite(planned.lr(step)) for step in (0, 1))
    shares = objects.curriculum_from(config["tasks"]).probabilities(1)
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("value", ["x" * 10_000, "\x1b[31m", {"a": [{}] * 99}])
def test_a_value_is_shown_in_one_short_line(value: Any) -> None:
    assert len(shown(value)) <= 100 and shown(value).isprintable()
