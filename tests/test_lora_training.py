"""Training of adapters: resuming, references on the same base, and the commands."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import encoded
import lora_settings
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from echolab.cli.__main__ import main
from echolab.config.networks import last_checkpoint, load_policy
from echolab.launch import exit_codes
from echolab.launch.processes import run_ranks
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import base_fingerprint
from echolab.training.adapters.lora_files import merge_adapters, read_adapters
from echolab.training.checkpoints.checkpoint import PARTS, latest_valid, open_checkpoint
from echolab.training.config import Intervals

PLAN = (("sft", 2), ("dpo", 2), ("ndpo", 1))
EVERY = Intervals(log_every=1, save_every=1)
HERE = Path(__file__).parent


@pytest.mark.parametrize("reference", ["base", "average"])
def test_a_resumed_run_equals_an_unbroken_run_and_keeps_the_base(
    tmp_path: Path, reference: str
) -> None:
    lora = lora_settings.LORA._replace(dropout=0.3)

    def interrupt(step: int, steps: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    plan = runs.schedule(*PLAN)
    made = lora_settings.settings(reference, lora)
    complete, _ = runs.train(tmp_path / "a", plan, intervals=EVERY, **made)
    first, _ = runs.train(
        tmp_path / "b",
        plan,
        intervals=EVERY,
        on_step=interrupt,
        **lora_settings.settings(reference, lora),
    )
    torch.manual_seed(99)  # what is dropped must not hang on it
    second, _ = runs.train(
        tmp_path / "b", plan, intervals=EVERY, **lora_settings.settings(reference, lora)
    )
    assert first.stopped_by and second.done and complete.checkpoint and second.checkpoint
    assert runs.tensors_of(second.checkpoint) == runs.tensors_of(complete.checkpoint)
    assert base_fingerprint(made["net"]) == base_fingerprint(tiny.net(trained=True))
    checkpoint = open_checkpoint(complete.checkpoint)
    trained = {name for name, p in made["net"].named_parameters() if p.requires_grad}
    for part in PARTS:
        assert set(checkpoint.tensors(part)) == trained and len(trained) == 56


def test_the_base_as_reference_equals_a_frozen_copy_of_it(tmp_path: Path) -> None:
    from echolab.models.frozen import Frozen

    made, copy = lora_settings.settings("base"), lora_settings.settings("base")

    class Pinned(Frozen):
        def load(self, weights: Any) -> None:
            """Leave the base unchanged."""

    frozen = Pinned(tiny.net(trained=True))
    copy["reference"] = frozen
    for kind in ("dpo", "ndpo"):
        copy["objectives"][kind].reference = frozen
    for name, settings in (("a", made), ("b", copy)):
        runs.train(tmp_path / name, runs.schedule(*PLAN), **settings)
    one, other = (latest_valid(tmp_path / name / "run/checkpoints")[0] for name in "ab")
    assert one and other and runs.tensors_of(one.path) == runs.tensors_of(other.path)


@pytest.mark.parametrize(
    ("lora", "base", "message"),
    [
        (lora_settings.LORA._replace(rank=4), {}, "rank is 3 there, 4 here; give lora.r=3"),
        (lora_settings.LORA._replace(alpha=1.0), {}, "alpha is 6.0 there, 1.0 here"),
        (lora_settings.LORA, {"trained": False}, "of other adapters: base is [0-9a-f]{32} there"),
        (None, {}, "of other adapters: targets is .* there, None here"),
    ],
)
def test_a_run_refuses_other_adapters_and_another_base(
    tmp_path: Path, lora: Any, base: dict[str, Any], message: str
) -> None:
    from echolab.errors import CheckpointError

    plan = runs.schedule(("sft", 1))
    runs.train(tmp_path, plan, **lora_settings.settings("base"))
    with pytest.raises(CheckpointError, match=message) as caught:
        runs.train(tmp_path, plan, **(lora_settings.settings("base", lora, **base) if lora else {}))
    assert "\n" not in str(caught.value)


def ranked(root: Path, strategy: str, ranks: int) -> dict[str, Any]:
    """Return the tensors of a run of four steps under a strategy."""
    out, plan = root / strategy, json.dumps([["sft", 2], ["dpo", 2]])
    script = [str(HERE / "rank_training.py"), str(root), strategy, str(ranks), str(out)]
    command = [sys.executable, *script, f"plan={plan}", "lora=average"]
    assert run_ranks(command, ranks) == 0
    checkpoint, _ = latest_valid(out / "checkpoints")
    assert checkpoint
    return {f"{part}/{n}": t for part in PARTS for n, t in checkpoint.tensors(part).items()}


@pytest.mark.slow
def test_two_ranks_train_the_same_adapters(tmp_path: Path) -> None:
    runs.write_clips(tmp_path / "clips", 7)
    runs.write_pairs(tmp_path / "pairs", 5)
    runs.write_clips(tmp_path / "held", 4, 50)
    expected = ranked(tmp_path, "single", 1)
    for strategy in ("ddp", "zero2", "zero3"):
        result = ranked(tmp_path, strategy, 2)
        assert set(result) == set(expected)
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


def velocities(net: EchoTransformer) -> torch.Tensor:
    """Return the velocities of the first clip of `encoded`."""
    from echolab.types import Conditions

    one = {name: tensor[None] for name, tensor in encoded.tensors(0).items()}
    report = Conditions(*(one[n] for n in ("text", "image", "audio", "face")),
                      one["known.i2v"], one["known_latents.i2v"])  # fmt: skip
    with torch.no_grad():
        return net(one["latents"], torch.tensor([500.0]), report)


def test_the_commands_train_export_and_merge_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, pairs = encoded.write(tmp_path / "data")
    words = ["train", *encoded.SETTINGS, f"data.clips={clips}", f"data.pairs={pairs}"]
    lora = ["lora=attention", "lora.r=2", "lora.lora_alpha=4"]

    def train(name: str, *more: str, plan: str = encoded.plan(("sft", 2))) -> int:
        return main([*words, f"run_dir={tmp_path / name}", plan, *more])

    assert train("base") == exit_codes.DONE
    first = ["init_from=" + str(tmp_path / "base"), *lora]
    dpo = encoded.plan(("sft", 1), ("dpo", 2))
    assert train("a", *first, "ref_model=base", plan=dpo) == exit_codes.DONE
    assert train("b", f"init_from={tmp_path / 'a'}", *lora, plan=dpo) == exit_codes.DONE
    base, a, b = (last_checkpoint(tmp_path / name) for name in ("base", "a", "b"))
    report = [open_checkpoint(path).state["adapters"] for path in (a, b)]
    assert report[0] == report[1] and report[0]["origin"]["checkpoint"] == str(base)
    assert report[0]["base"] == base_fingerprint(load_policy(base))

    merged, other = load_policy(a), load_policy(base)
    assert set(merged.state_dict()) == set(other.state_dict())
    assert (
        main(["export", str(tmp_path / "a"), f"out={tmp_path / 'folder'}", "which=adapters"]) == 0
    )
    merge_adapters(other, read_adapters(tmp_path / "folder", other))
    torch.testing.assert_close(velocities(merged), velocities(other), rtol=1e-5, atol=1e-5)
    assert not torch.equal(velocities(load_policy(b)), velocities(merged))

    # Full training from adapters starts from the merged network; adapters from a folder, from it.
    assert train("c", f"init_from={tmp_path / 'a'}", plan=encoded.plan(("sft", 1))) == 0
    assert train("d", *first, f"lora.init_from={tmp_path / 'folder'}") == 0
    capsys.readouterr()
    refused = {
        "ref_model=base: requires adapters": ["ref_model=base"],
        "rank is 2 there, 3 here": ["init_from=" + str(tmp_path / "a"), *lora, "lora.r=3"],
        "is 2, here 5; set lora.r=2":
            [*first, "lora.r=5", f"lora.init_from={tmp_path / 'folder'}"],
        "names none of the network's": [*first, "lora.target_modules=[nothing]"],
        "adapters of another base": [*lora, f"lora.init_from={tmp_path / 'folder'}"],
    }  # fmt: skip
    for message, more in refused.items():
        assert train("refused", *more, plan=encoded.plan(("dpo", 1))) == 1
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1

    assert (
        main(["export", str(tmp_path / "a"), f"out={tmp_path / 'm.safetensors'}", "dtype=fp32"])
        == 0
    )
    exported = load_file(tmp_path / "m.safetensors")
    assert set(exported) == set(merged.state_dict())
    assert all(torch.equal(exported[name], value) for name, value in merged.state_dict().items())
    (base / "manifest.json").unlink()
    assert main(["export", str(tmp_path / "a"), f"out={tmp_path / 'n.safetensors'}"]) == 1
