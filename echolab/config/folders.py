"""Folders of YAML settings: the user's folder (--config-dir) first, then conf/ of echolab.

A file of the user's folder replaces the shipped file of the same name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echolab.arguments import closest
from echolab.errors import ConfigError

CONF = (Path(__file__).resolve().parents[1] / "conf").resolve()  # part of the wheel
OPTION = "--config-dir"


def with_absolute_folder(words: Sequence[str]) -> list[str]:
    """Return the words with `--config-dir PATH` as one word with an absolute path.

    This word can be passed to ranks, members of a sweep and jobs.  Raise ConfigError if the folder
    is missing or does not exist, or if the option is given twice.
    """
    # The option may be written as one word or as two.
    given: list[str] = []
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == OPTION:
            given.append(next(remaining, ""))
        elif word.startswith(f"{OPTION}="):
            given.append(word.partition("=")[2])
        else:
            rest.append(word)
    if len(given) > 1:
        raise ConfigError(f"{OPTION}={given[1]}: is given twice; give one folder")
    # The folder must exist; return the option as one word.
    for path in given:
        if not path or not Path(path).expanduser().is_dir():
            raise ConfigError(
                f"{OPTION}={path}: no such folder; give one that holds YAML files as conf/ does"
            )
        rest.insert(0, f"{OPTION}={Path(path).expanduser().resolve()}")
    return rest


def folders_of(words: Sequence[str]) -> list[Path]:
    """Return the folders in which settings are searched, in order."""
    given = [word.partition("=")[2] for word in words if word.startswith(f"{OPTION}=")]
    return [*map(Path, given), CONF]


def without_folder(words: Sequence[str]) -> list[str]:
    """Return the words without the option --config-dir."""
    return [word for word in words if not word.startswith(f"{OPTION}=")]


def group_choices(folders: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Return the files of each group by choice; files of earlier folders replace later ones."""
    groups: dict[str, dict[str, Path]] = {}
    # Read the folders in reverse: later assignments replace earlier ones.
    for folder in reversed(folders):
        for path in sorted(folder.glob("*/*.yaml")):
            groups.setdefault(path.parent.name, {})[path.stem] = path
    return {
        group: {choice: path for choice, path in sorted(files.items()) if choice != "default"}
        for group, files in sorted(groups.items())
    }


def default_settings(folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Return the settings of a run without any override, and the choice of each group.

    The files are read without Hydra, whose import takes a second; interpolations are not resolved.
    """
    main = _read(folders, "train")
    chosen: dict[str, str | None] = {}
    settings: dict[str, Any] = {}
    # Read the chosen file of each group.
    for entry in main.pop("defaults"):
        if isinstance(entry, dict):
            ((group, choice),) = entry.items()
            if not group.startswith("override "):
                chosen[group] = choice
                if choice is not None:
                    settings[group] = group_settings(folders, group, choice)
    main.pop("hydra", None)
    return {**settings, **main}, chosen


def group_settings(folders: Sequence[Path], group: str, choice: str) -> dict[str, Any]:
    """Return the settings of one choice of a group, including inherited settings."""
    own = _read(folders, f"{group}/{choice}")
    inherited: dict[str, Any] = {}
    # A file may inherit from other files of its group.
    for base in own.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            inherited |= group_settings(folders, group, base)
    return {**inherited, **own}


def architecture_of(model: str) -> dict[str, Any]:
    """Return the settings of conf/model/NAME.yaml; raise ConfigError if there are none."""
    known = group_choices([CONF])["model"]
    if model not in known:
        raise ConfigError(
            f"model={model}: unknown; one of {', '.join(known)}{closest(model, known)}"
        )
    architecture = group_settings([CONF], "model", model)
    if "network" in architecture:
        raise ConfigError(f"model={model}: is no video model; give a transformer of conf/model")
    return architecture


def _read(folders: Sequence[Path], name: str) -> dict[str, Any]:
    import yaml

    path = next(path for folder in folders if (path := folder / f"{name}.yaml").is_file())
    content: Mapping[str, Any] | None = yaml.load(path.read_text(), yaml.CSafeLoader)
    return dict(content or {})


def summary_of(path: Path) -> str:
    """Return the summary of a YAML file: its first comment, as one line."""
    # The summary ends at the first line that ends with a full stop.
    words: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        words.append(line[2:].strip())
        if line.rstrip().endswith((".", ":")):
            break
    return " ".join(words).rstrip(".:")
