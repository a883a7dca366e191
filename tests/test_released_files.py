"""Released weights from their files: every layout, nothing copied, nothing executed."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echolab.errors import CheckpointError, EcholabError, WeightsError
from echolab.models.loading import load_released, read_tensors
from echolab.models.state_dict import AUDIO_PARTS, IMAGE_PARTS, released_shapes, to_diffusers

PREVIEW = tiny.architecture("echomimicv3_preview")


def released(model: str) -> dict[str, Tensor]:
    """Return the tensors of a model's released file, at a small size."""
    generator = torch.Generator().manual_seed(0)
    shapes = released_shapes(tiny.model(model))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Write three shards and their index, as Hugging Face does."""
    folder.mkdir()
    shard_of = {name: f"w-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        own = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        save_file(own, folder / shard)
    (folder / "w.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return folder


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("model", tiny.MODELS)
def test_every_tensor_of_a_released_file_is_loaded_or_named(model: str, tmp_path: Path) -> None:
    tensors = released(model)
    save_file(tensors, tmp_path / "a.safetensors")
    net, report = load_released(tmp_path / "a.safetensors", tiny.architecture(model))
    assert set(report.loaded) | set(report.unused) == set(tensors)
    assert report.fresh == report.widened == []
    assert all(name.split(".")[3] == "q_audio" for name in report.unused)
    assert bool(report.unused) == (model == "echomimicv3_flash")
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, tensors[name]) and parameter.requires_grad, name


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model.diffusion_model."])
@pytest.mark.parametrize("key", [None, "state_dict"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_may_be_nested_in_a_dictionary(
    prefix: str, key: str | None, archive: bool, tmp_path: Path
) -> None:
    tensors = released("echomimicv3_preview")
    content = {prefix + name: tensor for name, tensor in tensors.items()}
    path = tmp_path / "checkpoint-50000.pth"
    torch.save({key: content} if key else content, path, _use_new_zipfile_serialization=archive)
    assert same(read_tensors(path), tensors)


def test_shards_and_folders_are_read(tmp_path: Path) -> None:
    tensors = released("wan_fun_inp_1b3")
    folder = write_shards(tmp_path / "shards", tensors)
    for path in (folder, folder / "w.safetensors.index.json"):
        assert same(read_tensors(path), tensors)
    # Wan's folder has the encoders' pickles as well as the network.
    (wan := tmp_path / "wan").mkdir()
    save_file(tensors, wan / "diffusion_pytorch_model.safetensors")
    (wan / "Wan2.1_VAE.pth").write_bytes(b"not looked at")
    (wan / "config.json").write_text('{"_class_name": "WanModel"}')
    assert same(read_tensors(wan), tensors)


@pytest.mark.parametrize("image", [False, True], ids=["text to video", "image to video"])
def test_a_folder_of_diffusers_is_read(image: bool, tmp_path: Path) -> None:
    """`save_pretrained` of diffusers' own model is read sharded, alone and as part of a
    pipeline.
    """
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=10, in_channels=12 if image else 4,
        out_channels=4, freq_dim=16, ffn_dim=64, num_layers=2, image_dim=12 if image else None,
        added_kv_proj_dim=48 if image else None, rope_max_seq_len=32,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="100kB")
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 1
    model = "wan_fun_inp_1b3" if image else "wan_t2v_1b3"
    for folder in (tmp_path / "pipe", tmp_path / "pipe" / "transformer"):
        net, report = load_released(folder, tiny.architecture(model))
        assert report.lines() == [f"{len(list(net.parameters()))} tensors loaded as they are"]
        own = theirs.state_dict()
        assert len(own) == len(report.loaded)
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, own[to_diffusers(name)]), name


def test_a_base_starts_the_full_network(tmp_path: Path) -> None:
    """Parameters that the file lacks are finite, reported, and zero in the audio branch."""
    save_file(released("wan_t2v_1b3"), tmp_path / "base.safetensors")
    net, report = load_released(
        tmp_path / "base.safetensors", PREVIEW, fresh=(IMAGE_PARTS, AUDIO_PARTS), seed=1
    )
    assert not any(parameter.is_meta for parameter in net.parameters())
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert report.widened == ["patch_embedding.weight"] and len(report.fresh) == 5 + 2 * 8 + 6
    assert not net.patch_embedding.weight[:, tiny.CHANNELS :].any()
    conditions, times = tiny.conditions(), torch.tensor([5.0, 800.0])
    louder = conditions._replace(audio=conditions.audio * 9, known=1 - conditions.known)
    assert torch.equal(net(tiny.latents(), times, conditions), net(tiny.latents(), times, louder))
    assert any("blocks.*.cross_attn.v_audio.weight" in line for line in report.lines())
    with pytest.raises(CheckpointError, match="holds wan_t2v_1b3"):
        load_released(tmp_path / "base.safetensors", PREVIEW)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_training_does_not_change_the_file(name: str, tmp_path: Path) -> None:
    """Parameters are the file's own pages until they are written to."""
    tensors, file = released("wan_t2v_1b3"), tmp_path / name
    save_file(tensors, file) if name.endswith("safetensors") else torch.save(tensors, file)
    before = file.read_bytes()
    net, _ = load_released(file, tiny.architecture("wan_t2v_1b3"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    assert torch.equal(net.head.modulation, tensors["head.modulation"] + 1)


def test_the_dtype_is_a_choice(tmp_path: Path) -> None:
    save_file(released("wan_t2v_1b3"), tmp_path / "a.safetensors")
    architecture = tiny.architecture("wan_t2v_1b3")
    net, _ = load_released(tmp_path / "a.safetensors", architecture, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
    assert torch.equal(net.head.head.weight, released("wan_t2v_1b3")["head.head.weight"].bfloat16())


class Intruder:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("intruded",)


def write_wrong(folder: Path) -> dict[str, Path]:
    """Return files that cannot be used, by their fault."""
    tensors = released("echomimicv3_preview")
    names = ("flash", "fp8", "lora", "cut", "vae")
    wrong = {name: folder / f"{name}.safetensors" for name in names}
    fp8 = {"head.head.weight": tensors["head.head.weight"].to(torch.float8_e4m3fn)}
    save_file(released("echomimicv3_flash"), wrong["flash"])
    save_file({**tensors, **fp8}, wrong["fp8"])
    save_file({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48)}, wrong["lora"])
    save_file({"encoder.conv1.weight": torch.zeros(2, 48)}, wrong["vae"])
    save_file(tensors, wrong["cut"])
    wrong["cut"].write_bytes(wrong["cut"].read_bytes()[:-100])
    missing = write_shards(folder / "missing", tensors)
    (missing / "w-00002-of-00003.safetensors").unlink()
    other = write_shards(folder / "other", tensors)
    shard = other / "w-00001-of-00003.safetensors"
    content = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    content.pop(next(iter(content)))
    save_file(content, shard)
    (folder / "code.pth").write_bytes(pickle.dumps({"head.head.weight": Intruder()}, 2))
    (folder / "later.pth").write_bytes(pickle.dumps({"head.head.weight": Intruder()}, 4))
    torch.save({"head.head.weight": Intruder()}, folder / "archive.pth")
    torch.save({"state_dict": {"step": 3}}, folder / "steps.pth")
    torch.save({7: torch.zeros(2)}, folder / "numbered.pth")
    torch.save({"head.head.weight": torch.zeros(2, device="meta")}, folder / "valueless.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "old.pth").write_bytes((folder / "old.pth").read_bytes()[:1])
    dead = {"blocks.0.self_attn.q_audio.weight": torch.zeros(3)}
    save_file({**tensors, **dead}, folder / "dead.safetensors")
    narrow = {"patch_embedding.weight": tensors["patch_embedding.weight"][:, :5].contiguous()}
    save_file({**tensors, **narrow}, folder / "narrow.safetensors")
    (folder / "garbage.pth").write_bytes(b"\x00" * 100)
    torch.save(tensors, folder / "halved.pth")
    (folder / "halved.pth").write_bytes((folder / "halved.pth").read_bytes()[:20_000])
    (folder / "empty").mkdir()
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    (folder / "model.gguf").write_bytes(b"GGUF")
    return wrong | {path.stem: path for path in folder.glob("[a-z]*") if path.stem not in wrong}


WRONG = {
    "flash": "holds echomimicv3_flash .*the network is echomimicv3_preview; give model=",
    "fp8": r"head\.head\.weight is float8_e4m3fn, a fp8 file; give the bf16 or fp32",
    "lora": r"a LoRA \(blocks\.0\.ffn\.0\.lora_A\.weight\), need base weights",
    "vae": r"no weights of a Wan transformer \(1 tensors, such as encoder\.conv1\.weight\)",
    "cut": "damaged or cut short",
    "missing": r"w-00002-of-00003\.safetensors: this shard of \d+ tensors is missing",
    "other": r"w-00001-of-00003.*: \S+ is missing, but listed in w\.safetensors\.index",
    "code": "a pickle that calls posix.mkdir; nothing in it was run",
    "later": "not of tensors alone; nothing in it was run",
    "archive": "a pickle that calls posix.mkdir; nothing in it was run",
    "steps": "step is no plain tensor",
    "numbered": "7 is no plain tensor",
    "valueless": r"head\.head\.weight is no plain tensor",
    "old": "damaged",
    "dead": r"has blocks\.0\.self_attn\.q_audio\.weight, which the network lacks",
    "narrow": r"patch_embedding\.weight: shape \[48, 5, 1, 2, 2\]",
    "garbage": "damaged|not of tensors alone",
    "halved": "damaged",
    "empty": r"no \.safetensors or \.pth.* in it",
    "config": "_class_name is AutoencoderKLWan, need a Wan transformer",
    "model": "not a supported weights file",
    "nowhere": "not there",
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_of_another_kind_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = write_wrong(tmp_path) | {"nowhere": tmp_path / "nowhere.safetensors"}
    assert set(paths) == set(WRONG)
    for name, message in WRONG.items():
        with pytest.raises(EcholabError, match=message) as raised:
            load_released(paths[name], PREVIEW)
        line = str(raised.value)
        assert "\n" not in line and paths[name].name.split(".")[0] in line, line
    assert not (tmp_path / "intruded").exists()
    save_file(released("echomimicv3_preview"), tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match="holds echomimicv3_preview .*is echomimicv3_flash"):
        load_released(tmp_path / "p.safetensors", tiny.architecture("echomimicv3_flash"))


def test_a_shard_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", released("wan_t2v_1b3"))
    (folder / "w-00002-of-00003.safetensors").rename(tmp_path / "b.safetensors")
    index = folder / "w.safetensors.index.json"
    index.write_text(index.read_text().replace("w-00002-of-00003", "../b"))
    with pytest.raises(WeightsError, match="is missing"):
        read_tensors(folder)


MEASURE = """
import re, sys, torch
from pathlib import Path
from echolab.models.loading import load_released
architecture = dict(dim=768, ffn_dim=3072, num_heads=6, num_layers=6, text_dim=64, image_dim=None,
                    audio_dim=None, in_channels=16)
def peak():  # of this program alone; ru_maxrss would also know its parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
net, _ = load_released(Path(sys.argv[1]), architecture)
sum(float(parameter.detach().sum()) for parameter in net.parameters())
size = sum(parameter.nbytes for parameter in net.parameters())
print((peak() - before) / size, size)
"""


def test_loading_needs_the_network_once(tmp_path: Path) -> None:
    """A process that loads and reads 220 MB holds one copy in resident memory, not two."""
    from echolab.models.transformer import EchoTransformer

    net = EchoTransformer(
        dim=768, ffn_dim=3072, num_heads=6, num_layers=6, text_dim=64, image_dim=None,
        audio_dim=None, in_channels=16,
    )  # fmt: skip
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    torch.save(net.state_dict(), tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        report = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / name)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        copies, size = map(float, report.split())
        assert size > 2e8 and 0.9 < copies < 1.3, f"{name}: {copies:.2f} copies"
