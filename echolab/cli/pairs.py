"""`echolab pairs STEP`: a preference round by hand: sample, score, pack."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from echolab.arguments import parse
from echolab.atomic_io import prove_writable
from echolab.config.networks import check_encoders, last_checkpoint, load_policy
from echolab.data.clips import load_clips
from echolab.data.provenance import check_same_encoders
from echolab.data.shard_reader import open_dataset
from echolab.encoders.demo_vae import CausalAutoencoder
from echolab.encoders.encode import fingerprint
from echolab.errors import ConfigError, DataError
from echolab.fitting import load_net, work_dtype
from echolab.inference.judging import FRAMES, SYNC_JUDGE, load_autoencoder, network_file
from echolab.metrics.demo_networks import FrameFeatures, SyncNetDemo
from echolab.metrics.scores import cepstra_of
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


@dataclass(frozen=True)
class PairsArguments:
    """Preference data from a checkpoint: sample candidates, judge them, pack best against worst.

    sample: needs checkpoint=, clips= (encoded).  score: needs raw= and networks=.  pack: needs
    clips= and out=.  Each step goes on where it was stopped.
    """

    step: Literal["sample", "score", "pack"] = field(metadata={"help": "which step"})
    folder: Path = field(metadata={"help": "where candidates and verdicts are kept"})
    checkpoint: Path | None = field(default=None, metadata={"help": "a run or a checkpoint"})
    clips: Path | None = field(default=None, metadata={"help": "encoded dataset of the prompts"})
    raw: Path | None = field(default=None, metadata={"help": "the same clips, raw"})
    networks: Path | None = field(default=None, metadata={"help": "fitted networks of `fit`"})
    out: Path | None = field(default=None, metadata={"help": "the new preference dataset"})
    prompts: int = field(default=128, metadata={"ge": 1, "help": "how many clips to sample for"})
    candidates: int = field(default=4, metadata={"ge": 1, "help": "samples a prompt"})
    steps: int = field(default=10, metadata={"ge": 1, "help": "of the sampler"})
    shift: float = field(
        default=5.0, metadata={"gt": 0, "le": 1000, "help": "of the sampler's noise levels"}
    )
    audio_scales: tuple[float, ...] = field(
        default=(0.0, 1.0, 2.0, 4.0),
        metadata={
            "ge": 0,
            "help": "guidance by sound of the candidates, in turn; 1 is none, 0 no sound",
        },
    )
    seed: int = field(default=0, metadata={"ge": 0, "help": "of the candidates' noise"})
    least_margin: float = field(
        default=0.5, metadata={"ge": 0, "help": "standard deviations of a pair"}
    )
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})

    def needed(self, name: str) -> Path:
        value: Path | None = getattr(self, name)
        if value is None:
            raise ConfigError(f"echolab pairs {self.step}: give {name}=")
        return value


def main(argv: list[str]) -> int:
    arguments = parse(PairsArguments, argv, command="echolab pairs",
                      positional=("step", "folder"))  # fmt: skip
    prove_writable(arguments.folder, folder=True)
    made = {"sample": sample, "score": score, "pack": pack}[arguments.step](arguments)
    figures = {"folder": str(arguments.folder), "step": arguments.step, "made": made}
    noun = {"sample": "prompts", "score": "verdicts", "pack": "pairs"}[arguments.step]
    plain = f"{arguments.out if arguments.step == 'pack' else arguments.folder}: {made} {noun}"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    return 0


def sample(arguments: PairsArguments) -> int:
    dataset = open_dataset(arguments.needed("clips"))
    checkpoint = last_checkpoint(arguments.needed("checkpoint"))
    check_encoders(checkpoint, dataset.encoders)
    net = load_policy(checkpoint)
    with progress("sampling candidates", arguments.prompts) as advance:
        sample_candidates(
            net, dataset, arguments.folder, prompts=arguments.prompts,
            candidates=arguments.candidates, batch=32, steps=arguments.steps,
            shift=arguments.shift, audio_scales=arguments.audio_scales, seed=arguments.seed,
            weights=str(checkpoint),
            dtype=work_dtype(),
            report=lambda done: advance(done, ""),
        )  # fmt: skip
    return arguments.prompts


def score(arguments: PairsArguments) -> int:
    networks = arguments.needed("networks")
    clips = load_clips(arguments.needed("raw"))
    total = sum(1 for _ in read_candidates(arguments.folder))
    with progress("judging candidates", total) as advance:
        judge_candidates(
            arguments.folder, clips, load_autoencoder(networks),
            load_net(network_file(networks, SYNC_JUDGE), SyncNetDemo),
            load_net(network_file(networks, FRAMES), FrameFeatures),
            lambda done: advance(done, ""),
        )  # fmt: skip
    return len(read_verdicts(arguments.folder / VERDICTS))


def pack(arguments: PairsArguments) -> int:
    verdicts = read_verdicts(arguments.folder / VERDICTS)
    if not verdicts:
        raise DataError(f"{arguments.folder / VERDICTS}: no verdicts; run `echolab pairs score`")
    dataset, out = open_dataset(arguments.needed("clips")), arguments.needed("out")
    prove_writable(out, folder=True)
    return pack_pairs(arguments.folder, verdicts, dataset, out,
                      least_margin=arguments.least_margin)  # fmt: skip


def judge_candidates(folder: Path, clips: Clips, video: CausalAutoencoder, sync: SyncNetDemo,
                     frame: FrameFeatures, report: Callable[[int], None]) -> None:  # fmt: skip
    """Append a verdict for each candidate to verdicts.jsonl; those that are there stay."""
    place, cepstra = {key: number for number, key in enumerate(clips.keys)}, cepstra_of(clips)
    known = read_verdicts(folder / VERDICTS)
    judges = {"video": fingerprint(video), "sync": fingerprint(sync), "frame": fingerprint(frame)}
    encoders = read_request(folder).get("encoders") or {}
    check_same_encoders("networks", {"video": judges["video"]}, f"the clips of {folder}", encoders)
    check_judges(folder / VERDICTS, judges_of(folder / VERDICTS), judges)
    for done, (key, candidates) in enumerate(read_candidates(folder), start=1):
        report(done)
        count = len(candidates)
        if all((key, number) in known for number in range(count)):
            continue
        if key not in place:
            raise DataError(f"{folder}: candidates of {key}, which the raw clips do not hold")
        own = slice(place[key], place[key] + 1)
        verdicts = judge(
            sync, frame, video.decode(candidates),
            clips.float_pixels(own)[:, :, 0].expand(count, -1, -1, -1),
            clips.lips[own, 0].expand(count, -1), cepstra[own].expand(count, -1, -1),
        )  # fmt: skip
        append_verdicts(folder / VERDICTS, key, verdicts, judges)
