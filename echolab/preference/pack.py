"""Pairs to shards of the preference kind: best and worst candidate of each prompt."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from echolab.data.batches import FEATURES, read_tensors
from echolab.data.files import append_text
from echolab.data.shards import ShardDataset, ShardWriter
from echolab.errors import DataError
from echolab.preference.candidates import TASK, read_candidates
from echolab.preference.judge import Verdict, best_and_worst, totals

Verdicts = dict[tuple[str, int], Verdict]  # by prompt and number of the candidate

ELSEWHERE = 0.02  # weight of what lies outside the lips: the judgement was made on the lips


def pair_members(tensors: dict[str, Tensor], chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What is stored of a pair, in fp16, from the encoded tensors of its prompt.

    The error counts at the lips, where the judge looked.
    """
    members = {
        "chosen": chosen,
        "rejected": rejected,
        "known": tensors[f"known.{TASK}"],
        "known_latents": tensors[f"known_latents.{TASK}"],
        "weight": tensors["lips"] + ELSEWHERE,
        **{name: tensors[name] for name in FEATURES},
    }
    return {name: value.half().contiguous() for name, value in members.items()}


def record_of(verdicts: Verdicts, key: str, candidate: int) -> dict[str, float]:
    """What the json member says of one half of a pair."""
    return {"candidate": candidate, **verdicts[key, candidate]._asdict()}


def best_against_worst(
    candidates: Path, verdicts: Verdicts, least_margin: float
) -> Iterator[tuple[str, Tensor, int, int]]:
    """Key, candidates [K, C, F, H, W], number of the best and of the worst, where they differ.

    A pair whose total scores differ by less than `least_margin` standard deviations teaches noise
    and is left out.
    """
    scores = totals(verdicts)
    chosen = best_and_worst(scores)
    for key, clips in read_candidates(candidates):
        if key not in chosen:
            raise DataError(
                f"{candidates}: prompt {key} has {len(clips)} candidates and not two verdicts; "
                "sample with candidates=2 or more, then run `echolab pairs score`"
            )
        best, worst = chosen[key]
        if scores[key, best] - scores[key, worst] >= least_margin:
            yield key, clips, best, worst


def pack_pairs(
    candidates: Path, verdicts: Verdicts, dataset: ShardDataset, out: Path, *, least_margin: float
) -> int:
    """Write a preference dataset from prompts of an encoded one; the number of pairs."""
    number_of = {key: number for number, key in enumerate(dataset.keys)}
    made_from, pairs = {"prompts": dataset.fingerprint}, 0
    encoders = dataset.encoders
    with ShardWriter(out, kind="preference", encoders=encoders, description=made_from) as writer:
        for key, clips, best, worst in best_against_worst(candidates, verdicts, least_margin):
            if key not in number_of:
                raise DataError(
                    f"{candidates}: prompt {key} is not in {dataset.folder}; "
                    "give clips= the dataset that was sampled from"
                )
            tensors, about = read_tensors(dataset, number_of[key])
            members = pair_members(tensors, clips[best], clips[worst])
            record = {
                "task": TASK,
                "caption": about.get("caption", ""),
                "chosen": record_of(verdicts, key, best),
                "rejected": record_of(verdicts, key, worst),
            }
            writer.write(key, {"safetensors": save(members), "json": json.dumps(record).encode()})
            pairs += 1
        if not pairs:
            raise DataError(
                f"{candidates}: no pair differs by {least_margin:g} standard deviations; "
                "sample more candidates, or lower the margin"
            )
    return pairs


def read_verdicts(path: Path) -> Verdicts:
    """Verdicts of a jsonl file; a line whose writing was cut short is left out."""
    found = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            try:
                verdict = Verdict(*(float(row[name]) for name in Verdict._fields))
                found[str(row["key"]), int(row["candidate"])] = verdict
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: no verdict ({error!r}): {line[:80]}; score again"
                ) from error
    return found


def append_verdicts(path: Path, key: str, verdicts: list[Verdict]) -> None:
    """Add a prompt's verdicts, one line each."""
    lines = [
        json.dumps({"key": key, "candidate": number, **verdict._asdict()}) + "\n"
        for number, verdict in enumerate(verdicts)
    ]
    append_text(path, "".join(lines))
