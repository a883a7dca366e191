"""The remedy of every error works: each kind of error is provoked, and its advice is followed."""

import json
import math
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import encoded
import pytest
from safetensors.torch import load, save

from echolab.cli.__main__ import main
from echolab.cli.train_rank import train
from echolab.config.compose import compose
from echolab.data.bad_samples import read_quarantine
from echolab.data.shard_reader import open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.errors import ConfigError, DataError, DivergedError
from echolab.tracking.metrics import read_metrics
from echolab.training.checkpoints.checkpoint import saved_steps

NEEDED = ["data.clips=x", "data.pairs=y"]


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "advice", "followed"),
    [
        (["sede=1"], "did you mean seed?", ["seed=1"]),
        (["optim.bettas=[0,0]"], "did you mean optim.betas?", ["optim.betas=[0,0]"]),
        (["optim.max_grad_norm=0"], ".inf: no limit", ["optim.max_grad_norm=.inf"]),
        (["optim.max_grad_norm=0"], "above 0, or .inf", ["optim.max_grad_norm=inf"]),
        (["batch_size=6", "micro_batch_size=4"], "use 8, or another micro_batch_size",
         ["batch_size=8", "micro_batch_size=4"]),
        (["trainer=ddp", "batch_size=3"], "use 8, or", ["trainer=ddp", "batch_size=8"]),
        (["trainer=ddp", "trainer.strategy=single"], "use ddp, zero1, zero2 or zero3",
         ["trainer=ddp", "trainer.strategy=zero1"]),
        (["trainer.devices=2"], "use ddp", ["trainer.devices=2", "trainer.strategy=ddp"]),
        (["trainer.sequence_parallel=3"], "use 1", ["trainer.sequence_parallel=1"]),
        (["trainer=ddp", "trainer.sequence_parallel=8", "batch_size=8"],
         "use 1, or a divisor of both", ["trainer=ddp", "trainer.sequence_parallel=4"]),
        (["trainer.offload=optimizer"], "use strategy zero1",
         ["trainer.strategy=zero1", "trainer.offload=optimizer"]),
        (["trainer.offload=optimizer"], "or offload=none", ["trainer.offload=none"]),
        (["trainer=zero3", "trainer.compile=true"], "use strategy zero2",
         ["trainer=zero3", "trainer.compile=true", "trainer.strategy=zero2"]),
        (["trainer.precision=16-mixed"], "one of 32-true, bf16-mixed",
         ["trainer.precision=bf16-mixed"]),
        (["save_every=4", "snapshot_every=6"], "must be a multiple of save_every=4",
         ["save_every=4", "snapshot_every=8"]),
        (["loss_spike.min_history=1"], "at least 2", ["loss_spike.min_history=2"]),
        (["loss_spike.min_history=200"],
         "48 and 128 are usual", ["loss_spike.min_history=48", "loss_spike.window=128"]),
        (["data.pairs=null", "schedule=dpo"], "give one", ["data.pairs=y", "schedule=dpo"]),
        (["data.clip_weights=[1,2]"], "give one for each, or null", ["data.clip_weights=[1]"]),
        (["data.clip_weights=[0]"], "or null", ["data.clip_weights=null"]),
        (["tasks.min_prob=0.2"], "use a smaller one", ["tasks.min_prob=0.19"]),
        (["ref_model=base"], "give lora=attention", ["ref_model=base", "lora=attention"]),
        (["lora.init_from=x"], "give lora=attention too", ["lora.init_from=x", "lora=attention"]),
        (["lora.init_from=x"], "or lora.init_from=null", ["lora.init_from=null"]),
        (["objective.loss_type=exo_pair"], "set it to 1e-3",
         ["objective.loss_type=exo_pair", "objective.label_smoothing=1e-3"]),
        (["model.in_channels=20"], "or 36 with the known mask", ["model.in_channels=36"]),
        (["optim.extra_ema_decays=[0.9,0.9]"], "give each once", ["optim.extra_ema_decays=[0.9]"]),
    ],
)  # fmt: skip
def test_settings(wrong: list[str], advice: str, followed: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compose([*NEEDED, *wrong])
    assert advice in str(error.value)
    compose([*NEEDED, *followed])


# -- runs -----------------------------------------------------------------------------------------

Words = Callable[..., list[str]]


@pytest.fixture
def words(tmp_path: Path) -> Words:
    """Return a function of epochs and further words that gives the command of a run in
    tmp_path/run.
    """
    clips, pairs = encoded.write(tmp_path, 7)

    def of(*more: str) -> list[str]:
        return [
            *encoded.SETTINGS, f"data.clips={clips}", f"data.pairs={pairs}", "batch_size=2",
            "log_every=1", "verify_export=false", f"run_dir={tmp_path / 'run'}", *more,
        ]  # fmt: skip

    return of


def spoil(folder: Path, *numbers: int) -> None:
    """Write a dataset again, with NaN in some of its samples."""
    was = open_dataset(folder)
    members = [(key, was.read(i)) for i, key in enumerate(was.keys)]
    shutil.rmtree(folder)
    with ShardWriter(folder, kind=was.kind, encoders=was.encoders) as writer:
        for i, (key, parts) in enumerate(members):
            tensors = load(parts["safetensors"])
            if i in numbers:
                tensors["text"][0, 0] = math.nan
            writer.write(key, {**parts, "safetensors": save(tensors)})


def run(words: list[str]) -> Any:
    return train(compose(words))


def finite(folder: Path) -> bool:
    rows = read_metrics(folder / "metrics.jsonl")
    return all(math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)


def test_the_gradient_limit_may_be_omitted(words: Words, tmp_path: Path) -> None:
    plan = encoded.plan(("sft", 2))
    assert run(words(plan, "optim.max_grad_norm=.inf")).done and finite(tmp_path / "run")
    assert (
        json.loads((tmp_path / "run/config.json").read_text())["optim"]["max_grad_norm"] == math.inf
    )
    assert run(words(plan, "optim.max_grad_norm=inf")).done, "it is the same limit"
    assert main(["replay", str(tmp_path / "run"), "step=2"]) == 0


def test_a_bad_clip_is_skipped_with_the_budget_that_the_error_names(
    words: Words, tmp_path: Path
) -> None:
    spoil(tmp_path / "clips", 3)
    plan = encoded.plan(("sft", 4))
    with pytest.raises(DataError, match=r"sample clip-3: .* not finite") as error:
        run(words(plan))
    budget = str(error.value).rpartition(" by ")[2]
    assert budget == "data.max_bad_fraction=0.01"
    assert run(words(plan, budget)).done, "in the same folder"
    assert [e["key"] for e in read_quarantine(tmp_path / "run/quarantine.jsonl")] == ["clip-3"]


def test_an_exhausted_budget_may_be_raised(words: Words, tmp_path: Path) -> None:
    spoil(tmp_path / "clips", 2, 3)
    plan = encoded.plan(("sft", 4))
    with pytest.raises(DataError, match=r"2 of 7 samples are bad, .* raise"):
        run(words(plan, "data.max_bad_fraction=0.01"))
    assert run(words(plan, "data.max_bad_fraction=0.3")).done and finite(tmp_path / "run")


def test_a_bad_clip_that_is_encoded_again_is_trained_on(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good"
    shutil.copytree(tmp_path / "clips", good)
    spoil(tmp_path / "clips", 3)
    plan = encoded.plan(("sft", 4))
    with pytest.raises(DataError, match="clip-3: .*; encode it again"):
        run(words(plan))
    # As `why` advises, the full dataset is verified.
    assert main(["data", "verify", str(tmp_path / "clips"), "deep=true"]) == 1
    assert "sample clip-3" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "clips")
    shutil.copytree(good, tmp_path / "clips")
    assert run(words(plan)).done and finite(tmp_path / "run")


def diverging(rate: str) -> str:
    scale = Decimal(rate) / Decimal("1e-3")
    return f"schedule.epochs=[{{kind:sft,steps:3}},{{kind:sft,steps:5,lr_scale:{scale:f}}}]"


def test_a_diverged_run_continues_as_its_error_advises(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DivergedError) as error:
        run(words(diverging("1e30")))
    assert "`echolab rollback RUN to=STEP` if the newest is damaged" in str(error.value)
    assert "`echolab replay RUN step=5` names the clips" in str(error.value)
    # Replay names the clips, and does not say again what sent the user there.
    assert main(["replay", str(folder), "step=5"]) == 0
    said = capsys.readouterr().out
    assert "step 4 (sft): loss nan is not finite, as in the run; clips of its sft batch 4" in said
    assert said.count("clip-") == 2 and "replay" not in said
    assert main(["replay", str(folder), "step=5", "format=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reproduced"] and report["batch"] == 4 and len(report["clips"]) == 2
    assert main(["rollback", str(folder), f"to={min(saved_steps(folder / 'checkpoints'))}"]) == 0
    assert run(words(diverging("1e-4"))).done and finite(folder)


@pytest.mark.parametrize("policy", ["recompute", "rollback"])
def test_a_rollback_policy_may_be_set_after_divergence(
    words: Words, tmp_path: Path, policy: str
) -> None:
    with pytest.raises(DivergedError, match="loss_spike.policy=recompute or rollback goes back"):
        run(words(diverging("1e30")))
    with pytest.raises(DivergedError) as error:  # it goes back, and says that this did not help
        run(words(diverging("1e30"), f"loss_spike.policy={policy}"))
    assert "loss_spike.max_rollbacks" in str(error.value)
    events = (tmp_path / "run/events.jsonl").read_text()
    assert f'"{policy}"' in events


def test_without_a_checkpoint_a_lower_rate_restarts_the_run(words: Words, tmp_path: Path) -> None:
    late = ("schedule.epochs=[{kind:sft,steps:6}]", "save_every=100")
    with pytest.raises(DivergedError, match="lower the learning rate"):
        run(words(*late, "optim.lr=1e30"))
    assert not saved_steps(tmp_path / "run/checkpoints")
    assert run(words(*late, "optim.lr=1e-4")).done


# -- commands -------------------------------------------------------------------------------------


def test_commands_that_errors_advise_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each error is followed by the command that it advises."""
    data = tmp_path / "drawn"
    steps: list[tuple[list[str], str, list[str]]] = [
        (["data", "verifi", "x"], "verify", ["data", "verify", str(data)]),
        (["data", "verify", str(data), "workers=0"], "at least 1",
         ["data", "verify", str(data), "workers=1"]),
        (["fit", "autoencoder", str(data), f"out={data}"], "is a folder; name a file in it",
         ["fit", "autoencoder", str(data), f"out={data / 'net.safetensors'}", "steps=1"]),
        (["estimate", "model=nothing"], "one of demo", ["estimate", "model=demo"]),
        (["estimate", "demo", "frames=8"], "must be 4n+1", ["estimate", "demo", "frames=9"]),
    ]  # fmt: skip
    from data_prep.__main__ import main as prepare

    assert prepare(["draw", str(data), "num_clips=3", "frames=6"]) == 1
    assert "must be 4n+1 and 5 or more" in capsys.readouterr().err
    assert prepare(["draw", str(data), "num_clips=3", "frames=5", "size=32"]) == 0
    for wrong, advice, followed in steps:
        assert main(wrong) != 0, wrong
        assert advice in capsys.readouterr().err, wrong
        assert main(followed) == 0, followed
        capsys.readouterr()
