"""Resume a run: find its newest checkpoint, and check that the settings are compatible with it.

Rank 0 decides for all ranks.  Datasets are compared by fingerprint, checkpoints and weights by
content; their paths do not matter.  The state of a checkpoint contains

    "data": [{"first": 0, "clips": [[fingerprint, hash of the keys, order name], ...],
              "pairs": [...]}, {"first": 400, ...}]
    "origins": {"init_from": {"content": ..., "step": ..., "run": ...}, "pretrained": {...}, ...}
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from echolab.data.shard_reader import check_same_encoders
from echolab.errors import EcholabError
from echolab.training import distributed
from echolab.training.callbacks.callback import RunState
from echolab.training.callbacks.export_check import REPORT, passed_before
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule, TrainData, data_of
from echolab.training.guards.events import History
from echolab.training.module import DiffusionModule
from echolab.training.schedule import Schedule

Data = dict[str, Any]
GROUPS = {"clips": "sft", "pairs": "preference"}  # field of `TrainConfig`: group of the schedule


def open_run(config: TrainConfig, data: ShardDataModule, module: DiffusionModule) -> RunState:
    """Return the state at the newest checkpoint, or at step 0 without a checkpoint; collective.

    Tensors are not restored yet.  Raise EcholabError if the settings differ between ranks or are
    incompatible with the checkpoint.
    """
    # The identity of this run, in which all ranks and the checkpoint must agree.
    folder = config.run_dir / "checkpoints"
    identity = config.identity(data.train_data)
    # Only rank 0 hashed the weights and checkpoints that this run started from.
    origins = distributed.gather_text(json.dumps(dict(config.origins)))[0]
    identity["origins"] = json.loads(origins)
    check_same_settings(config.settings_digest, identity, config.schedule.state_dict())
    # Batches that rollbacks of earlier attempts skipped remain skipped.
    events = History(config.run_dir)
    schedule = config.schedule.leaving_out(events.skips)
    state = RunState(config.run_dir, module, schedule, events, identity)
    data.place = schedule.place
    # Continue from the newest complete checkpoint, if there is one.
    if checkpoint := checkpoints.newest(folder):
        check_continues(checkpoint, identity, schedule)
        _continue_data(state, config, data, checkpoint)
        go_to(state, data, checkpoint)
        state.resumed = checkpoint
    return state


def _continue_data(
    state: RunState, config: TrainConfig, data: ShardDataModule, checkpoint: Checkpoint
) -> None:
    """Use the datasets of the current settings; record an event if they have changed."""
    data.train_data = resumed_train_data(checkpoint, config, data.train_data, state.schedule)
    identity = config.identity(data.train_data)
    state.identity = {
        **identity,
        "origins": checkpoint.state.get("origins", identity["origins"]),
    }
    was, now = saved_data(checkpoint.state)[-1], identity["data"][0]
    changed = changed_data(was, now)
    if changed and checkpoint.step < state.schedule.steps:
        details = {key: {"was": was[key], "now": now[key]} for key in changed}
        state.events.add(checkpoint.step, "data", **details)


def go_to(state: RunState, data: ShardDataModule, checkpoint: Checkpoint) -> None:
    """Restore step, schedule, data and curriculum from a checkpoint; not tensors and callbacks."""
    state.step, state.checkpoint = checkpoint.step, checkpoint.path
    state.schedule = state.schedule.continuing(checkpoint.state["schedule"], checkpoint.step)
    sources = continued_data(checkpoint.state, state.identity["data"][-1], checkpoint.step)
    state.identity = {**state.identity, "data": sources}
    data.go_to(checkpoint.step)
    data.curriculum.load_state_dict(checkpoint.state["curriculum"])


def check_same_settings(
    agreed: str, identity: Mapping[str, Any], schedule: Mapping[str, Any]
) -> None:
    """Raise EcholabError if ranks were given different settings; collective."""
    if not distributed.agree(json.dumps([agreed, identity, schedule])):
        raise EcholabError("the ranks were given different settings; start them all alike")


def awaits_export_check(checkpoint: Checkpoint, config: TrainConfig) -> bool:
    """Return whether all steps are done but the export of the checkpoint is not verified.

    This is so if the check failed, or if the process was killed after the last save and before the
    end of the check.  Only the check is repeated, no step.  Collective.
    """
    if not config.verify_export or checkpoint.step < config.schedule.steps:
        return False
    # Rank 0 reads the report for all ranks.
    passed = distributed.from_first(int(passed_before(config.run_dir, checkpoint.path) is True))
    if not passed and distributed.rank() == 0:
        print(
            f"echolab: {checkpoint.path}: all steps are done, but its export was not verified yet "
            f"({config.run_dir / REPORT}); the check is repeated",
            file=sys.stderr,
        )
    return not passed


def check_continues(
    checkpoint: Checkpoint, identity: Mapping[str, Any], schedule: Schedule
) -> None:
    """Raise EcholabError, naming the difference, if the checkpoint belongs to another run."""
    # Compare network and schedule, then the data and its order.
    checkpoints.check_architecture(checkpoint, identity["architecture"])
    checkpoints.check_adapters(checkpoint, identity.get("adapters"))
    schedule.check_continues(checkpoint.state["schedule"], checkpoint.step)
    encoders = checkpoint.state.get("encoders") or {}
    check_same_encoders(checkpoint.path, encoders, "data.clips", identity["encoders"])
    if "origins" in checkpoint.state:
        check_origins(checkpoint.state["origins"], identity["origins"], str(checkpoint.path))
    for key in ("seed", "batch_size", "order"):
        was, now = checkpoint.state.get(key), identity[key]
        if was and key == "order":  # its datasets are compared by `resumed_train_data`
            was, now = {**was, "datasets": []}, {**now, "datasets": []}
        if was != now:
            raise EcholabError(
                f"{checkpoint.path}: {key} was {was}, now {now}; give the old value, or a new run "
                "folder"
            )


def resumed_train_data(
    checkpoint: Checkpoint, config: TrainConfig, train_data: TrainData, schedule: Schedule
) -> TrainData:
    """Return the training data to continue with: as planned, or with accepted changed datasets.

    Raise EcholabError if datasets that were trained on have changed and the settings do not accept
    this.
    """
    # Datasets that were trained on must not change unless the settings accept it.
    was, now = saved_data(checkpoint.state)[-1], data_of(train_data)
    changed = [
        key
        for key in changed_data(was, now)
        if schedule.begun(GROUPS[key], checkpoint.step)  # ignore groups not trained on yet
    ]
    if changed and not config.accepts_changed_data:
        key = changed[0]
        names = ", ".join(str(dataset.folder) for dataset in getattr(config, key)) or "nothing"
        prints = [[row[0][:12] for row in each[key]] for each in (was, now)]
        raise EcholabError(
            f"data.{key}: {names} is not what the run was trained on up to step {checkpoint.step} "
            f"(fingerprints {prints[0]} then, {prints[1]} now); put that back, or give "
            "data.changed=accept to continue with the new data, which events.jsonl then records"
        )
    # Samples that were encoded again keep their order.
    names_of = order_names(was, now)
    same_order = all([row[2] for row in now[key]] == names_of[key] for key in GROUPS)
    train_data = train_data if same_order else config.build_data(names_of)
    if not changed and (old := checkpoint.state.get("order")) != (
        new := train_data.clips.sampler.state()
    ):
        raise EcholabError(
            f"{checkpoint.path}: order was {old}, now {new}; give the old value, or a new run "
            "folder"
        )
    return train_data


def saved_data(state: Mapping[str, Any]) -> list[Data]:
    """Return the datasets of a checkpoint by first step.

    Old checkpoints without "data" have a single entry.
    """
    if "data" in state:
        return list(state["data"])
    clips = [[name, "", name] for name in state["clips"]]
    return [{"first": 0, "clips": clips, "pairs": [[p, "", p] for p in state.get("pairs", [])]}]


def continued_data(state: Mapping[str, Any], now: Data, step: int) -> list[Data]:
    """Return the datasets by first step of a run that continues from `step` with `now`."""
    now = {key: now[key] for key in GROUPS}
    # Merge consecutive entries with the same datasets.
    earlier = [data for data in saved_data(state) if data["first"] < step]
    if earlier and all(earlier[-1][key] == now[key] for key in GROUPS):
        return earlier
    return [*earlier, {"first": step if earlier else 0, **now}]


def order_names(was: Data, now: Data) -> dict[str, list[str]]:
    """Return the names by which each dataset is shuffled from now on.

    Samples that were encoded again keep the order of the samples that they replace, so that the
    current epoch still contains each sample once.
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
    """Return the keys of GROUPS whose datasets have changed."""
    return [key for key in GROUPS if [r[0] for r in was[key]] != [r[0] for r in now[key]]]


def check_origins(was: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Raise EcholabError if initial weights or reference differ from those of the run so far."""
    for key in sorted({*was, *now}):
        if not _same_origin(key, was.get(key), now.get(key)):
            raise EcholabError(
                f"{place}: {key}= was {_describe_origin(was.get(key))}, now "
                f"{_describe_origin(now.get(key))}; give what the run began with, or a new run "
                "folder by run_dir=..."
            )


def _same_origin(key: str, was: Any, now: Any) -> bool:
    if was is None or now is None:
        return was is now
    # The run that this one started from may have been trained further, and its old checkpoint
    # removed: accept a later checkpoint of the same run.
    same_run = key == "init_from" and was.get("run") and was["run"] == now.get("run")
    return bool(was["content"] == now["content"] or (same_run and now["step"] >= was["step"]))


def _describe_origin(origin: Mapping[str, Any] | None) -> str:
    if origin is None:
        return "not given"
    step = f"step {origin['step']}, " if "step" in origin else ""
    return f"{step}sha256 {origin['content'][:12]}..."
