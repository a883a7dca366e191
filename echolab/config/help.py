"""Help of `echolab train`: groups and settings, from the types that validate them.

Defaults come from the YAML files, read without Hydra; nothing heavy is imported.
"""

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from echolab.arguments import METAVARS, closest, help_lines
from echolab.config.check import described, limits_in_words, names, renamed, shown
from echolab.config.folders import default_settings, group_choices, summary_of
from echolab.config.schema import Settings
from echolab.config.sync_schema import SyncModel
from echolab.errors import ConfigError

# Text around the list of settings.
USAGE = """\
usage: echolab train [experiment=NAME] [GROUP=CHOICE ...] [key=value ...]
       echolab train -m key=a,b,c [launcher=slurm] ...   a sweep over all combinations
       echolab train --help [KEY ...]                    one setting, section or group

Train a run in the folder run_dir. The same command resumes a run or a sweep that was stopped."""
OPTIONS = {
    "-m, --multirun": "sweep: train all comma-separated values, one after another or with "
    "launcher=slurm as jobs; may be anywhere on the command line",
    "--config-dir PATH": "folder of your own YAML files, searched before those of echolab: "
    "PATH/experiment/mine.yaml is experiment=mine",
    "--cfg job [--package KEY]": "print the composed settings and exit",
}
FOOTER = """\
Paths and texts (run_dir, data.clips, pretrained, logger.project, ...) are used as typed, with
spaces, = # ( ~ , and any other characters. Only null, ${...}, [lists] of datasets and quoted text
are special: "run_dir='null'" is the text null. In a sweep commas separate values:
"pretrained='a,b',c" is two. All other settings follow Hydra's grammar for overrides.
hydra.launcher.* sets how Slurm jobs are submitted (conf/launcher/slurm.yaml)."""
GROUP_MEANINGS = {
    "experiment": "recipe that sets other groups and keys; give it first",
    "debug": "changes any experiment into a small trial",
}
SHOWN_DEFAULT = 40  # characters


class Key(NamedTuple):
    """One setting as printed in the help."""

    name: str
    metavar: str
    text: str
    heading: str  # heading before the setting, or ""


def help_of(
    wanted: Sequence[str], folders: Sequence[Path], composed: Mapping[str, Any] | None = None
) -> str:
    """Return the help of all settings, or of the settings, sections and groups `wanted`.

    Defaults come from the `composed` settings if given, else from conf/train.yaml.  Raise
    ConfigError for an unknown name.
    """
    # Defaults come from the YAML files, or from composed settings.
    defaults, chosen = default_settings(folders)
    keys = list(keys_of(Settings, composed or defaults))
    keys += keys_of(SyncModel, {}, "model.", "model: instead of these, model=syncnet has")
    groups = group_choices(folders)
    if wanted:
        parts = [_help_of_one(name, keys, groups, chosen) for name in wanted]
        return "\n\n".join(parts)
    # Options, groups, and then every key by section.
    lines = [USAGE, "", "Options:", *_rows(OPTIONS)]
    lines += ["", "Groups (GROUP=CHOICE sets all keys of a section at once):"]
    lines += _rows({_group_name(g, groups[g]): _group_text(g, chosen) for g in groups})
    return "\n".join([*lines, *_key_lines(keys), "", FOOTER])


def keys_of(
    section: type[BaseModel], values: Any, prefix: str = "", heading: str = ""
) -> Iterator[Key]:
    """Yield the settings of a section in order, including the settings of list items."""
    subsections = []
    # Keys of the section first, its subsections after them.
    for name, field in section.model_fields.items():
        default = "???" if field.is_required() else field.default
        value = values.get(name, default) if isinstance(values, Mapping) else default
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            title = f"{name}: {field.description}"
            subsections.append((field.annotation, value, f"{prefix}{name}.", title))
            continue
        text = f"{field.description}{_range(field)} [{_default(value)}]"
        yield Key(f"{prefix}{name}", metavar(field), text, field.title or heading)
        heading = ""
        # Items of a list have their own settings.
        if item := _item_section(field.annotation):
            yield from keys_of(item, {}, f"{prefix}{name}[*].")
    for annotation, value, start, title in subsections:
        yield from keys_of(annotation, value, start, title)


def _item_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section of the items of a list; None if the items are plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_item_section(part) for part in typing.get_args(annotation))
    return next((part for part in inner if part), None)


def metavar(field: FieldInfo) -> str:
    """Return the type of a setting: INT, {a,b}, [FLOAT,...] or TEXT|null."""
    return _metavar(field.annotation)


def _metavar(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _metavar(inner[0])
    if origin in (types.UnionType, typing.Union):
        return "|".join(map(_metavar, inner))
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin is list:
        return f"[{_metavar(inner[0])},...]"
    if origin is dict:
        return f"{{{_metavar(inner[0]).strip('{}')}: {_metavar(inner[1])}}}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ",".join(annotation.model_fields) + "}"
    return "VALUE" if annotation is Any else METAVARS.get(annotation, str(annotation))


def _range(field: FieldInfo) -> str:
    words = limits_in_words(field)
    return f"; {words}" if words else ""


def _default(value: Any) -> str:
    if value == "???":
        return "required"
    text = shown(value)
    return text if len(text) <= SHOWN_DEFAULT else f"{text[:SHOWN_DEFAULT]}..."


def _rows(rows: Mapping[str, str]) -> list[str]:
    width = min(34, max(map(len, rows), default=0))
    return [line for name, text in rows.items() for line in help_lines(name, text, width)]


def _key_lines(keys: Sequence[Key]) -> list[str]:
    labels = [f"{key.name} {key.metavar}" for key in keys]
    # Print long names on a separate line, so that the texts align.
    width = max((len(label) for label in labels if len(label) <= 34), default=0)
    lines = []
    for key, label in zip(keys, labels, strict=True):
        if key.heading:
            lines += ["", f"{key.heading}:"]
        lines += help_lines(label, key.text, width)
    return lines


def _group_name(group: str, files: Mapping[str, Path]) -> str:
    return f"{group} {{{','.join(files)}}}"


def _group_text(group: str, chosen: Mapping[str, str | None]) -> str:
    field = Settings.model_fields.get(group)
    meaning = GROUP_MEANINGS.get(group) or (field.description if field else "your own group")
    return f"{meaning} [{chosen.get(group) or 'none'}]"


def _help_of_one(
    name: str,
    keys: Sequence[Key],
    groups: Mapping[str, Mapping[str, Path]],
    chosen: Mapping[str, str | None],
) -> str:
    """Return the help of one setting, or of a section with the choices of its group."""
    lines = []
    # A group: list its choices, each with the first comment of its file.
    if name in groups:
        lines += [f"{name}=CHOICE: {_group_text(name, chosen)}"]
        lines += _rows({choice: summary_of(path) for choice, path in groups[name].items()})
    name = re.sub(r"\[\d*\]", "[*]", name)  # all items have the same help
    in_lists = {key.name.replace("[*]", ""): key.name for key in keys}
    name = in_lists.get(name, name)
    wanted = [
        key._replace(heading="")
        for key in keys
        if key.name == name or key.name.startswith((f"{name}.", f"{name}[*]."))
    ]
    if lines and wanted:
        lines.append("")
    lines += _key_lines(wanted)
    if len(wanted) == 1 and (field := _field(wanted[0].name)):
        lines.append(f"  It takes {described(field)}.")
    # Unknown name: propose the present name of a renamed setting, or the nearest name.
    if not lines:
        known = [*names(), *groups, *Settings.model_fields]
        near = f"; did you mean {new}?" if (new := renamed(name)) else closest(name, known)
        raise ConfigError(
            f"{name}: no such setting or group (`echolab train --help` lists all){near}"
        )
    return "\n".join(lines)


def _field(name: str) -> FieldInfo | None:
    # Walk down the sections by the parts of the name.
    section: type[BaseModel] | None = Settings
    field: FieldInfo | None = None
    for part in name.replace("[*]", "").split("."):
        if section is None or part not in section.model_fields:
            return SyncModel.model_fields.get(part)
        field = section.model_fields[part]
        section = _item_section(field.annotation)
    return field
