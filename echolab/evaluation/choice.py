"""Build the metrics that a configuration names: plain functions of registered modules.

    scores:
      - names: [sync_c_demo, sync_d_demo]
        target: echolab.metrics.demo:sync
        args: {network: sync_evaluator}

A target is an import path of a function below echolab.metrics, or one that an installed
distribution registers as an entry point of the group `echolab.metrics`.  Nothing else is imported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from echolab.errors import ConfigError, WeightsError
from echolab.metrics.metric import VideoMetric
from echolab.metrics.setup import Setup
from echolab.plugins import check_arguments, import_registered

GROUP, NAMESPACE = "echolab.metrics", "echolab.metrics"
Entry = Mapping[str, Any]  # names, target and args of one metric


def chosen(scores: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """Return the entries that compute the named scores; raise ConfigError for an unknown name."""
    # A misspelled name must not silently compute less.
    known = [name for entry in scores for name in entry["names"]]
    for name in names:
        if name not in known:
            raise ConfigError(f"score {name}: not among {', '.join(known)}; give one of them")
    return [entry for entry in scores if set(entry["names"]) & set(names)]


def build_metrics(
    scores: Sequence[Entry], setup: Setup, *, required: bool = False
) -> tuple[list[VideoMetric], list[str]]:
    """Return the metrics, and a line for each that cannot be built.

    With `required` a metric whose files are missing is an error.  Raise ConfigError for a target
    that is not registered, for wrong arguments, or for names that are not those of the metric.
    """
    # A metric without its files is left out by name; all other faults are errors.
    metrics, lines = [], []
    for number, entry in enumerate(scores):
        setting, names = f"metrics.scores[{number}]", list(entry["names"])
        try:
            metric = _build(entry["target"], entry.get("args") or {}, setting, setup)
        except WeightsError as error:
            if required:
                raise WeightsError(f"{', '.join(names)}: {error}") from error
            lines.append(f"{', '.join(names)}: left out: {error}")
            continue
        # The names are in the configuration, so that scores can be chosen before any file is read.
        if set(names) != set(metric.cards()):
            raise ConfigError(
                f"{setting}.names={names}: {entry['target']} computes {sorted(metric.cards())}; "
                "give these"
            )
        metrics.append(metric)
    return metrics, lines


def _build(target: str, arguments: Mapping[str, Any], setting: str, setup: Setup) -> VideoMetric:
    """Import a registered function and call it."""
    function = import_registered(target, setting, group=GROUP, namespace=NAMESPACE, kind="function")
    # Wrong arguments are named before any file is read.
    check_arguments(function, (setup,), arguments, target, setting)
    metric = function(setup, **arguments)
    if not isinstance(metric, VideoMetric):
        raise ConfigError(
            f"{setting}.target={target}: returns no VideoMetric; give a function of a metric"
        )
    return metric
