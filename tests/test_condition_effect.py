"""The effect of text, image and audio: zero if the network ignores it, equal on any ranks."""

from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from torch import nn

from echolab.data.bad_samples import TolerantReader
from echolab.data.shard_reader import ShardDataset
from echolab.training.callbacks.condition_effect import (
    ProbeShare,
    effect_table,
    effects_of,
    middle,
    read_probe,
)
from echolab.training.config import Intervals
from echolab.training.datamodule import ValData

CLIPS, SIGMA = 5, 0.5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return runs.write_clips(tmp_path_factory.mktemp("held") / "clips", CLIPS)


def probe(clips: ShardDataset, row: int = 0, rows: int = 1, **settings: Any) -> ProbeShare:
    share = read_probe(ValData(clips, **settings), row, rows, TolerantReader(clips))
    assert share is not None
    return share


def table(net: nn.Module, share: ProbeShare) -> torch.Tensor:
    return effect_table(
        net, share, runs.PHASES, SIGMA, seed=1, device=CPU, dtype=torch.float32, poll=lambda: None
    )


def test_a_condition_that_the_network_ignores_has_no_effect(clips: ShardDataset) -> None:
    net = tiny.net(trained=True)

    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, latents: Any, timesteps: Any, conditions: Any, weights: Any) -> Any:
            silent = conditions._replace(audio=torch.zeros_like(conditions.audio))
            return self.net(latents, timesteps, silent, weights)

    full = effects_of(table(net, probe(clips)))
    deaf = effects_of(table(Deaf(), probe(clips)))
    assert deaf["val/effect/audio"] == deaf["val/effect_output/audio"] == 0
    assert deaf["val/effect_output/text"] > 0 and full["val/effect_output/audio"] > 0
    assert set(full) == {
        f"val/{kind}/{name}" for kind in ("effect", "effect_output")
        for name in ("text", "image", "audio")
    }  # fmt: skip


def test_effects_by_hand() -> None:
    """Two clips: errors 1 and 3; audio of the other raises them to 2 and 4: by half of 2."""
    rows = torch.zeros(2, 4, 2, dtype=torch.float64)
    rows[:, :, 0] = torch.tensor([[1.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 4.0]])
    rows[:, 3, 1] = torch.tensor([0.1, 0.3])
    effects = effects_of(rows)
    assert effects["val/effect/audio"] == pytest.approx(0.5)
    assert effects["val/effect_output/audio"] == pytest.approx(0.2)
    assert effects["val/effect/text"] == effects["val/effect/image"] == 0


@pytest.mark.parametrize("rows", [2, 3])
def test_the_tables_of_all_ranks_sum_to_that_of_one(clips: ShardDataset, rows: int) -> None:
    net = tiny.net(trained=True)
    shares = [probe(clips, row, rows, batch_size=1) for row in range(rows)]
    assert len({len(share.batches) for share in shares}) == 1  # equally many calls
    total = torch.stack([table(net, share) for share in shares]).sum(0)
    assert torch.equal(total, table(net, probe(clips, batch_size=1)))


def test_each_clip_gets_the_conditions_of_the_next(clips: ShardDataset) -> None:
    batches = probe(clips, batch_size=2).batches
    own = torch.cat([batch.conditions.audio for batch, _, _ in batches])
    others = torch.cat([partner.audio for _, partner, _ in batches])
    assert torch.equal(others, own.roll(-1, 0))


def test_one_clip_has_no_partner(clips: ShardDataset) -> None:
    assert read_probe(ValData(clips, num_clips=1), 0, 1, TolerantReader(clips)) is None
    assert middle((0.9, 0.1, 0.5)) == 0.5


def test_a_run_logs_effects_from_its_first_validation_and_trains_as_without(
    clips: ShardDataset, tmp_path: Path
) -> None:
    logged = {}
    for every in (0, 2):
        held_out = ValData(clips, num_clips=4, batch_size=2) if every else None
        _, logged[every] = runs.train(
            tmp_path / str(every), runs.schedule(("sft", 4)), val_data=held_out,
            phases=runs.PHASES, intervals=Intervals(log_every=1, save_every=0, val_every=every),
        )  # fmt: skip
    steps = [row["step"] for row in logged[2] if "val/effect/audio" in row]
    assert steps == [2, 4]
    losses = [
        [row["train/loss"] for row in rows if "train/loss" in row] for rows in logged.values()
    ]
    assert losses[0] == losses[1]
