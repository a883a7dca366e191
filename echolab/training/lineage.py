"""What a run has been trained on, and from which step on, as its checkpoints record it.

Datasets compare by fingerprint, checkpoints and weights by content: where they lie, and how their
path is spelled, is no part of what a run is.  A checkpoint's state holds

    "data": [{"first": 0, "clips": [[fingerprint, hash of the keys, order name], ...],
              "pairs": [...]}, {"first": 400, ...}]
    "origins": {"init_from": {"content": ..., "step": ..., "run": ...}, "pretrained": {...}, ...}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from echolab.data.train_dataset import Stock
from echolab.errors import EcholabError
from echolab.training.datamodule import Feed

Data = dict[str, Any]
GROUPS = {"clips": "sft", "pairs": "preference"}  # by key of `Training`, the schedule's group


def data_of(feed: Feed) -> Data:
    """Return what the batches of `feed` are drawn from, by content."""
    return {"clips": _listed(feed.clips), "pairs": _listed(feed.pairs)}


def _listed(stock: Stock | None) -> list[list[str]]:
    return [
        [dataset.fingerprint, dataset.keys_digest, source.named]
        for dataset, source in (
            zip(stock.datasets, stock.plan.sources, strict=True) if stock else ()
        )
    ]


def saved_data(state: Mapping[str, Any]) -> list[Data]:
    """Return the data of a checkpoint by first step; one from before they were saved had one."""
    if "data" in state:
        return list(state["data"])
    clips = [[name, "", name] for name in state["clips"]]
    return [{"first": 0, "clips": clips, "pairs": [[p, "", p] for p in state.get("pairs", [])]}]


def continued(state: Mapping[str, Any], now: Data, step: int) -> list[Data]:
    """Return the data by first step of a run that goes on from `step` with `now`."""
    now = {key: now[key] for key in GROUPS}
    before = [data for data in saved_data(state) if data["first"] < step]
    if before and all(before[-1][key] == now[key] for key in GROUPS):
        return before
    return [*before, {"first": step if before else 0, **now}]


def order_names(was: Data, now: Data) -> dict[str, list[str]]:
    """Return what the order of each dataset goes on to depend on.

    The same samples, encoded again, keep the order of those that they replace, so that the epoch
    under way still meets each of them once.
    """
    return {
        key: [
            old[2] if old and (old[0] == new[0] or old[1] == new[1]) else new[0]
            for old, new in zip(_padded(was[key], len(now[key])), now[key], strict=True)
        ]
        for key in GROUPS
    }


def _padded(rows: Sequence[list[str]], length: int) -> list[list[str]]:
    return [*rows, *[[] for _ in range(length)]][:length]


def changed_data(was: Data, now: Data) -> list[str]:
    """Return the keys whose datasets are not those that were trained on."""
    return [key for key in GROUPS if [r[0] for r in was[key]] != [r[0] for r in now[key]]]


def check_origins(was: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Raise EcholabError where a run did not start from, or refer to, what is given now."""
    for key in sorted({*was, *now}):
        if not _same_origin(key, was.get(key), now.get(key)):
            raise EcholabError(
                f"{place}: {key}= was {_words(was.get(key))}, now {_words(now.get(key))}; give "
                "what the run began with, or a new run folder by run_dir=..."
            )


def _same_origin(key: str, was: Any, now: Any) -> bool:
    if was is None or now is None:
        return was is now
    # The run that this one started from may have been trained on since: its weights are past.
    moved_on = key == "init_from" and was.get("run") and was["run"] == now.get("run")
    return bool(was["content"] == now["content"] or (moved_on and now["step"] >= was["step"]))


def _words(origin: Mapping[str, Any] | None) -> str:
    if origin is None:
        return "not given"
    step = f"step {origin['step']}, " if "step" in origin else ""
    return f"{step}sha256 {origin['content'][:12]}..."
