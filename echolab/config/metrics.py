"""Read a choice of the group metrics for commands that are not composed by Hydra."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from echolab.config.folders import CONF
from echolab.errors import ConfigError

GROUP = "metrics"


def metrics_named(name: str) -> dict[str, Any]:
    """Return conf/metrics/NAME.yaml, or a YAML file of that path, as plain values.

    Raise ConfigError for an unknown choice or for a file of another form.
    """
    shipped = CONF / GROUP / f"{name}.yaml"
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped
    if not path.is_file():
        choices = ", ".join(sorted(file.stem for file in (CONF / GROUP).glob("*.yaml")))
        raise ConfigError(f"metrics={name}: not one of {choices}; give one, or a YAML file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # of the YAML parser or of OmegaConf
        line = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({line}); correct it") from error
    # The settings of a training run are checked by the schema; here the form is enough.
    if not isinstance(content, dict) or not _is_list_of_metrics(content.get("scores")):
        raise ConfigError(f"{path}: must have scores, a list of names and targets; correct it")
    return {str(key): value for key, value in content.items()}


def _is_list_of_metrics(scores: Any) -> bool:
    # The settings of a training run are checked by the schema; here the form is enough.
    return isinstance(scores, list) and all(
        isinstance(entry, dict) and {"names", "target"} <= set(entry) for entry in scores
    )
