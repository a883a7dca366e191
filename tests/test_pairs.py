"""From candidates to pairs: sampling, judging, choosing, packing."""

import json
from pathlib import Path

import drawn
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.draw import draw_dataset
from data_prep.encode import encode_dataset
from data_prep.options import DrawOptions
from echolab.data.collate import collate_clips, read_clip, read_pair, read_tensors
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.verify import verify
from echolab.diffusion.pipeline import generate
from echolab.encoders import demo
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import demo_encoders
from echolab.errors import ConfigError, DataError
from echolab.metrics.demo_networks import FrameFeatures, SyncNetDemo
from echolab.metrics.mfcc import cepstra_of
from echolab.models.state_dict import initialize
from echolab.models.transformer import EchoTransformer
from echolab.preference.candidates import TASK, read_candidates, sample_candidates
from echolab.preference.judge import Verdict, best_and_worst, judge, total_scores
from echolab.preference.pack import BACKGROUND_WEIGHT, append_verdicts, pack_pairs, read_verdicts

PROMPTS, CANDIDATES = 3, 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    root = tmp_path_factory.mktemp("encoded")
    draw_dataset(DrawOptions(root / "raw", num_clips=4, frames=5, size=32), lambda done: None)
    torch.manual_seed(0)
    encoders = demo_encoders(CausalAutoencoder(width=16, depth=1).eval())
    encode_dataset(root / "raw", root / "encoded", encoders, lambda done: None)
    return open_dataset(root / "encoded")


@pytest.fixture(scope="module")
def net() -> EchoTransformer:
    made = EchoTransformer(
        dim=48, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=16,
        text_dim=demo.CAPTION_DIM, image_dim=demo.IMAGE_DIM,
        audio_dim=demo.AUDIO_DIM,
    )  # fmt: skip
    initialize(made, torch.Generator().manual_seed(0))
    with torch.no_grad():  # Wan's head begins at zero
        made.head.head.weight.normal_(std=0.1)
    return made.eval()


def sample(
    net: EchoTransformer, dataset: ShardDataset, folder: Path, **changes: object
) -> list[int]:
    reported: list[int] = []
    settings = {
        "prompts": PROMPTS, "candidates": CANDIDATES, "batch": 2, "steps": 2, "shift": 5.0,
        "audio_scales": (1.0,), "seed": 0, "weights": "a", "dtype": torch.float32,
    }  # fmt: skip
    sample_candidates(net, dataset, folder, report=reported.append, **{**settings, **changes})  # type: ignore[arg-type]
    return reported


@pytest.fixture
def candidates(net: EchoTransformer, dataset: ShardDataset, tmp_path: Path) -> Path:
    assert sample(net, dataset, tmp_path / "candidates") == [2, 3]
    return tmp_path / "candidates"


def verdicts_of(dataset: ShardDataset, syncs: list[list[float]]) -> dict[tuple[str, int], Verdict]:
    """Return verdicts by prompt and candidate that differ in sync alone."""
    return {
        (key, number): Verdict(sync, 0.9, 0.1)
        for key, row in zip(dataset.keys, syncs, strict=False)
        for number, sync in enumerate(row)
    }


def test_candidates_are_a_pure_function_of_seed_key_and_index(
    net: EchoTransformer, dataset: ShardDataset, candidates: Path, tmp_path: Path
) -> None:
    by_key = dict(read_candidates(candidates))
    assert list(by_key) == dataset.keys[:PROMPTS]
    assert all(clips.shape == (CANDIDATES, 16, 2, 4, 4) for clips in by_key.values())
    sample(net, dataset, tmp_path / "other", batch=3)
    for key, clips in read_candidates(tmp_path / "other"):
        torch.testing.assert_close(clips, by_key[key], rtol=1e-2, atol=1e-2)  # stored in fp16
    every = torch.cat(list(by_key.values())).flatten(1)
    assert len(every.unique(dim=0)) == PROMPTS * CANDIDATES


def test_each_candidate_has_the_next_guidance(
    net: EchoTransformer, dataset: ShardDataset, tmp_path: Path
) -> None:
    sample(net, dataset, tmp_path / "candidates", prompts=1, audio_scales=(0.0, 2.0))
    ((key, clips),) = read_candidates(tmp_path / "candidates")
    batch = collate_clips(dataset, [read_clip(dataset, 0, TASK)])
    for number, scale in enumerate((0.0, 2.0, 0.0)):
        alone = generate(net, batch.conditions, [key], steps=2, shift=5.0, audio_scale=scale,
                         seed=0, draw_index=number)  # fmt: skip
        torch.testing.assert_close(clips[number], alone[0], rtol=1e-2, atol=1e-2)


def test_sampling_resumes_at_the_first_missing_file(
    net: EchoTransformer, dataset: ShardDataset, candidates: Path
) -> None:
    first, last = sorted(candidates.glob("*.safetensors"))
    original, stamp = last.read_bytes(), first.stat().st_mtime_ns
    last.unlink()
    assert sample(net, dataset, candidates) == [2, 3]
    assert last.read_bytes() == original and first.stat().st_mtime_ns == stamp


def test_missing_and_damaged_candidates_are_named(
    net: EchoTransformer, dataset: ShardDataset, candidates: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="holds no candidates"):
        next(read_candidates(tmp_path / "none"))
    path = next(candidates.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=f"{path.name}: damaged"):
        list(read_candidates(candidates))
    with pytest.raises(DataError, match="4 clips, prompts=5"):
        sample(net, dataset, tmp_path / "many", prompts=5)


def test_more_than_ten_candidates_stay_in_order(tmp_path: Path) -> None:
    tensors = {f"key/{number}": torch.full((1,), float(number)) for number in range(12)}
    save_file(tensors, tmp_path / "candidates-000000.safetensors")
    ((key, clips),) = read_candidates(tmp_path)
    assert key == "key" and clips.flatten().tolist() == list(range(12))


@torch.no_grad()
def test_a_verdict_has_sync_identity_and_flicker() -> None:
    torch.manual_seed(0)
    clips = drawn.clips(4)
    sync, frame = SyncNetDemo().eval(), FrameFeatures(labels=6, size=64).eval()
    moving = clips.float_pixels()
    still = moving[:, :, :1].expand_as(moving)

    def verdicts(pixels: Tensor) -> list[Verdict]:
        return judge(sync, frame, pixels, moving[:, :, 0], clips.lips[:, 0], cepstra_of(clips))

    for verdict in verdicts(still):
        assert verdict.flicker == 0 and verdict.identity == pytest.approx(1, abs=1e-5)
    by_hand = (moving[:, :, 1:] - moving[:, :, :-1]).abs().flatten(1).mean(1)
    for verdict, change in zip(verdicts(moving), by_hand, strict=True):
        assert verdict.flicker == pytest.approx(float(change), rel=1e-4)
        assert verdict.identity < 1
    one, all_ = judge(sync, frame, moving[1:2], moving[1:2, :, 0], clips.lips[1:2, 0],
                      cepstra_of(clips)[1:2]), verdicts(moving)  # fmt: skip
    assert one[0] == pytest.approx(all_[1], abs=1e-4)


def test_a_total_is_the_sum_of_standardized_parts() -> None:
    verdicts = {("a", n): Verdict(1.0 * n, 0.5, 0.1) for n in range(4)}
    scores = total_scores(verdicts)
    assert sum(scores.values()) == pytest.approx(0)
    assert [scores["a", n] for n in range(4)] == sorted(scores.values())
    scaled = {candidate: v._replace(sync=100 * v.sync + 7) for candidate, v in verdicts.items()}
    for candidate, total in total_scores(scaled).items():
        assert total == pytest.approx(scores[candidate])
    good, shaky, strange = Verdict(1, 0.9, 0.1), Verdict(1, 0.9, 0.3), Verdict(1, 0.2, 0.1)
    total = total_scores({("a", 0): good, ("a", 1): shaky, ("a", 2): strange})
    assert total["a", 0] > max(total["a", 1], total["a", 2])
    assert total_scores({("a", 0): good}) == {("a", 0): 0}


def test_best_and_worst_are_chosen_within_each_prompt() -> None:
    scores = {("a", 0): 1.0, ("a", 1): 3.0, ("a", 2): -1.0, ("b", 0): 9.0, ("b", 1): 8.0,
              ("c", 0): 5.0}  # fmt: skip
    assert best_and_worst(scores) == {"a": (1, 2), "b": (0, 1)}


def test_packed_pairs_are_read_back_complete(
    dataset: ShardDataset, candidates: Path, tmp_path: Path
) -> None:
    verdicts = verdicts_of(dataset, [[0, 4, 9], [9, 5, 0], [3, 9, 0]])
    out = tmp_path / "pairs"
    assert pack_pairs(candidates, verdicts, dataset, out, least_margin=0.5) == 3
    assert verify(out) == []
    pairs, clips = open_dataset(out), dict(read_candidates(candidates))
    assert pairs.kind == "preference" and pairs.encoders == dataset.encoders
    for i, (best, worst) in enumerate([(2, 0), (0, 2), (1, 2)]):
        pair, key = read_pair(pairs, i), dataset.keys[i]
        assert pair.keys == [key] and pair.tasks == ["i2v"]
        torch.testing.assert_close(pair.chosen, clips[key][best])
        torch.testing.assert_close(pair.rejected, clips[key][worst])
        own, _ = read_tensors(dataset, i)
        for name in ("text", "image", "audio", "face"):
            assert torch.equal(getattr(pair.conditions, name), own[name])
        assert torch.equal(pair.conditions.known, own["known.i2v"])
        assert torch.equal(pair.conditions.known_latents, own["known_latents.i2v"])
        stored, about = read_tensors(pairs, i)
        torch.testing.assert_close(
            stored["weight"], own["lips"] + BACKGROUND_WEIGHT, rtol=1e-3, atol=1e-3
        )
        assert about["chosen"]["candidate"] == best and about["rejected"]["sync"] == 0  # type: ignore[index]
        assert float(pair.weight.mean()) == pytest.approx(1, rel=1e-5)


def test_a_pair_that_differs_little_is_omitted(
    dataset: ShardDataset, candidates: Path, tmp_path: Path
) -> None:
    verdicts = verdicts_of(dataset, [[0, 4, 9], [5, 5.1, 5.2], [9, 3, 0]])
    made = {}
    for margin in (0.0, 0.5):
        out = tmp_path / f"pairs-{margin}"
        made[margin] = pack_pairs(candidates, verdicts, dataset, out, least_margin=margin)
        assert len(open_dataset(out)) == made[margin]
    assert made == {0.0: 3, 0.5: 2}
    with pytest.raises(DataError, match="no pair differs"):
        pack_pairs(candidates, verdicts, dataset, tmp_path / "none", least_margin=99.0)
    assert not (tmp_path / "none" / "dataset.json").exists()
    assert open_dataset(tmp_path / "pairs-0.5").keys == [dataset.keys[0], dataset.keys[2]]


def test_candidates_without_verdicts_or_prompts_leave_no_dataset(
    dataset: ShardDataset, candidates: Path, tmp_path: Path
) -> None:
    few = verdicts_of(dataset, [[0, 4, 9], [9]])
    with pytest.raises(
        DataError, match=f"{dataset.keys[1]} has 3 candidates and less than two verdicts"
    ):
        pack_pairs(candidates, few, dataset, tmp_path / "out", least_margin=0.1)
    for path in candidates.iterdir():
        path.unlink()
    tensors = {f"stranger/{n}": torch.zeros(16, 2, 4, 4) for n in range(2)}
    save_file(tensors, candidates / "candidates-000000.safetensors")
    strange = {("stranger", 0): Verdict(0, 1, 1), ("stranger", 1): Verdict(9, 1, 1)}
    with pytest.raises(DataError, match="prompt stranger is not in"):
        pack_pairs(candidates, strange, dataset, tmp_path / "out", least_margin=0.1)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_verdicts_survive_a_stop_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    assert read_verdicts(path) == {}
    a, b = [Verdict(0.1, 0.2, 0.3), Verdict(1, 2, 3)], [Verdict(4, 5, 6), Verdict(7, 8, 9)]
    append_verdicts(path, "a", a)
    append_verdicts(path, "b", b)
    original = path.read_bytes()
    every = {("a", 0): a[0], ("a", 1): a[1], ("b", 0): b[0], ("b", 1): b[1]}
    assert read_verdicts(path) == every
    for cut in range(len(original) + 1):
        path.write_bytes(original[:cut])
        kept = read_verdicts(path)
        assert kept == {candidate: every[candidate] for candidate in kept}
        append_verdicts(path, "a", a)
        append_verdicts(path, "b", b)
        assert read_verdicts(path) == every, cut


def test_a_verdict_file_must_be_lines_of_plain_json(tmp_path: Path) -> None:
    append_verdicts(tmp_path / "v", "a", [Verdict(0.5, 0.25, 0.125)])
    line = json.loads((tmp_path / "v").read_text())
    assert line == {"key": "a", "candidate": 0, "sync": 0.5, "identity": 0.25, "flicker": 0.125}


@pytest.mark.parametrize("change", [{"seed": 1}, {"weights": "b"}, {"steps": 3}, {"candidates": 4}])
def test_a_folder_resumes_only_with_the_same_request(
    net: EchoTransformer, dataset: ShardDataset, tmp_path: Path, change: dict[str, object]
) -> None:
    sample(net, dataset, tmp_path)
    sample(net, dataset, tmp_path)
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.*another folder"):
        sample(net, dataset, tmp_path, **change)
