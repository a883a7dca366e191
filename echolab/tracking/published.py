"""Scores that papers report, to compare with ours: `echolab evaluate table=paper`.

No paper of the field states its test set, clip count, codec and preprocessing in full, so none of
these values has a card, and none is comparable with a measured value or with another paper's.
They give the order of magnitude.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from echolab.errors import DataError
from echolab.tracking.score_table import REFERENCES, card_marks, measure_of

UNKNOWN = "unknown"
MAX_WIDTH = 4000  # characters


class PublishedRow(NamedTuple):
    """The scores of one model on one set, as its source reports them."""

    model: str
    clips: str  # what the source says about its test set
    source: str
    scores: Mapping[str, float]


# https://arxiv.org/abs/2507.03905 (first version, table of results), 2508.11255, and OmniAvatar's
# figures as a survey article quotes them.
PUBLISHED = (
    PublishedRow(
        "EchoMimicV3", "talking head", "arXiv 2507.03905v1",
        {"sync_c": 4.78, "sync_d": 9.62, "fid": 41.83, "fvd": 430.79, "iqa": 4.38, "ase": 2.69},
    ),
    PublishedRow(
        "EchoMimicV3 without DPO", "talking head", "arXiv 2507.03905v1",
        {"sync_c": 4.07, "sync_d": 11.12, "fid": 41.87, "fvd": 600.98, "iqa": 4.23, "ase": 2.11},
    ),
    PublishedRow(
        "EchoMimicV3", "talking human", "arXiv 2507.03905v1",
        {"sync_c": 4.39, "sync_d": 8.51, "fid": 42.45, "fvd": 496.76, "iqa": 4.63, "ase": 3.20},
    ),
    PublishedRow(
        "EchoMimicV3 without DPO", "talking human", "arXiv 2507.03905v1",
        {"sync_c": 4.02, "sync_d": 11.2, "fid": 45.98, "fvd": 523.75, "iqa": 4.07, "ase": 2.98},
    ),
    PublishedRow(
        "FantasyTalking2", "not stated here", "arXiv 2508.11255", {"sync_c": 5.704, "fvd": 341.18}
    ),
    PublishedRow(
        "OmniAvatar", "HDTF", "quoted by a secondary source",
        {"sync_c": 7.62, "sync_d": 8.14, "fid": 37.3, "fvd": 382.0, "iqa": 3.82, "ase": 2.41},
    ),
)  # fmt: skip


def published_rows() -> list[dict[str, Any]]:
    """Return the published scores in the form of the rows of scores.json, without cards."""
    return [
        {"checkpoint": f"{row.model}, {row.clips} ({row.source})", "seed": None,
         "scores": dict(row.scores), "cards": {}}
        for row in PUBLISHED
    ]  # fmt: skip


def paper_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return ground truth, shuffled audio, our checkpoints, then the published rows.

    Each row has `marks`: a letter for each score, equal for equal cards, `unknown` without one.
    """
    ordered = [*(row for name in REFERENCES for row in rows if row["checkpoint"] == name)]
    ordered += [row for row in rows if row["checkpoint"] not in REFERENCES]
    combined: list[Mapping[str, Any]] = [*ordered, *published_rows()]
    marks = card_marks(combined)
    return [
        {**row, "marks": {name: marks[name].get(index, UNKNOWN) for name in row["scores"]}}
        for index, row in enumerate(combined)
    ]


def paper_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `paper_rows` as a table: one column for each score.

    Demo scores have columns of their own, since stand-in networks measure something else.
    """
    # The scores of our rows come first, in their order, then those that only papers report.
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    table = Table("checkpoint", *(measure_of(name).title for name in names), box=SIMPLE)
    for row in rows:
        cells = []
        for name in names:
            value = row["scores"].get(name)
            cells.append("" if value is None else f"{value:.3f} [{row['marks'][name]}]")
        table.add_row(str(row["checkpoint"]), *(cell.replace("[", r"\[") for cell in cells))
    return table


def card_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each card of `paper_rows`: score, mark, hash, and how it was made."""
    notes: dict[str, None] = {}  # in order, each once
    for row in rows:
        for name, card in (row.get("cards") or {}).items():
            if name in row["marks"]:
                notes[
                    f"{name} [{row['marks'][name]}]: card {card['hash']}, {card['clips']} clips of "
                    f"{card['frames']} frames at {card['fps']:g} fps, codec {card['codec']}, "
                    f"{card['network']} ({card['weights']})"
                ] = None
    return list(notes)


def print_paper_table(rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Print the rows of a score table with the published ones, as text or JSON."""
    combined = paper_rows(rows)
    if form == "json":
        print(json.dumps({"rows": combined}))
        return
    # As wide as its content: a table of the terminal's width would cut the values.
    table = paper_table(combined)
    wide = Console(width=MAX_WIDTH)
    Console(width=wide.measure(table).maximum).print(table)
    for note in card_notes(combined):
        print(note)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a score table, none if there is no file; raise DataError if damaged."""
    if not path.exists():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
        for row in rows:  # each row must have these
            _ = (row["checkpoint"], row["seed"], dict(row["scores"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a table of scores ({error}); remove it") from error
    return rows
