"""Pack preference pairs into shards: the best and the worst candidate of each prompt."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from echolab.atomic_io import append_text
from echolab.data.collate import FEATURES, read_tensors
from echolab.data.shard_reader import ShardDataset, check_same_encoders
from echolab.data.shard_writer import ShardWriter
from echolab.errors import DataError
from echolab.preference.candidates import TASK, read_candidates, read_request
from echolab.preference.judge import Verdict, best_and_worst, total_scores

Verdicts = dict[tuple[str, int], Verdict]  # by prompt and candidate index

BACKGROUND_WEIGHT = 0.02  # loss weight outside the lip box


def pair_members(tensors: dict[str, Tensor], chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Return the stored tensors of a pair, in fp16, from the encoded tensors of its prompt.

    The loss weight is concentrated on the lips, since the judge mainly measures lip sync.
    """
    # Keep the prompt's conditions, and replace its latents by the pair.
    members = {
        "chosen": chosen,
        "rejected": rejected,
        "known": tensors[f"known.{TASK}"],
        "known_latents": tensors[f"known_latents.{TASK}"],
        "weight": tensors["lips"] + BACKGROUND_WEIGHT,
        **{name: tensors[name] for name in FEATURES},
    }
    return {name: value.half().contiguous() for name, value in members.items()}


def pair_record(verdicts: Verdicts, key: str, candidate: int) -> dict[str, float]:
    """Return the JSON record of one clip of a pair."""
    return {"candidate": candidate, **verdicts[key, candidate]._asdict()}


def select_pairs(
    candidates: Path, verdicts: Verdicts, least_margin: float
) -> Iterator[tuple[str, Tensor, int, int]]:
    """Yield (key, candidates [K, C, F, H, W], index of the best, index of the worst).

    Skip pairs whose scores differ by less than `least_margin`, since they are noise.  Raise
    DataError for a prompt without verdicts.
    """
    # Scores are standardized over all candidates of all prompts.
    scores = total_scores(verdicts)
    chosen = best_and_worst(scores)
    for key, clips in read_candidates(candidates):
        if key not in chosen:
            raise DataError(
                f"{candidates}: prompt {key} has {len(clips)} candidates and less than two "
                "verdicts; sample with candidates=2 or more, then run `echolab pairs score`"
            )
        best, worst = chosen[key]
        if scores[key, best] - scores[key, worst] >= least_margin:
            yield key, clips, best, worst


def pack_pairs(
    candidates: Path, verdicts: Verdicts, dataset: ShardDataset, out: Path, *, least_margin: float
) -> int:
    """Write a preference dataset from prompts of an encoded dataset; return the number of pairs."""
    # Refuse candidates of another dataset before writing.
    _check_prompts(candidates, dataset)
    index_of = {key: index for index, key in enumerate(dataset.keys)}
    pairs = 0
    with ShardWriter(
        out, kind="preference", encoders=dataset.encoders, geometry=dataset.geometry,
        description={"prompts": dataset.fingerprint},
    ) as writer:  # fmt: skip
        for key, clips, best, worst in select_pairs(candidates, verdicts, least_margin):
            if key not in index_of:
                raise DataError(
                    f"{candidates}: prompt {key} is not in {dataset.folder}; "
                    "give clips= the dataset that was sampled from"
                )
            if torch.equal(clips[best].half(), clips[worst].half()):
                raise DataError(
                    f"{candidates}: prompt {key}: candidates {best} and {worst} are the same clip; "
                    "sample with other audio_scales, or raise least_margin"
                )
            # The pair inherits the conditions of its prompt.
            tensors, metadata = read_tensors(dataset, index_of[key])
            members = pair_members(tensors, clips[best], clips[worst])
            record = {
                "task": TASK,
                "caption": metadata.get("caption", ""),
                "chosen": pair_record(verdicts, key, best),
                "rejected": pair_record(verdicts, key, worst),
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
    # Compare the encoders first, since that error names the encoder that differs.
    request = read_request(candidates)
    check_same_encoders(dataset.folder, dataset.encoders, candidates, request.get("encoders") or {})
    if request.get("clips", dataset.fingerprint) != dataset.fingerprint:
        raise DataError(
            f"{candidates}: sampled from the dataset {request['clips'][:12]}, {dataset.folder} is "
            f"{dataset.fingerprint[:12]}; give clips= the dataset that was sampled from"
        )


def read_verdicts(path: Path) -> Verdicts:
    """Read the verdicts of a JSONL file; ignore an incomplete line.

    Raise DataError for a line that is not a verdict, and for verdicts of different judges, whose
    scores cannot be compared.
    """
    # The last verdict of a candidate counts.
    verdicts = {}
    for row in _read_rows(path):
        try:
            verdict = Verdict(*(float(row[name]) for name in Verdict._fields))
            verdicts[str(row["key"]), int(row["candidate"])] = verdict
        except (KeyError, TypeError, ValueError) as error:
            line = json.dumps(row)[:80]
            raise DataError(f"{path}: not a verdict ({error!r}): {line}; score again") from error
    return verdicts


def judges_of(path: Path) -> dict[str, str]:
    """Return the fingerprints of the judge's networks by name; {} if unknown."""
    return next((_row_judges(row) for row in _read_rows(path) if _row_judges(row)), {})


def _row_judges(row: Any) -> dict[str, str]:
    judges = row.get("judges") if isinstance(row, dict) else None
    return judges if isinstance(judges, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # incomplete line of a killed writer
    # Refuse verdicts of different judges.
    judges = [_row_judges(row) for row in rows if _row_judges(row)]
    for later in judges[1:]:
        check_judges(path, judges[0], later)
    return rows


def check_judges(path: Path, first: Mapping[str, str], second: Mapping[str, str]) -> None:
    """Raise a DataError that names the first network that differs between two judges."""
    for name in sorted(first.keys() & second.keys()):
        if first[name] != second[name]:
            raise DataError(
                f"{path}: verdicts by the {name} network {first[name][:12]}, and by "
                f"{second[name][:12]}; give the networks of the first verdicts, or remove the file "
                "and score all candidates again"
            )


def append_verdicts(
    path: Path, key: str, verdicts: list[Verdict], judges: Mapping[str, str] | None = None
) -> None:
    """Append a prompt's verdicts, one line each, with the fingerprints of the judge's networks."""
    # Record the judge in each line, so that mixed files are detected.
    fingerprints = {"judges": dict(judges)} if judges else {}
    lines = [
        json.dumps({"key": key, "candidate": candidate, **verdict._asdict(), **fingerprints}) + "\n"
        for candidate, verdict in enumerate(verdicts)
    ]
    append_text(path, "".join(lines))
