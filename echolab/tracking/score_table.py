"""Score table as HTML: checkpoints in rows, measures in columns, the best of each marked.

Ground truth, its reconstruction by the autoencoder, and shuffled audio are references, not
checkpoints: they are upper bounds and the chance level, so they are never marked as best.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

BOUNDS = ("ground_truth", "shuffled_sound")  # the best and the chance level of lip sync
REFERENCES = ("ground_truth", "reconstruction", "shuffled_sound")
# Pairs of checkpoints whose differences are the last rows of the table.
CHANGES = (
    ("dpo", "sft"),
    ("dpo", "sft_longer"),
)  # after and before; the second pair is the fair comparison

# Titles and meanings, in the order of the table.
CHECKPOINTS = {
    "ground_truth": ("Ground truth", "the held-out clips themselves: upper bound"),
    "reconstruction": (
        "Ground truth, autoencoder",
        "the held-out clips after encoding and decoding: upper bound of any sample",
    ),
    "sft": ("SFT", "supervised training"),
    "sft_longer": ("SFT, longer", "same number of steps as preference training: fair baseline"),
    "ndpo": ("NDPO", "SFT, then rejected clips only"),
    "dpo": ("DPO", "SFT, then chosen against rejected clips"),
    "shuffled_sound": (
        "Shuffled audio",
        "held-out clips with the audio of another clip: chance level",
    ),
}


class Measure(NamedTuple):
    """Title and meaning of a score; `direction` is 1 if higher is better, -1 if lower."""

    title: str
    meaning: str
    direction: int


# Titles, meanings and directions by score, without the suffix of demo networks.
MEASURES = {
    "sync_c": Measure("Sync-C", "lip-sync confidence", 1),
    "sync_c_unguided": Measure("Sync-C, unguided", "lip sync without audio guidance", 1),
    "sync_d": Measure("Sync-D", "lip-sync distance", -1),
    "fid": Measure("FID", "Fréchet distance of frames", -1),
    "fvd": Measure("FVD", "Fréchet distance of clips", -1),
    "mouth_corr": Measure("Mouth corr.", "correlation of mouth opening with ground truth", 1),
    "mouth_corr_unguided": Measure("Mouth corr., unguided", "without audio guidance", 1),
    "psnr_first_frame": Measure("PSNR frame 1", "dB, first frame against the reference image", 1),
    "psnr": Measure("PSNR", "dB", 1),
    "ssim": Measure("SSIM", "structural similarity", 1),
    "identity": Measure("Identity", "face similarity", 1),
    "flicker": Measure("Flicker", "mean change between frames", -1),
    "val_loss": Measure("Loss", "validation", -1),
}


class Score(NamedTuple):
    """Mean and standard deviation over seeds (0 for one seed), and the number of seeds."""

    mean: float
    spread: float
    seeds: int


def measure_of(name: str) -> Measure:
    """Return the measure of a name in scores.json; the title keeps the suffix `_demo`."""
    plain = name.removesuffix("_demo")
    known = MEASURES.get(plain, Measure(plain.replace("_", " "), "", 0))
    return known._replace(title=f"{known.title} demo") if plain != name else known


def card_marks(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, str]]:
    """Return by score the letter of each row's metric card; rows with equal cards share a letter.

    Two values with different cards are not comparable.  Rows without a card have no letter.
    """
    marks: dict[str, dict[int, str]] = {}
    letters: dict[str, dict[str, str]] = {}
    # Letters are given in the order of the rows.
    for index, row in enumerate(rows):
        for name in row["scores"]:
            marks.setdefault(name, {})
            if card := (row.get("cards") or {}).get(name):
                known = letters.setdefault(name, {})
                marks[name][index] = known.setdefault(card["hash"], _letter(len(known)))
    return marks


def visible_marks(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return by score and checkpoint the letters of its cards; empty if all cards are equal.

    A checkpoint whose seeds have different cards has several letters; `?` is a row without a card.
    """
    visible = {}
    for name, letters in card_marks(rows).items():
        by_checkpoint: dict[str, set[str]] = {}
        for index, row in enumerate(rows):
            if name in row["scores"]:
                by_checkpoint.setdefault(str(row["checkpoint"]), set()).add(letters.get(index, "?"))
        # Equal cards, or none at all as in tables of an older version, need no mark.
        if len(set().union(*by_checkpoint.values())) > 1:
            visible[name] = {key: " ".join(sorted(own)) for key, own in by_checkpoint.items()}
    return visible


def _letter(index: int) -> str:
    """Return a, b, ..., z, aa, ab, ... for 0, 1, ..."""
    first, last = divmod(index, 26)
    return (_letter(first - 1) if first else "") + chr(ord("a") + last)


def score_table(rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> str:
    """Return the rows of scores.json as HTML: {"checkpoint", "seed", "scores": {measure: number}}.

    Rows of one checkpoint are averaged over their seeds.  `colors` are CSS variables by checkpoint.
    Without rows the result is empty.
    """
    scores = averaged(rows)
    if not scores:
        return ""
    # The references are the first and the last rows, the trained checkpoints in between.
    names = list(dict.fromkeys(name for row in scores.values() for name in row))
    trained = [checkpoint for checkpoint in scores if checkpoint not in REFERENCES]
    head, marks = "".join(_heading(name) for name in names), visible_marks(rows)
    groups = (["ground_truth", "reconstruction"], trained, ["shuffled_sound"])
    bodies = ""
    # One <tbody> for each group.
    for group, kind in zip(groups, ("reference", "trained", "reference"), strict=True):
        lines = [_row(c, scores, names, colors, marks) for c in group if c in scores]
        bodies += f'<tbody class="{kind}">{"".join(lines)}</tbody>' if lines else ""
    lines = [
        _difference_row(after, before, scores, names, marks)
        for after, before in CHANGES
        if after in scores and before in scores
    ]
    foot = f"<tfoot>{''.join(lines)}</tfoot>" if lines else ""
    # Explain the standard deviation only if there are several seeds.
    seeds = max(score.seeds for row in scores.values() for score in row.values())
    remark = f'<p class="note">± is one standard deviation over {seeds} seeds.</p>'
    remark = remark if seeds > 1 else ""
    if marks:
        remark += (
            '<p class="note">Letters mark metric cards: values of a column with different letters '
            "were measured in different ways and are not comparable.</p>"
        )
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th scope="col">Checkpoint</th>'
        f"{head}</tr></thead>{bodies}{foot}</table></div>{remark}"
    )


def averaged(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Score]]:
    """Return scores by checkpoint and measure; first CHECKPOINTS in order, then other names."""
    # Collect the values of all seeds, without missing ones.
    values_by: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        measures = values_by.setdefault(str(row["checkpoint"]), {})
        for name, value in row["scores"].items():
            if value is not None and math.isfinite(value):
                measures.setdefault(name, []).append(float(value))
    order = [*CHECKPOINTS, *values_by]
    return {
        checkpoint: {name: _score(values) for name, values in values_by[checkpoint].items()}
        for checkpoint in sorted(values_by, key=order.index)
    }


def best(name: str, scores: Mapping[str, Mapping[str, Score]]) -> float | None:
    """Return the best mean of the trained checkpoints; None if only one, or without a direction."""
    means = [row[name].mean for c, row in scores.items() if c not in REFERENCES and name in row]
    direction = measure_of(name).direction
    return max(means, key=lambda mean: direction * mean) if direction and len(means) > 1 else None


def format_number(value: float, decimals: int) -> str:
    """Format a number with a typographic minus sign."""
    text = f"{abs(value):.{decimals}f}"
    return f"−{text}" if value < 0 and float(text) else text


def decimals(name: str, scores: Mapping[str, Mapping[str, Score]]) -> int:
    """Return the number of decimals of a column, the same for all its rows."""
    largest = max(abs(row[name].mean) for row in scores.values() if name in row)
    return 0 if largest >= 100 else 1 if largest >= 20 else 2


def _score(values: list[float]) -> Score:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Score(statistics.fmean(values), spread, len(values))


def _heading(name: str) -> str:
    measure = measure_of(name)
    arrow = {1: "higher is better", -1: "lower is better", 0: ""}[measure.direction]
    sign = {1: "↑", -1: "↓", 0: ""}[measure.direction]
    mark = f'<span class="sign" title="{arrow}" aria-label="{arrow}">{sign}</span>' if sign else ""
    meaning = escape(measure.meaning or name)
    return (
        f'<th scope="col" title="{escape(name)}">{escape(measure.title)} {mark}'
        f"<small>{meaning}</small></th>"
    )


def _row(
    checkpoint: str,
    scores: Mapping[str, Mapping[str, Score]],
    names: Sequence[str],
    colors: Mapping[str, str],
    marks: Mapping[str, Mapping[str, str]],
) -> str:
    title, remark = CHECKPOINTS.get(checkpoint, (checkpoint, ""))
    dot = f'<i style="--c:var(--{colors.get(checkpoint, "faint")})"></i>'
    cells = "".join(
        _cell(checkpoint, name, scores, marks.get(name, {}).get(checkpoint, "")) for name in names
    )
    return (
        f'<tr data-checkpoint="{escape(checkpoint)}"><th scope="row">{dot}{escape(title)}'
        f"<small>{escape(remark)}</small></th>{cells}</tr>"
    )


def _cell(checkpoint: str, name: str, scores: Mapping[str, Mapping[str, Score]], card: str) -> str:
    score = scores[checkpoint].get(name)
    if score is None:
        return '<td class="none">–</td>'
    # References are never marked as best, nor is a value among others that do not compare.
    leads = not card and checkpoint not in REFERENCES and score.mean == best(name, scores)
    places = decimals(name, scores)
    spread = f' <span class="spread">± {score.spread:.{places}f}</span>' if score.seeds > 1 else ""
    letter = f' <sup class="card" title="metric card">{escape(card)}</sup>' if card else ""
    mark = '<span class="best" title="best of the trained checkpoints">best</span> '
    return (
        f'<td class="{"leads" if leads else ""}" data-measure="{escape(name)}"'
        f' data-value="{score.mean!r}">{mark if leads else ""}'
        f'<span class="figure">{format_number(score.mean, places)}</span>{spread}'
        f"{letter}{_sync_bar(score.mean, name, scores)}</td>"
    )


def _sync_bar(value: float, name: str, scores: Mapping[str, Mapping[str, Score]]) -> str:
    """Return a thin bar, empty at shuffled audio and full at ground truth.

    Only measures of audio sync have a bar: for others, such as FID, the references are no bounds.
    """
    # The bar needs both references.
    truth, chance = (scores.get(reference, {}).get(name) for reference in BOUNDS)
    if truth is None or chance is None or truth.mean == chance.mean:
        return ""

    def share(mean: float) -> float:
        return (mean - chance.mean) / (truth.mean - chance.mean)

    trained = [row[name].mean for c, row in scores.items() if c not in REFERENCES and name in row]
    if not any(0 < share(mean) < 1 for mean in trained):
        return ""
    width = 100 * min(1.0, max(0.0, share(value)))
    return f'<span class="gauge" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'


def _difference_row(
    after: str,
    before: str,
    scores: Mapping[str, Mapping[str, Score]],
    names: Sequence[str],
    marks: Mapping[str, Mapping[str, str]],
) -> str:
    """Return one row of differences, each marked as better or worse."""
    cells = []
    # One cell for each measure that both checkpoints have, measured in the same way.
    for name in names:
        letters = marks.get(name, {})
        comparable = letters.get(after) == letters.get(before)
        if name not in scores[after] or name not in scores[before] or not comparable:
            cells.append('<td class="none">–</td>')
            continue
        old = scores[before][name].mean
        change = scores[after][name].mean - old
        gain = change * measure_of(name).direction
        kind = "better" if gain > 0 else "worse" if gain < 0 else ""
        places = decimals(name, scores)
        share = f" <small>{_signed(100 * change / abs(old), 0)} %</small>" if old else ""
        cells.append(f'<td class="{kind}">{_signed(change, places)}{share}</td>')
    pair = [CHECKPOINTS[checkpoint][0] for checkpoint in (after, before)]
    return f'<tr><th scope="row">{pair[0]} against {pair[1]}</th>{"".join(cells)}</tr>'


def _signed(value: float, places: int) -> str:
    text = format_number(value, places)
    return text if text.startswith("−") or not float(text) else f"+{text}"
