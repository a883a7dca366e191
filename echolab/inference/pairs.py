"""The steps of a preference round: sample candidates, score them, pack pairs."""

from collections.abc import Callable
from pathlib import Path

from echolab.atomic_io import check_writable
from echolab.config.networks import check_encoders, last_checkpoint, load_policy
from echolab.data.shard_reader import check_same_encoders, open_dataset
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import fingerprint
from echolab.errors import DataError
from echolab.fitting import load_net, work_dtype
from echolab.inference.commands import PairsArguments
from echolab.inference.evaluate import SYNC_JUDGE, load_autoencoder, network_file
from echolab.inference.inputs import load_clips
from echolab.metrics.demo import FRAMES
from echolab.metrics.demo_networks import FrameFeatures, SyncNetDemo
from echolab.metrics.mfcc import cepstra_of
from echolab.preference.candidates import read_candidates, read_request, sample_candidates
from echolab.preference.judge import judge
from echolab.preference.pack import (
    append_verdicts,
    check_judges,
    judges_of,
    pack_pairs,
    read_verdicts,
)
from echolab.progress import progress
from echolab.types import Clips

VERDICTS = "verdicts.jsonl"
BATCH = 32  # prompts in one file of candidates


def sample(arguments: PairsArguments) -> int:
    """Sample candidates for the first clips of a dataset and return the number of prompts."""
    # Checkpoint and clips must have the same encoders.
    dataset = open_dataset(arguments.required("clips"))
    checkpoint = last_checkpoint(arguments.required("checkpoint"))
    check_encoders(checkpoint, dataset.encoders)
    net = load_policy(checkpoint)
    with progress("sampling candidates", arguments.num_prompts) as advance:
        sample_candidates(
            net, dataset, arguments.folder, prompts=arguments.num_prompts,
            candidates=arguments.num_candidates, batch=BATCH, steps=arguments.num_steps,
            shift=arguments.flow_shift, audio_scales=arguments.audio_guidance_scales,
            seed=arguments.seed, weights=str(checkpoint), dtype=work_dtype(),
            report=lambda done: advance(done, ""),
        )  # fmt: skip
    return arguments.num_prompts


def score(arguments: PairsArguments) -> int:
    """Score all candidates and return the number of verdicts."""
    networks, raw = arguments.required("networks"), arguments.required("raw")
    # Candidates exist only for the first clips of the dataset: do not decode the others.
    clips = load_clips(raw, read_request(arguments.folder).get("prompts"))
    total = sum(1 for _ in read_candidates(arguments.folder))
    with progress("scoring candidates", total) as advance:
        judge_candidates(
            arguments.folder, clips, load_autoencoder(networks),
            load_net(network_file(networks, SYNC_JUDGE), SyncNetDemo),
            load_net(network_file(networks, FRAMES), FrameFeatures),
            lambda done: advance(done, ""),
        )  # fmt: skip
    return len(read_verdicts(arguments.folder / VERDICTS))


def pack(arguments: PairsArguments) -> int:
    """Write the preference dataset and return the number of pairs."""
    # Candidates must be scored before they are packed.
    verdicts = read_verdicts(arguments.folder / VERDICTS)
    if not verdicts:
        raise DataError(f"{arguments.folder / VERDICTS}: no verdicts; run `echolab pairs score`")
    dataset, out = open_dataset(arguments.required("clips")), arguments.required("out")
    check_writable(out, folder=True)
    return pack_pairs(arguments.folder, verdicts, dataset, out,
                      least_margin=arguments.min_margin)  # fmt: skip


def judge_candidates(folder: Path, clips: Clips, vae: CausalAutoencoder, sync: SyncNetDemo,
                     frame: FrameFeatures, report: Callable[[int], None]) -> None:  # fmt: skip
    """Append a verdict for each candidate to verdicts.jsonl; keep existing verdicts.

    Raise DataError if the clips lack a prompt, or if the folder was made with other networks.
    """
    index_of, cepstra = {key: index for index, key in enumerate(clips.keys)}, cepstra_of(clips)
    known = read_verdicts(folder / VERDICTS)

    # All verdicts of a folder must have the same judges and encoders.
    judges = {"video": fingerprint(vae), "sync": fingerprint(sync), "frame": fingerprint(frame)}
    encoders = read_request(folder).get("encoders") or {}
    check_same_encoders("networks", {"video": judges["video"]}, f"the clips of {folder}", encoders)
    check_judges(folder / VERDICTS, judges_of(folder / VERDICTS), judges)

    for done, (key, candidates) in enumerate(read_candidates(folder), start=1):
        report(done)
        count = len(candidates)
        if all((key, number) in known for number in range(count)):
            continue
        if key not in index_of:
            raise DataError(f"{folder}: candidates of {key}, which the raw clips do not hold")
        clip = slice(index_of[key], index_of[key] + 1)
        # Judge all candidates of the prompt, and record their verdicts.
        verdicts = judge(
            sync, frame, vae.decode(candidates),
            clips.float_pixels(clip)[:, :, 0].expand(count, -1, -1, -1),
            clips.lips[clip, 0].expand(count, -1), cepstra[clip].expand(count, -1, -1),
        )  # fmt: skip
        append_verdicts(folder / VERDICTS, key, verdicts, judges)
