"""Data of different encoders or judges is never mixed silently, and no sample meets its own
copy.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import drawn
import encoded
import pytest
import torch
from safetensors.torch import load, save, save_file

from echolab.cli.train_rank import train
from echolab.config.compose import compose
from echolab.data.collate import read_pair
from echolab.data.shard_reader import check_same_encoders, open_dataset, shared_samples
from echolab.data.shard_writer import ShardWriter
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import fingerprint
from echolab.errors import ConfigError, DataError, EcholabError
from echolab.inference.pairs import VERDICTS, judge_candidates
from echolab.metrics.demo_networks import FrameFeatures, SyncNetDemo
from echolab.preference.judge import Verdict
from echolab.preference.pack import append_verdicts, pack_pairs, read_verdicts

ONE = {"video": "a" * 64, "text": "t", "image": "i", "audio": "s"}
OTHERS = {name: {**ONE, name: "b" * 64} for name in ONE}


def rewritten(source: Path, out: Path, encoders: dict[str, str], first: int = 0) -> Path:
    """Write a dataset again, as made by `encoders`; keys count from `first`."""
    dataset = open_dataset(source)
    with ShardWriter(out, kind=dataset.kind, encoders=encoders) as writer:
        for i in range(len(dataset)):
            members = dataset.read(i)
            if first:
                tensors = load(members["safetensors"])
                members["safetensors"] = save({k: t + first for k, t in tensors.items()})
            writer.write(f"key-{first + i}", members)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write clips, pairs, held-out clips and a run made by ONE; `video/...` and so on are by
    others.
    """
    root = tmp_path_factory.mktemp("made")
    clips, pairs = encoded.write(root / "plain", 4)
    datasets = {}
    for name, encoders in {"one": ONE, **OTHERS}.items():
        datasets[f"{name}/clips"] = rewritten(clips, root / name / "clips", encoders)
        datasets[f"{name}/held"] = rewritten(clips, root / name / "held", encoders, 50)
        datasets[f"{name}/pairs"] = rewritten(pairs, root / name / "pairs", encoders)
    for name in ("one", "video"):
        datasets[f"{name}/run"] = root / name / "run"
        train_on(datasets[f"{name}/run"], {"data.clips": datasets[f"{name}/clips"]})
    return datasets


def train_on(run: Path, paths: dict[str, Any], *words: str) -> Any:
    settings = [f"{name}={folder}" for name, folder in paths.items()]
    plan = encoded.plan(("sft", 1), *([("dpo", 1)] if "data.pairs" in paths else []))
    return train(
        compose(
            [*encoded.SETTINGS, "verify_export=false", f"run_dir={run}", plan, *settings, *words]
        )
    )


def paths_of(made: dict[str, Path], **changed: str) -> dict[str, Path]:
    """Return the paths of all data of a run, made by ONE except for the one that is `changed`."""
    names = {"data.clips": "clips", "data.val_clips": "held", "data.pairs": "pairs",
             "init_from": "run", "ref_model": "run"}  # fmt: skip
    return {
        setting: made[f"{changed.get(setting.removeprefix('data.'), 'one')}/{kind}"]
        for setting, kind in names.items()
    }


def test_data_of_the_same_networks_is_mixed(made: dict[str, Path], tmp_path: Path) -> None:
    assert train_on(tmp_path / "run", paths_of(made)).done


@pytest.mark.parametrize(
    ("what", "encoder"),
    [
        *((what, name) for what in ("val_clips", "pairs") for name in ONE),
        ("init_from", "video"),
        ("ref_model", "video"),
    ],
)
def test_data_of_different_networks_is_not_mixed(
    made: dict[str, Path], tmp_path: Path, what: str, encoder: str
) -> None:
    words = f"{encoder} encoder is .*; encode both with the same"
    with pytest.raises(EcholabError, match=words) as error:
        train_on(tmp_path / "run", paths_of(made, **{what: encoder}))
    assert "\n" not in str(error.value)


def test_accepted_data_must_be_of_the_same_encoders(made: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(made["one/run"], tmp_path / "run")
    with pytest.raises(EcholabError, match="video encoder is aaaaaaaaaaaa, that of data.clips"):
        train_on(run, {"data.clips": made["video/clips"]}, "data.changed=accept",
                 encoded.plan(("sft", 2)))  # fmt: skip


def test_unknown_provenance_is_accepted() -> None:
    check_same_encoders("a", {}, "b", ONE)
    check_same_encoders("a", {"video": "a" * 64}, "b", ONE)
    with pytest.raises(DataError, match="a: its text encoder is x, that of b is t"):
        check_same_encoders("a", {"text": "x"}, "b", ONE)


def test_training_clips_are_refused_as_held_out_clips(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = made["one/clips"]
    with pytest.raises(DataError, match="is the training set .* data.val_overlaps=accept"):
        train_on(tmp_path / "a", {"data.clips": clips, "data.val_clips": clips})
    same = {"data.clips": clips, "data.val_clips": clips}
    assert train_on(tmp_path / "a", same, "data.val_overlaps=accept").done
    assert "warning: data.val_clips" in capsys.readouterr().err
    part = tmp_path / "part"
    with ShardWriter(part, kind="encoded", encoders=ONE) as writer:
        for folder in (made["one/held"], clips):
            dataset = open_dataset(folder)
            writer.write(dataset.keys[1], dataset.read(1))
    assert shared_samples(open_dataset(part), open_dataset(clips)) == 1
    assert train_on(tmp_path / "b", {"data.clips": clips, "data.val_clips": part}).done
    assert "1 of its 2 samples are in the training set" in capsys.readouterr().err


def test_pairs_of_held_out_prompts_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    held, dataset = open_dataset(made["one/held"]), open_dataset(made["one/pairs"])
    about = {"prompts": held.fingerprint}
    out = tmp_path / "pairs"
    with ShardWriter(out, kind="preference", encoders=ONE, description=about) as writer:
        writer.write("a", dataset.read(0))
        writer.write("b", dataset.read(1))
    paths = {**paths_of(made), "data.pairs": out}
    with pytest.raises(DataError, match="data.pairs: .* was sampled from the held-out clips"):
        train_on(tmp_path / "run", paths)


def test_a_pair_of_equal_clips_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    dataset = open_dataset(made["one/pairs"])
    tensors = load(dataset.read(0)["safetensors"])
    tensors["rejected"] = tensors["chosen"].clone()
    with ShardWriter(tmp_path / "pairs", kind="preference", encoders=ONE) as writer:
        writer.write("same", {"safetensors": save(tensors), "json": b"{}"})
    with pytest.raises(DataError, match="sample same: chosen and rejected are the same clip"):
        read_pair(open_dataset(tmp_path / "pairs"), 0)
    with pytest.raises(DataError, match="chosen and rejected are the same clip"):
        train_on(tmp_path / "run", {**paths_of(made), "data.pairs": tmp_path / "pairs"})


def test_adapters_need_a_trained_base(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="adapters need a trained base.*give pretrained= or init_from"
    ):
        train_on(tmp_path / "run", {"data.clips": made["one/clips"]}, "lora=attention")


def candidates(folder: Path, latents: list[torch.Tensor], **request: Any) -> Path:
    """Write a folder of candidates of one prompt."""
    folder.mkdir()
    tensors = {f"key-0/{number}": clip.clone() for number, clip in enumerate(latents)}
    save_file(tensors, folder / "candidates-000000.safetensors")
    (folder / "request.json").write_text(json.dumps(request))
    return folder


@pytest.mark.parametrize("other", [None, "video", "sync", "frame"])
@torch.no_grad()
def test_a_round_has_one_autoencoder_and_one_judge(tmp_path: Path, other: str | None) -> None:
    torch.manual_seed(0)

    def networks() -> dict[str, Any]:
        return {
            "video": CausalAutoencoder(width=16, depth=1).eval(),
            "sync": SyncNetDemo().eval(),
            "frame": FrameFeatures(labels=6, size=64).eval(),
        }

    first, second, clips = networks(), networks(), drawn.clips(2)
    made_by = {"video": fingerprint(first["video"])}
    latents = [torch.randn(16, 2, 8, 8).half() for _ in range(2)]
    folder = candidates(tmp_path / "candidates", latents, encoders=made_by)
    judges = {name: fingerprint(net) for name, net in first.items()}
    append_verdicts(folder / VERDICTS, "key-0", [Verdict(1, 1, 1), Verdict(2, 1, 1)], judges)
    given = {**first, **({other: second[other]} if other else {})}
    if other is None:
        judge_candidates(folder, clips, *given.values(), lambda done: None)  # all is judged
        assert len(read_verdicts(folder / VERDICTS)) == 2
        return
    with pytest.raises(DataError, match=f"{other} (encoder|network)") as error:
        judge_candidates(folder, clips, *given.values(), lambda done: None)
    both = (fingerprint(first[other])[:12], fingerprint(second[other])[:12])
    assert all(name in str(error.value) for name in both)
    append_verdicts(folder / VERDICTS, "b", [Verdict(3, 1, 1)], {**judges, other: "0" * 64})
    with pytest.raises(DataError, match=f"verdicts by the {other} network"):
        read_verdicts(folder / VERDICTS)


def test_pairs_are_packed_from_their_own_candidates(made: dict[str, Path], tmp_path: Path) -> None:
    clips = open_dataset(made["one/clips"])
    verdicts = {("key-0", 0): Verdict(0, 1, 1), ("key-0", 1): Verdict(9, 1, 1)}
    same = [torch.ones(16, 2, 4, 4).half()] * 2
    for name, request, message in (
        ("encoders", {"encoders": OTHERS["video"]}, "its video encoder is aaaa"),
        ("clips", {"clips": "0" * 64}, "give clips= the dataset that was sampled from"),
        ("same", {"clips": clips.fingerprint, "encoders": ONE}, "are the same clip"),
    ):
        folder = candidates(tmp_path / name, same, **request)
        with pytest.raises(DataError, match=message):
            pack_pairs(folder, verdicts, clips, tmp_path / f"out-{name}", least_margin=0.0)
        assert not (tmp_path / f"out-{name}" / "dataset.json").exists()
