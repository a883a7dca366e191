"""Validate a configuration: types and ranges by `schema.Settings`, then rules between settings.

This module imports no torch and reads no file, so that the supervisor refuses an invalid setting
within a second, before it creates a folder or starts a rank.
"""

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from echolab.arguments import closest
from echolab.config.parts import (
    check_targets,
    intervals_from,
    machine_from,
    rate_of,
    spike_config_from,
    timeouts_from,
)
from echolab.config.schema import Settings
from echolab.config.sync_schema import SyncSettings
from echolab.errors import ConfigError
from echolab.geometry import geometry_of
from echolab.training.engine.machine import accumulation_steps, conflict

# Earlier names of settings and groups, by section; "/" marks a new name outside of the section.
RENAMED = {
    "": {
        "run": "run_dir", "initial": "init_from", "weights": "pretrained",
        "reference": "ref_model", "shift": "flow_shift", "parity": "verify_export",
        "grace": "signal_grace_seconds", "host_memory_gb": "max_host_memory_gb",
        "preference": "objective", "guards": "loss_spike", "supervise": "timeouts",
    },
    "every": {
        "log": "/log_every", "save": "/save_every", "validate": "/val_every",
        "replicas": "/replica_check_every", "snapshot": "/snapshot_every",
    },
    "loss_spike": {
        "limit": "threshold", "warmup": "min_history", "back": "rollback_steps",
        "at_most": "max_rollbacks",
    },
    "timeouts": {
        "factor": "safety_factor", "floor": "min_step_timeout",
        "infrastructure": "/max_infra_restarts",
    },
    "optim": {
        "clip": "max_grad_norm", "ema_more": "extra_ema_decays", "ema_widths": "posthoc_ema_stds",
    },
    "data": {
        "block": "shuffle_block_size", "buffer": "shuffle_buffer", "remainder": "last_batch",
        "workers": "num_workers", "cache": "cache_dir", "skip_budget": "max_bad_fraction",
        "ledger": "log_samples", "weights": "clip_weights", "held_out": "val_clips",
        "held_out_clips": "val_num_clips", "held_out_batch_size": "val_batch_size",
        "held_out_tasks": "val_tasks", "held_out_overlaps": "val_overlaps",
    },
    "trainer": {
        "checkpointing": "activation_checkpointing", "nodes": "num_nodes",
        "shard_small": "zero3_shard_small",
    },
    "schedule": {"epochs.lr": "/optim.lr"},
    "objective": {"anchor": "sft_weight", "target_gradient_factor": "target_grad_factor"},
    "lora": {
        "targets": "target_modules", "rank": "r", "alpha": "lora_alpha", "start": "init_from",
    },
    "phases": {"act": "mode"},
    "tasks": {"order": "tasks", "momentum": "ema_decay", "floor": "min_prob"},
}  # fmt: skip
OPTIONAL = ("experiment", "debug")  # groups that may be null
LONGEST_VALUE = 80  # characters of a value in a message
Location = tuple[str | int, ...]


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a resolved configuration as plain values of their declared types.

    Raise ConfigError, in one line that names the key, for the first setting that is unknown,
    missing, of the wrong kind, out of range, or in conflict with another.
    """
    # Check types and ranges of single settings first, then conflicts between settings.
    try:
        settings = settings_type(config).model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(_error_message(config, first["type"], first["loc"])) from None
    plain = settings.model_dump(exclude_unset=True)
    for conflict_line in _conflicts(plain):
        raise ConfigError(conflict_line)
    return plain


def settings_type(config: Mapping[str, Any]) -> type[Settings]:
    """Return the settings of a SyncNet if conf/model names one, else of a transformer."""
    model = config.get("model")
    return SyncSettings if isinstance(model, Mapping) and "network" in model else Settings


# -- one setting ----------------------------------------------------------------------------------


def _error_message(config: Mapping[str, Any], kind: str, location: Location) -> str:
    """Return a one-line message for an error that pydantic reports at `location`."""
    # Name the setting as the user writes it.
    root = settings_type(config)
    path, field = _field_at(location, root)
    if kind == "extra_forbidden":
        return no_such_setting(location, _value_at(config, location), root)
    assert field
    if kind == "missing":
        return missing(path, root)
    # State the allowed values, the meaning and the nearest choice.
    given, allowed = _value_at(config, path), described(field)
    near = closest(str(given), choices_of(field.annotation)) if isinstance(given, str) else ""
    return f"{dotted(path)}={shown(given)}: must be {allowed}; {field.description}{near}"


def choices_of(annotation: Any) -> list[str]:
    """Return the choices of a setting; empty if it has none."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in inner]
    return [choice for part in inner for choice in choices_of(part)]


def missing(path: Location, root: type[Settings] = Settings) -> str:
    """Return a one-line message for a setting without a value."""
    path, field = _field_at(path, root)
    words = f", {field.description}" if field else ""
    return f"{dotted(path)}: is missing; give {dotted(path)}=...{words}"


def no_such_setting(path: Location, value: Any, root: type[Settings] = Settings) -> str:
    """Return a one-line message for an unknown setting, with the nearest existing name."""
    # Propose the present name of an earlier one, else the nearest, else the section's settings.
    section = _field_at(path[:-1], root)[1] if len(path) > 1 else None
    near = [new] if (new := renamed(dotted(path))) else []
    known_names = [*names(root), *Settings.model_fields, *OPTIONAL]
    near = near or difflib.get_close_matches(dotted(path), known_names, n=1, cutoff=0.6)
    remedy = "`echolab train --help` lists all"
    if near:
        remedy = f"did you mean {near[0]}?"
    elif section:
        remedy = f"there are {', '.join(_fields(_section_of(section.annotation)))}"
    return f"{dotted(path)}={shown(value)}: there is no such setting; {remedy}"


def renamed(name: str) -> str | None:
    """Return the present name of a setting or group that was renamed, else None."""
    # Both the group and the setting may have been renamed.
    group, _, rest = re.sub(r"\[\d+\]", "", name).partition(".")
    section = RENAMED[""].get(group, group)
    if not rest:
        return section if section != group else None
    new = RENAMED.get(section, {}).get(rest, rest)
    present = new[1:] if new.startswith("/") else f"{section}.{new}"
    return None if (section, rest) == (group, new) else present


def names(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting, except for settings of list items."""
    for name, field in _fields(section).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _fields(section: type[BaseModel] | None) -> dict[str, FieldInfo]:
    """Return the fields of a section by their names in a configuration."""
    return dict(section.model_fields) if section else {}


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation is or holds: `list[Stage] | None` holds Stage."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section_of(part) for part in typing.get_args(annotation))
    return next((part for part in inner if part), None)


def _field_at(
    location: Location, root: type[Settings] = Settings
) -> tuple[Location, FieldInfo | None]:
    """Return the deepest field on the way to `location`, and its path.

    A location also contains items of lists and members of unions, which are not fields.
    """
    # Walk down the sections along the location.
    section: type[BaseModel] | None = root
    path: Location = ()
    field: FieldInfo | None = None
    for depth, part in enumerate(location, 1):
        if isinstance(part, str) and part in _fields(section):
            path, field = location[:depth], _fields(section)[part]
            section = _section_of(field.annotation)
    return tuple(part for part in path if not _is_tag(part)), field


def _is_tag(part: str | int) -> bool:
    """Return whether a part of a location names a member of a union, such as `list[Stage]`."""
    return isinstance(part, str) and not part.isidentifier()


def _value_at(config: Any, path: Location) -> Any:
    for part in path:
        config = config[part]
    return config


def dotted(path: Location) -> str:
    """Return a path as Hydra writes it: schedule.epochs[0].lr."""
    words = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(words).removeprefix(".")


def shown(value: Any) -> str:
    """Return a value as written on the command line, in one line of limited length."""
    # Text as typed, other values as JSON.
    text = (
        value if isinstance(value, str) else json.dumps(value, default=str, separators=(",", ":"))
    )
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


# -- types and ranges in words --------------------------------------------------------------------

# Ranges are stated in the words of the help.
LARGE = 2**18  # limits from this value on are omitted in the list of all settings
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def described(field: FieldInfo) -> str:
    """Return the type of a field in words: `an integer, at least 1 and at most 1024, or null`."""
    return _described(field.annotation, field.metadata)


def _described(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    # Unions, choices, lists and mappings; then plain types.
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _described(inner[0], inner[1:])
    if origin in (types.UnionType, typing.Union):
        return ", or ".join(map(_described, inner))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is list:
        return f"{_length_in_words(_limits(metadata))}, each {_described(inner[0])}"
    if origin is dict:
        values = "" if inner[1] is Any else ", each value a number"
        return f"{{name: value}}, each name {_described(inner[0])}{values}"
    if annotation in (int, float):
        return _number_in_words(
            "a whole number" if annotation is int else "a number", _limits(metadata)
        )
    words = {bool: "true or false", str: "text, not empty"}
    return words.get(annotation, "null" if annotation is type(None) else "{key: value}")


def limits_in_words(field: FieldInfo) -> str:
    """Return the range of a setting, or of each item of a list: `at least 1, below 2`."""
    return ", ".join(
        _limit_words(_limits(_constraints(field.annotation, field.metadata)), shorten=True)
    )


def _constraints(annotation: Any, metadata: Sequence[Any]) -> list[Any]:
    """Return all constraints of an annotation and of the types within it."""
    inner = list(metadata)
    for part in typing.get_args(annotation):
        extra = typing.get_args(part)[1:] if typing.get_origin(part) is Annotated else ()
        inner += _constraints(part, extra)
    return inner


def _limits(metadata: Sequence[Any]) -> dict[str, Any]:
    """Return the values of pydantic's constraints by name: ge, gt, le, lt, min_length, ..."""
    names = (*LIMITS, "multiple_of", "allow_inf_nan", "min_length", "max_length")
    # Constraints may be nested in fields of annotated types.
    limits: dict[str, Any] = {}
    for constraint in metadata:
        if isinstance(constraint, FieldInfo):
            limits |= _limits(constraint.metadata)
        limits |= {name: getattr(constraint, name) for name in names if hasattr(constraint, name)}
    return limits


def _length_in_words(limits: Mapping[str, Any]) -> str:
    least, most = limits.get("min_length", 0), limits.get("max_length")
    if most:
        return f"a list of {most} values"
    return "a list of one value or more" if least else "a list"


def _limit_words(limits: Mapping[str, Any], *, shorten: bool = False) -> list[str]:
    words = [
        f"{word} {limits[name]}"
        for name, word in LIMITS.items()
        if name in limits and not (shorten and limits[name] >= LARGE)
    ]
    if "multiple_of" in limits:
        words.append(f"a multiple of {limits['multiple_of']}")
    return words


def _number_in_words(kind: str, limits: Mapping[str, Any]) -> str:
    words = _limit_words(limits)
    text = ", ".join([kind, " and ".join(words)]) if words else kind
    return f"{text}, or .inf" if limits.get("allow_inf_nan") else text


# -- conflicts between settings -------------------------------------------------------------------


def _conflicts(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each conflict between settings whose types and ranges are valid."""
    # Groups that are checked by building an object from them.
    yield from filter(None, [conflict(machine_from(config["trainer"]))])
    if "network" in config["model"]:
        yield from _sync_conflicts(config)
    else:
        yield from _model_conflicts(config["model"], config["trainer"], config["lora"])
    yield from _kind_conflicts(config)
    yield from _lr_conflicts(config["optim"]["lr"], config["schedule"]["epochs"])
    yield from _data_conflicts(config["data"], config["schedule"]["epochs"])
    yield from _reference_conflicts(config)
    yield from _task_conflicts(config["tasks"])
    # Preference losses and reference models.
    loss = config["objective"]
    if loss["loss_type"] == "exo_pair" and not loss["label_smoothing"]:
        yield "objective.loss_type=exo_pair: infinite at label_smoothing=0; set it to 1e-3"
    if config["ref_model"] == "base" and not config["lora"]["target_modules"]:
        yield (
            "ref_model=base: requires adapters, but this run trains all weights; give "
            "lora=attention, or ref_model=null"
        )
    # Averages are stored by name: two of the same width would overwrite each other.
    for name in ("extra_ema_decays", "posthoc_ema_stds"):
        values = config["optim"][name]
        if len(set(values)) < len(values):
            yield f"optim.{name}={shown(values)}: one is given twice; give each once"
    yield from filter(None, [_error_of_parts(config)])


def _error_of_parts(config: Mapping[str, Any]) -> str | None:
    """Return the first ConfigError raised by the objects built from these settings."""
    try:
        accumulation_steps(
            config["batch_size"], config["micro_batch_size"], machine_from(config["trainer"])
        )
        intervals_from(config)
        spike_config_from(config["loss_spike"])
        timeouts_from(config["timeouts"])
        check_targets(config["callbacks"])
    except ConfigError as error:
        return str(error)
    return None


def _model_conflicts(
    model: Mapping[str, Any], trainer: Mapping[str, Any], lora: Mapping[str, Any]
) -> Iterator[str]:
    # Sizes of the network divide each other.
    dim, heads, ranks = model["dim"], model["num_heads"], trainer["sequence_parallel"]
    if dim % (2 * heads):
        yield f"model.dim={dim}: must be a multiple of 2 x model.num_heads={heads}; change either"
    out_channels, in_channels = model["out_channels"], model["in_channels"]
    with_known = 2 * out_channels + geometry_of(model).time_stride
    if in_channels not in (out_channels, with_known):
        yield (
            f"model.in_channels={in_channels}: must be model.out_channels={out_channels}, or "
            f"{with_known} with "
            "the known mask and latents; change either"
        )
    if heads % ranks:
        yield (
            f"trainer.sequence_parallel={ranks}: must divide model.num_heads={heads}; "
            "use 1, or a divisor of both heads and ranks"
        )
    if lora["init_from"] and not lora["target_modules"]:
        yield (
            f"lora.init_from={lora['init_from']}: this run has no adapters; give "
            "lora=attention too, "
            "or lora.init_from=null"
        )


def _kind_conflicts(config: Mapping[str, Any]) -> Iterator[str]:
    # SyncNet and transformers have epochs of their own.
    sync = "network" in config["model"]
    for number, epoch in enumerate(config["schedule"]["epochs"]):
        if sync != (epoch["kind"] == "sync"):
            needed = "sync epochs, kind=sync" if sync else "model=syncnet or model=syncnet_demo"
            yield f"schedule.epochs[{number}].kind={epoch['kind']}: this model cannot; use {needed}"


def _sync_conflicts(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each setting of transformers that SyncNet has no use for."""
    trainer = config["trainer"]
    needed: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    # Its batch norm has no shards, and it has no blocks and no attention.
    needed["trainer.strategy"] = (trainer["strategy"], ("single", "ddp"))
    needed["trainer.sequence_parallel"] = (trainer["sequence_parallel"], (1,))
    needed["trainer.activation_checkpointing"] = (trainer["activation_checkpointing"], ("none",))
    needed["trainer.compile"] = (trainer["compile"], (False,))
    # It has no adapters, no released weights to train from, and no samples to compare.
    needed["lora.target_modules"] = (config["lora"]["target_modules"], ([],))
    needed["pretrained"] = (config["pretrained"], (None,))
    needed["evaluation.every"] = (config["evaluation"]["every"], (0,))
    needed["verify_export"] = (config["verify_export"], (False,))
    if config["model"]["network"] == "SyncNet":
        needed["model.embed_dim"] = (config["model"]["embed_dim"], (1024,))
    for name, (value, allowed) in needed.items():
        if value not in allowed:
            choices = " or ".join(shown(choice) for choice in allowed)
            yield f"{name}={shown(value)}: SyncNet cannot be trained with it; use {choices}"


def _lr_conflicts(lr: float, epochs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for number, epoch in enumerate(epochs):
        scale = epoch.get("lr_scale", 1.0)
        if not math.isfinite(rate_of(lr, scale)):
            yield (
                f"schedule.epochs[{number}].lr_scale={scale:g}: too large for optim.lr={lr:g}; "
                "reduce lr_scale or optim.lr"
            )


def _data_conflicts(data: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    prefers = {epoch["kind"] for epoch in epochs} & {"ndpo", "dpo"}
    if prefers and not data["pairs"]:
        yield "data.pairs=null: ndpo and dpo epochs need a preference dataset; give one"
    for key, places in (("clip_weights", data["clips"]), ("pair_weights", data["pairs"])):
        weights, name = data[key], "clips" if key == "clip_weights" else "pairs"
        if weights is None:
            continue
        count = 0 if places is None else 1 if isinstance(places, str) else len(places)
        if len(weights) != count:
            yield (
                f"data.{key}={shown(weights)}: {len(weights)} weights for {count} datasets in "
                f"data.{name}; give one for each, or null"
            )
        elif not any(weights):
            yield f"data.{key}={shown(weights)}: all are 0; give one above 0, or null"


def _reference_conflicts(config: Mapping[str, Any]) -> Iterator[str]:
    steps = config["objective"].get("ref_model_sync_steps", 0)
    if steps and config["ref_model"] == "base":
        yield (
            f"objective.ref_model_sync_steps={steps}: the base of the adapters cannot be mixed "
            "with them; use ref_model=null, or 0"
        )


def _task_conflicts(tasks: Mapping[str, Any]) -> Iterator[str]:
    stages = tasks["stages"] or [{"targets": dict.fromkeys(tasks["tasks"], 1.0)}]
    for number, stage in enumerate(stages):
        if not any(stage["targets"].values()):
            yield (
                f"tasks.stages[{number}].targets={shown(stage['targets'])}: all are 0; "
                "give one above 0"
            )
    count = len({task for stage in stages for task in stage["targets"]})
    if tasks["min_prob"] * count >= 1:
        yield (
            f"tasks.min_prob={tasks['min_prob']:g}: times {count} tasks must stay below 1; use a "
            f"smaller one"
        )
