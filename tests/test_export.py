"""`echolab export`: what is written equals what was read, bit for bit, and starts the next run."""

import json
import re
from pathlib import Path

import encoded
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from echolab.cli.__main__ import main
from echolab.config.networks import last_checkpoint, load_policy, load_released
from echolab.errors import CheckpointError, ConfigError, WeightsError
from echolab.models import loading
from echolab.models.export import write_diffusers, write_original
from echolab.models.state_dict import released_shapes
from echolab.training.checkpoints.checkpoint import open_checkpoint

FP32 = {"dtype": torch.float32, "shard_bytes": 10**9}
WRITERS = {"original": write_original, "diffusers": write_diffusers}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


@pytest.mark.parametrize("model", tiny.MODELS)
@pytest.mark.parametrize("names", WRITERS)
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["one file", "shards"])
def test_reading_an_export_gives_the_same_weights(
    model: str, names: str, shard_bytes: int, tmp_path: Path
) -> None:
    net = tiny.model(model)
    before = net.state_dict()
    files = WRITERS[names](
        tmp_path / "out", net, before, dtype=torch.float32, shard_bytes=shard_bytes
    )
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert (len(weights) > 1) == (shard_bytes < 10**9)
    kept = [load_file(file) for file in weights]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in kept]
    assert all(s <= shard_bytes or len(k) == 1 for s, k in zip(sizes, kept, strict=True))
    loaded = loading.load_released(tmp_path / "out", tiny.architecture(model))
    assert bits(loaded.net.state_dict()) == bits(before)
    again = WRITERS[names](
        tmp_path / "again", loaded.net, loaded.net.state_dict(), dtype=torch.float32,
        shard_bytes=shard_bytes,
    )  # fmt: skip
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    assert not list(tmp_path.glob(".partial*"))


def test_an_exported_flash_file_has_all_released_names(tmp_path: Path) -> None:
    net = tiny.model("echomimicv3_flash")
    write_original(tmp_path / "a.safetensors", net, net.state_dict(), **FP32)
    there = load_file(tmp_path / "a.safetensors")
    assert {name: tensor.shape for name, tensor in there.items()} == released_shapes(net)
    dead = {name for name, tensor in there.items() if not tensor.any()}
    assert dead == {name for name in there if "q_audio" in name} and len(dead) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_released_flash_file_is_exported_unchanged(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = tiny.architecture("echomimicv3_flash")
    monkeypatch.setattr("echolab.cli.export.architecture_of", lambda name: architecture)
    shapes = released_shapes(tiny.model("echomimicv3_flash"))
    before = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(before, tmp_path / "a.safetensors")
    words = [f"{tmp_path}/a.safetensors", f"out={tmp_path}/b.safetensors"]
    assert main(["export", *words, "model=echomimicv3_flash"]) == 0
    after = load_file(tmp_path / "b.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].dtype == dtype for name in before)


@pytest.mark.parametrize("model", ["wan_t2v_1b3", "wan_fun_inp_1b3"])
def test_diffusers_reads_the_exported_folder(model: str, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    net = tiny.model(model)
    write_diffusers(
        tmp_path / "out", net, net.state_dict(), dtype=torch.float32, shard_bytes=90_000
    )
    theirs, info = WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    theirs.save_pretrained(tmp_path / "theirs")
    back = loading.load_released(tmp_path / "theirs", tiny.architecture(model)).net
    assert bits(back.state_dict()) == bits(net.state_dict())


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny.model("wan_t2v_1b3")
    tensors = net.state_dict()
    write_original(tmp_path / "a.safetensors", net, tensors, **FP32)
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"a\.safetensors: exists already"):
        write_original(tmp_path / "a.safetensors", net, tensors, **FP32)
    with pytest.raises(ConfigError, match="more than shard_gb=4e-05; give a folder"):
        write_original(
            tmp_path / "b.safetensors", net, tensors, dtype=torch.float32, shard_bytes=40_000
        )
    with pytest.raises(ConfigError, match="writes a folder"):
        write_diffusers(tmp_path / "b.safetensors", net, tensors, **FP32)
    short = {name: tensor for name, tensor in tensors.items() if name != "head.head.bias"}
    with pytest.raises(CheckpointError, match=r"head\.head\.bias is missing"):
        write_original(tmp_path / "b", net, short, **FP32)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("echolab.models.export.fsync", full)
    with pytest.raises(WeightsError, match="b: could not be written .*No space left"):
        write_original(tmp_path / "b", net, tensors, **FP32)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return a run of three steps, and its settings."""
    root = tmp_path_factory.mktemp("run")
    clips, _ = encoded.write(root)
    words = ["train", *encoded.SETTINGS, f"data.clips={clips}", encoded.plan(("sft", 3))]
    averages = [
        "optim.extra_ema_decays=[0.5]",
        "optim.posthoc_ema_stds=[0.05,0.1]",
        "snapshot_every=2",
    ]
    assert main([*words, f"run_dir={root / 'run'}", *averages]) == 0
    return root / "run", words


def test_an_exported_run_starts_another(
    run: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = run
    capsys.readouterr()
    for weights, kind in (("ema", "ema"), ("raw", "master")):
        out = tmp_path / f"{weights}.safetensors"
        command = ["export", str(folder), f"out={out}", "dtype=fp32", f"which={weights}"]
        assert main([*command, "format=json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        part = open_checkpoint(last_checkpoint(folder)).tensors(kind)
        assert bits(load_file(out)) == bits(part)
        assert figures["bytes"] == out.stat().st_size and figures["tensors"] == len(part)
    assert (tmp_path / "ema.safetensors").read_bytes() != (
        tmp_path / "raw.safetensors"
    ).read_bytes()

    policy = load_policy(last_checkpoint(folder))
    architecture = open_checkpoint(last_checkpoint(folder)).state["architecture"]
    again = load_released(tmp_path / "ema.safetensors", architecture)
    assert bits(again.state_dict()) == bits(policy.state_dict())
    assert not any(parameter.requires_grad for parameter in again.parameters())

    start = [*words, f"pretrained={tmp_path / 'ema.safetensors'}", f"run_dir={tmp_path / 'next'}"]
    assert main([*start, encoded.plan(("sft", 1)), "optim.lr=0"]) == 0
    first = open_checkpoint(last_checkpoint(tmp_path / "next")).tensors("master")
    assert bits(first) == bits(policy.state_dict())


def test_other_averages_are_exported(
    run: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Averages are exported by name, or by any width; a saved one is exported unchanged."""
    checkpoint = open_checkpoint(last_checkpoint(run[0]))
    assert checkpoint.parts[:4] == ["ema", "ema-0.5", "exp_avg", "exp_avg_sq"]
    for number, (word, part) in enumerate(
        [("which=ema-0.5", "ema-0.5"), ("ema_std=0.1", "power-0.1")]
    ):
        out = tmp_path / f"{number}.safetensors"
        assert main(["export", str(run[0]), f"out={out}", "dtype=fp32", word]) == 0
        actual, kept = load_file(out), checkpoint.tensors(part)
        torch.testing.assert_close(actual, {name: kept[name] for name in actual}, atol=1e-5, rtol=0)
    capsys.readouterr()
    for word, answer in [
        ("which=mean", "which=mean: unknown"),
        ("which=ema-0.25", "has no ema-0.25"),
        ("ema_std=0.4", "must lie in"),
    ]:
        assert main(["export", str(run[0]), f"out={tmp_path / 'none'}", word]) == 1
        error = capsys.readouterr().err
        assert answer in error and error.count("\n") == 1


def test_adapters_are_exported_alone_or_merged(
    run: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, words = run
    adapted = tmp_path / "adapted"
    assert main([*words, "lora=attention", f"init_from={base}", f"run_dir={adapted}"]) == 0
    assert main(["export", str(adapted), f"out={tmp_path / 'peft'}", "which=adapters"]) == 0
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    neighbor = {"peft.safetensors", "peft.audio.safetensors"}
    assert {path.name for path in tmp_path.glob("peft*.safetensors")} == neighbor
    assert main(["export", str(adapted), f"out={tmp_path / 'peft'}", "which=adapters"]) == 1
    single = tmp_path / "single.safetensors"
    assert main(["export", str(adapted), f"out={single}", "which=adapters", "dtype=bf16"]) == 0
    assert {tensor.dtype for tensor in load_file(single).values()} == {
        torch.bfloat16, torch.float32,  # the alphas
    }  # fmt: skip
    assert main(["export", str(adapted), f"out={tmp_path / 'unbroken'}", "dtype=fp32"]) == 0
    tensors = load_policy(last_checkpoint(adapted)).state_dict()
    assert bits(load_file(tmp_path / "unbroken" / "diffusion_pytorch_model.safetensors")) == bits(
        tensors
    )
    capsys.readouterr()
    for source, weights in ((base, "adapters"), (adapted, "raw")):
        assert main(["export", str(source), f"out={tmp_path / 'x'}", f"which={weights}"]) == 1
        assert "adapters" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_released_weights_are_converted_between_naming_schemes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = tiny.model("wan_fun_inp_1b3").bfloat16()
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    monkeypatch.setattr("echolab.cli.export.architecture_of", tiny.architecture)
    words = [f"out={tmp_path / 'theirs'}", "names=diffusers", "model=wan_fun_inp_1b3"]
    assert main(["export", str(tmp_path / "in.safetensors"), *words]) == 0
    words = [f"out={tmp_path / 'out.safetensors'}", "model=wan_fun_inp_1b3"]
    assert main(["export", str(tmp_path / "theirs"), *words]) == 0
    there = load_file(tmp_path / "out.safetensors")
    assert there.keys() == net.state_dict().keys()
    assert all(torch.equal(there[name], tensor) for name, tensor in net.state_dict().items())
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in.safetensors", "out=x"], "no run or checkpoint.*model=NAME"),
        (["in.safetensors", "out=x", "model=nothing"], "model=nothing: unknown; one of demo"),
        (
            ["in.safetensors", "out=x", "model=demo", "shard_gb=0"],
            "shard_gb=0 is not a number, above 0",
        ),
        (["in.safetensors", "out=x", "model=demo"], "in.safetensors: not there"),
        ([".", "out=x"], "no complete checkpoint"),
    ],
)
def test_wrong_arguments_give_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
