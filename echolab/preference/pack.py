"""Pairs to shards of the preference kind: best and worst candidate of each prompt."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from echolab.atomic_io import append_text
from echolab.data.collate import FEATURES, read_tensors
from echolab.data.provenance import check_same_encoders
from echolab.data.shard_reader import ShardDataset, ShardWriter
from echolab.errors import DataError
from echolab.preference.candidates import TASK, read_candidates, read_request
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
    _check_prompts(candidates, dataset)
    number_of = {key: number for number, key in enumerate(dataset.keys)}
    pairs = 0
    with ShardWriter(
        out, kind="preference", encoders=dataset.encoders, geometry=dataset.geometry,
        description={"prompts": dataset.fingerprint},
    ) as writer:  # fmt: skip
        for key, clips, best, worst in best_against_worst(candidates, verdicts, least_margin):
            if key not in number_of:
                raise DataError(
                    f"{candidates}: prompt {key} is not in {dataset.folder}; "
                    "give clips= the dataset that was sampled from"
                )
            if torch.equal(clips[best].half(), clips[worst].half()):
                raise DataError(
                    f"{candidates}: prompt {key}: candidates {best} and {worst} are the same clip; "
                    "sample with other audio_scales, or raise least_margin"
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


def _check_prompts(candidates: Path, dataset: ShardDataset) -> None:
    """Raise DataError unless the candidates were sampled from this dataset."""
    request = read_request(candidates)
    check_same_encoders(dataset.folder, dataset.encoders, candidates, request.get("encoders") or {})
    if request.get("clips", dataset.fingerprint) != dataset.fingerprint:
        raise DataError(
            f"{candidates}: sampled from the dataset {request['clips'][:12]}, {dataset.folder} is "
            f"{dataset.fingerprint[:12]}; give clips= the dataset that was sampled from"
        )


def read_verdicts(path: Path) -> Verdicts:
    """Verdicts of a jsonl file; a line whose writing was cut short is left out.

    Raises DataError for a line that is no verdict, and where they are of two judges: their numbers
    cannot be compared.
    """
    found = {}
    for row in _rows(path):
        try:
            verdict = Verdict(*(float(row[name]) for name in Verdict._fields))
            found[str(row["key"]), int(row["candidate"])] = verdict
        except (KeyError, TypeError, ValueError) as error:
            line = json.dumps(row)[:80]
            raise DataError(f"{path}: no verdict ({error!r}): {line}; score again") from error
    return found


def judges_of(path: Path) -> dict[str, str]:
    """Return the fingerprints of the networks that made the verdicts, by name; {} if unknown."""
    return next((_judges(row) for row in _rows(path) if _judges(row)), {})


def _judges(row: Any) -> dict[str, str]:
    judges = row.get("judges") if isinstance(row, dict) else None
    return judges if isinstance(judges, dict) else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    judges = [_judges(row) for row in rows if _judges(row)]
    for other in judges[1:]:
        check_judges(path, judges[0], other)
    return rows


def check_judges(path: Path, one: Mapping[str, str], other: Mapping[str, str]) -> None:
    """Raise DataError naming the first network in which two judges differ."""
    for name in sorted(one.keys() & other.keys()):
        if one[name] != other[name]:
            raise DataError(
                f"{path}: verdicts by the {name} network {one[name][:12]}, and by "
                f"{other[name][:12]}; give the networks that judged the first, or remove the file "
                "and score all of them again"
            )


def append_verdicts(
    path: Path, key: str, verdicts: list[Verdict], judges: Mapping[str, str] | None = None
) -> None:
    """Add a prompt's verdicts, one line each, with the fingerprints of who judged."""
    told = {"judges": dict(judges)} if judges else {}
    lines = [
        json.dumps({"key": key, "candidate": number, **verdict._asdict(), **told}) + "\n"
        for number, verdict in enumerate(verdicts)
    ]
    append_text(path, "".join(lines))
