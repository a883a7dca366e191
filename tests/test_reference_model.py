"""A reference model that follows the policy: trl's formula, under every strategy, across a resume.

trl 1.16, `SyncRefModelCallback`: ref <- (1 - alpha) ref + alpha policy, every N steps.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from forked import ForkServer
from torch import Tensor
from trl.trainer.callbacks import SyncRefModelCallback

from echolab.config.compose import compose
from echolab.errors import CheckpointError, ConfigError
from echolab.models.frozen import Frozen
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.config import Intervals

PLAN = [("sft", 2), ("dpo", 5), ("ndpo", 3)]
EVERY = Intervals(log_every=1, save_every=3)
ALPHA = 0.3


class Weights(Callback):
    """Records the policy and the reference after each step."""

    def __init__(self, reference: Frozen) -> None:
        self.reference = reference
        self.policies: dict[int, list[Tensor]] = {}
        self.references: dict[int, list[Tensor]] = {}

    def after_step(self, state: RunState) -> None:
        self.policies[state.step] = [p.detach().clone() for p in state.module.net.parameters()]
        self.references[state.step] = [p.clone() for p in self.reference.net.parameters()]


def train(root: Path, out: str, **changes: Any) -> tuple[Weights, list[dict[str, Any]]]:
    reference = Frozen(tiny.net())
    weights = Weights(reference)
    settings = {
        "run_dir": root / out, "intervals": EVERY, "reference": reference,
        "objectives": {
            "sft": runs.Supervised(runs.PHASES),
            "dpo": runs.Preference(runs.PHASES, reference, 100.0, sft_weight=0.5),
            "ndpo": runs.NegativePreference(runs.PHASES, reference, 100.0, 0.2),
        },
        "callbacks": [weights], "ref_model_sync_steps": 2, "ref_model_mixup_alpha": ALPHA,
    }  # fmt: skip
    _, rows = runs.train(root, runs.schedule(*PLAN), **{**settings, **changes})
    return weights, rows


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights, list[Any]]:
    root = tmp_path_factory.mktemp("mixed")
    return root, *train(root, "unbroken")


class Held(torch.nn.Module):
    """Parameters as a module, as trl takes them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = torch.nn.ParameterList([t.clone() for t in tensors])


def test_the_reference_follows_the_policy_by_the_formula_of_trl(
    unbroken: tuple[Path, Weights, list[Any]],
) -> None:
    _, weights, _ = unbroken
    for step in range(3, 11):
        begins = step in (3, 8)  # the epoch's first step, with a reference of its own
        if begins or step % 2:
            same = zip(weights.references[step], weights.references[step - 1], strict=True)
            if not begins:
                assert all(torch.equal(now, before) for now, before in same)
        if step % 2 == 0 and not begins:
            expected = Held(weights.references[step - 1])
            SyncRefModelCallback._sync_target_model(Held(weights.policies[step]), expected, ALPHA)
            for now, then in zip(weights.references[step], expected.tensors, strict=True):
                assert torch.equal(now, then)


def test_an_epoch_begins_with_the_averaged_weights_again(
    unbroken: tuple[Path, Weights, list[Any]],
) -> None:
    root, weights, _ = unbroken
    average = open_checkpoint(root / "unbroken/checkpoints/step-000002").tensors("ema")
    names = [name for name, _ in tiny.net().named_parameters()]
    for name, tensor in zip(names, weights.references[3], strict=True):
        assert torch.equal(tensor, average[name])


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_mixes_the_same_reference(
    unbroken: tuple[Path, Weights, list[Any]], step: int
) -> None:
    """The run stops within the epoch, before and after a mixing."""
    root, weights, _ = unbroken
    out = f"stopped-{step}"
    train(root, out, stop_after_step=step)
    again, _ = train(root, out)
    for at in range(step + 1, 11):
        pairs = zip(again.references[at], weights.references[at], strict=True)
        assert all(torch.equal(now, then) for now, then in pairs), at
    last = "checkpoints/step-000010"
    assert runs.tensors_of(root / out / last) == runs.tensors_of(root / "unbroken" / last)


def test_without_the_setting_nothing_is_mixed_or_saved(
    unbroken: tuple[Path, Weights, list[Any]],
) -> None:
    root, _, _ = unbroken
    weights, _ = train(root, "plain", ref_model_sync_steps=0)
    for step in (4, 5, 6, 7):
        pairs = zip(weights.references[step], weights.references[3], strict=True)
        assert all(torch.equal(now, then) for now, then in pairs)
    saved = open_checkpoint(root / "plain/checkpoints/step-000010")
    assert "ref_model" not in saved.parts and "keeps_reference" not in saved.state["ema"]
    # The saved reference is that of the run: another setting cannot continue from it.
    with pytest.raises(CheckpointError, match="objective.ref_model_sync_steps as they were"):
        train(root, "plain", schedule=runs.schedule(*PLAN, ("dpo", 1)))


def test_settings_that_cannot_be_mixed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ref_model_mixup_alpha=0: must be above 0 and at most"):
        train(tmp_path, "none", ref_model_mixup_alpha=0.0)
    words = ["data.clips=a", "lora=attention", "ref_model=base"]
    with pytest.raises(ConfigError, match="sync_steps=2: the base of the adapters cannot be mixed"):
        compose([*words, "objective.ref_model_sync_steps=2"])


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("zero2", 2), ("zero3", 2)])
def test_every_strategy_mixes_the_same_reference(
    fork_server: ForkServer, tmp_path: Path, strategy: str, world: int
) -> None:
    """The saved reference and the losses equal those of one process."""
    runs.write_clips(tmp_path / "clips", 7)
    runs.write_pairs(tmp_path / "pairs", 5)
    runs.write_clips(tmp_path / "held", 4, 50)
    for name, count in (("single", 1), (strategy, world)):
        words = [str(tmp_path), name, str(count), str(tmp_path / name)]
        words += [f"plan={json.dumps([['sft', 2], ['dpo', 4]])}", "sync=2"]
        fork_server.run("rank_training:main", world=count, arguments={"words": words})
    rows = [json.loads((tmp_path / n / "rows.json").read_text()) for n in ("single", strategy)]
    losses = [[row["train/loss"] for row in some if "train/loss" in row] for some in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    saved = [
        open_checkpoint(tmp_path / name / "checkpoints/step-000006").tensors("ref_model")
        for name in ("single", strategy)
    ]
    assert set(saved[0]) == set(saved[1])
    for name in saved[0]:
        torch.testing.assert_close(saved[1][name], saved[0][name], rtol=1e-3, atol=1e-4)
