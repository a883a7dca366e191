"""`echolab generate` with files in the released formats: tiny random ones of each model."""

from pathlib import Path

import pytest
import released
import soundfile
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from data_prep.draw import draw_talker
from echolab.cli.__main__ import main
from echolab.data.media import decode_mp4
from echolab.inference import generate
from echolab.models.transformer import EchoTransformer
from echolab.training.adapters.lora import Lora, add_adapters, base_fingerprint
from echolab.training.adapters.lora_files import save_adapters, trained_tensors

SIZES = {  # of the tiny encoders
    "in_channels": 36, "out_channels": 16, "text_dim": 16, "image_dim": 32, "audio_dim": 16,
    "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 16,
}  # fmt: skip
CHANGES = {
    "wan_t2v_1b3": {"in_channels": 16, "image_dim": None, "audio_dim": None},
    "wan_fun_inp_1b3": {"audio_dim": None},
    "echomimicv3_preview": {},
    "echomimicv3_flash": {"audio_layers": 12},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write encoders, a portrait and 1 s of speech."""
    root, drawn = tmp_path_factory.mktemp("models") / "fun", draw_talker(5, 0, frames=30)
    released.write_release(root)
    released.write_base_960h(root / "wav2vec2-base-960h")
    released.write_chinese_base(root / "chinese-wav2vec2-base")
    Image.fromarray(drawn.frames[0]).save(root / "i.png")
    soundfile.write(root / "a.wav", drawn.samples[:16_000], 16_000)
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "architecture_of", lambda name: {**SIZES, **CHANGES[name]})


def weights(folder: Path, model: str) -> Path:
    net: EchoTransformer = tiny.net(trained=True, **{**SIZES, **CHANGES[model]})
    path = folder / f"{model}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    return path


def words(folder: Path, model: str, out: Path, *more: str) -> list[str]:
    return [
        "generate", f"checkpoint={weights(folder, model)}", f"model={model}",
        f"encoder_dir={folder}", f"out={out}", "size=32", "num_steps=2",
        "prompt=a talking person", *more,
    ]  # fmt: skip


SPEAK = ("image={}/i.png", "audio={}/a.wav", "face=12,8,50,55", "seconds=0.8")


@pytest.mark.parametrize("long", ["joint", "chunked"])
@pytest.mark.parametrize("model", ["echomimicv3_preview", "echomimicv3_flash"])
def test_released_models_generate(folder: Path, tmp_path: Path, model: str, long: str) -> None:
    said = [word.format(folder) for word in SPEAK]
    parts = ["window=13", f"overlap={8 if long == 'chunked' else 2}", f"long_video={long}"]
    out = tmp_path / "v.mp4"
    assert main(words(folder, model, out, *said, *parts)) == 0
    assert decode_mp4(out.read_bytes()).shape == (20, 32, 32, 3)


def test_adapters_change_a_released_model(folder: Path, tmp_path: Path) -> None:
    net = tiny.net(trained=True, **{**SIZES, **CHANGES["echomimicv3_preview"]})
    base, lora = base_fingerprint(net), Lora(("ffn",), rank=2, alpha=64.0)
    add_adapters(net, lora, seed=0)
    tensors, layers = trained_tensors(net)
    for tensor in tensors.values():
        tensor.data.normal_(generator=torch.Generator().manual_seed(0))
    save_adapters(tmp_path / "lora", lora, tensors, layers, base)
    said = [word.format(folder) for word in SPEAK]
    for name, more in (("without", []), ("with", [f"lora={tmp_path / 'lora'}"])):
        assert (
            main(words(folder, "echomimicv3_preview", tmp_path / f"{name}.mp4", *said, *more)) == 0
        )
    assert (tmp_path / "with.mp4").read_bytes() != (tmp_path / "without.mp4").read_bytes()


def test_wan_generates_from_a_prompt_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    for model in ("wan_t2v_1b3", "wan_fun_inp_1b3"):
        said = words(folder, model, out, "task=t2v", "seconds=0.4", "audio_guidance_scale=1")
        assert main(said) == 0
        assert decode_mp4(out.read_bytes()).shape == (10, 32, 32, 3)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("wan_t2v_1b3", SPEAK, "takes no known pixels, task=i2v"),
        ("wan_fun_inp_1b3", SPEAK, "takes no audio"),
        ("echomimicv3_preview", (*SPEAK, "wav2vec=missing"), "missing"),
    ],
)
def test_a_task_that_a_model_lacks_gives_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    model: str, more: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    out = tmp_path / "v.mp4"
    assert main(words(folder, model, out, *(word.format(folder) for word in more))) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("echolab: error:") and message in line and not out.exists()
