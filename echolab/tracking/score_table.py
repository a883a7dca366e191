"""The table of scores: checkpoints down, measures across, the best marked.

Ground truth and shuffled sound are no checkpoints: they say what is possible and what chance gives,
so they stand apart and can not be best.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

REFERENCES = ("ground_truth", "shuffled_sound")
CHANGES = (("dpo", "sft"), ("dpo", "sft_longer"))  # after and before; the second is the fair one

CHECKPOINTS = {
    "ground_truth": ("Ground truth", "the held-out clips themselves: the ceiling"),
    "sft": ("SFT", "supervised training"),
    "sft_longer": ("SFT, longer", "as many steps as preference training took: the fair baseline"),
    "ndpo": ("NDPO", "SFT, then rejected clips alone"),
    "dpo": ("DPO", "SFT, then chosen against rejected"),
    "shuffled_sound": ("Shuffled sound", "true clips with another clip's voice: chance"),
}


class Measure(NamedTuple):
    """How a score is called and read; `direction` is 1 where more is better, -1 where less."""

    title: str
    meaning: str
    direction: int


MEASURES = {
    "sync_c": Measure("Sync-C", "lip-sync confidence", 1),
    "sync_c_unguided": Measure("Sync-C, unguided", "lip sync without guidance by sound", 1),
    "sync_d": Measure("Sync-D", "lip-sync distance", -1),
    "fid": Measure("FID", "Fréchet distance of frames", -1),
    "fvd": Measure("FVD", "Fréchet distance of clips", -1),
    "mouth_corr": Measure("Mouth corr.", "mouth opening against the true one", 1),
    "mouth_corr_unguided": Measure("Mouth corr., unguided", "without guidance by sound", 1),
    "psnr_first_frame": Measure("PSNR frame 1", "dB, likeness to the picture given", 1),
    "psnr": Measure("PSNR", "dB", 1),
    "ssim": Measure("SSIM", "structural similarity", 1),
    "identity": Measure("Identity", "likeness of the face", 1),
    "flicker": Measure("Flicker", "change between frames", -1),
    "val_loss": Measure("Loss", "held out", -1),
}


class Score(NamedTuple):
    """Over the seeds: mean, standard deviation (0 for one seed), number of seeds."""

    mean: float
    spread: float
    seeds: int


def measure(name: str) -> Measure:
    """By its name in scores.json; `_demo` stays in the title: those networks are stand-ins."""
    plain = name.removesuffix("_demo")
    found = MEASURES.get(plain, Measure(plain.replace("_", " "), "", 0))
    return found._replace(title=f"{found.title} demo") if plain != name else found


def score_table(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """HTML of the rows of scores.json: {"checkpoint", "seed", "scores": {measure: number}}.

    Rows of one checkpoint are averaged over their seeds.  `colours` gives each checkpoint's
    CSS variable.  Nothing at all for no rows.
    """
    scores = averaged(rows)
    if not scores:
        return ""
    names = list(dict.fromkeys(name for row in scores.values() for name in row))
    trained = [checkpoint for checkpoint in scores if checkpoint not in REFERENCES]
    head = "".join(_heading(name) for name in names)
    groups = (["ground_truth"], trained, ["shuffled_sound"])
    bodies = ""
    for group, kind in zip(groups, ("reference", "trained", "reference"), strict=True):
        lines = [_row(c, scores, names, colours) for c in group if c in scores]
        bodies += f'<tbody class="{kind}">{"".join(lines)}</tbody>' if lines else ""
    lines = [
        _change(after, before, scores, names)
        for after, before in CHANGES
        if after in scores and before in scores
    ]
    foot = f"<tfoot>{''.join(lines)}</tfoot>" if lines else ""
    seeds = max(score.seeds for row in scores.values() for score in row.values())
    remark = f'<p class="note">± is one standard deviation over {seeds} seeds.</p>'
    remark = remark if seeds > 1 else ""
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th scope="col">Checkpoint</th>'
        f"{head}</tr></thead>{bodies}{foot}</table></div>{remark}"
    )


def averaged(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Score]]:
    """Checkpoint -> measure -> Score, in the order of CHECKPOINTS, then of appearance."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        measures = found.setdefault(str(row["checkpoint"]), {})
        for name, value in row["scores"].items():
            if value is not None and math.isfinite(value):
                measures.setdefault(name, []).append(float(value))
    order = [*CHECKPOINTS, *found]
    return {
        checkpoint: {name: _score(values) for name, values in found[checkpoint].items()}
        for checkpoint in sorted(found, key=order.index)
    }


def best(name: str, scores: Mapping[str, Mapping[str, Score]]) -> float | None:
    """The best mean among trained checkpoints, if there are several and better has a direction."""
    means = [row[name].mean for c, row in scores.items() if c not in REFERENCES and name in row]
    direction = measure(name).direction
    return max(means, key=lambda mean: direction * mean) if direction and len(means) > 1 else None


def written(value: float, decimals: int) -> str:
    """With a true minus sign."""
    text = f"{abs(value):.{decimals}f}"
    return f"−{text}" if value < 0 and float(text) else text


def decimals(name: str, scores: Mapping[str, Mapping[str, Score]]) -> int:
    """The same for a whole column, so that its numbers can be compared at a glance."""
    largest = max(abs(row[name].mean) for row in scores.values() if name in row)
    return 0 if largest >= 100 else 1 if largest >= 20 else 2


def _score(values: list[float]) -> Score:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Score(statistics.fmean(values), spread, len(values))


def _heading(name: str) -> str:
    said = measure(name)
    arrow = {1: "higher is better", -1: "lower is better", 0: ""}[said.direction]
    sign = {1: "↑", -1: "↓", 0: ""}[said.direction]
    mark = f'<span class="sign" title="{arrow}" aria-label="{arrow}">{sign}</span>' if sign else ""
    meaning = escape(said.meaning or name)
    return (
        f'<th scope="col" title="{escape(name)}">{escape(said.title)} {mark}'
        f"<small>{meaning}</small></th>"
    )


def _row(
    checkpoint: str,
    scores: Mapping[str, Mapping[str, Score]],
    names: Sequence[str],
    colours: Mapping[str, str],
) -> str:
    title, remark = CHECKPOINTS.get(checkpoint, (checkpoint, ""))
    dot = f'<i style="--c:var(--{colours.get(checkpoint, "faint")})"></i>'
    cells = "".join(_cell(checkpoint, name, scores) for name in names)
    return (
        f'<tr data-checkpoint="{escape(checkpoint)}"><th scope="row">{dot}{escape(title)}'
        f"<small>{escape(remark)}</small></th>{cells}</tr>"
    )


def _cell(checkpoint: str, name: str, scores: Mapping[str, Mapping[str, Score]]) -> str:
    score = scores[checkpoint].get(name)
    if score is None:
        return '<td class="none">–</td>'
    leads = checkpoint not in REFERENCES and score.mean == best(name, scores)
    places = decimals(name, scores)
    spread = f' <span class="spread">± {score.spread:.{places}f}</span>' if score.seeds > 1 else ""
    mark = '<span class="best" title="best of the trained checkpoints">best</span> '
    return (
        f'<td class="{"leads" if leads else ""}" data-measure="{escape(name)}"'
        f' data-value="{score.mean!r}">{mark if leads else ""}'
        f'<span class="figure">{written(score.mean, places)}</span>{spread}'
        f"{_gauge(score.mean, name, scores)}</td>"
    )


def _gauge(value: float, name: str, scores: Mapping[str, Mapping[str, Score]]) -> str:
    """A thin bar, empty at shuffled sound and full at ground truth.

    Only for measures of the sound: of the others (such as FID) those two say nothing.
    """
    truth, chance = (scores.get(reference, {}).get(name) for reference in REFERENCES)
    if truth is None or chance is None or truth.mean == chance.mean:
        return ""

    def share(mean: float) -> float:
        return (mean - chance.mean) / (truth.mean - chance.mean)

    trained = [row[name].mean for c, row in scores.items() if c not in REFERENCES and name in row]
    if not any(0 < share(mean) < 1 for mean in trained):
        return ""
    width = 100 * min(1.0, max(0.0, share(value)))
    return f'<span class="gauge" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'


def _change(
    after: str, before: str, scores: Mapping[str, Mapping[str, Score]], names: Sequence[str]
) -> str:
    """One row of differences, with better and worse told apart."""
    cells = []
    for name in names:
        if name not in scores[after] or name not in scores[before]:
            cells.append('<td class="none">–</td>')
            continue
        old = scores[before][name].mean
        change = scores[after][name].mean - old
        gain = change * measure(name).direction
        kind = "better" if gain > 0 else "worse" if gain < 0 else ""
        places = decimals(name, scores)
        share = f" <small>{_signed(100 * change / abs(old), 0)} %</small>" if old else ""
        cells.append(f'<td class="{kind}">{_signed(change, places)}{share}</td>')
    pair = [CHECKPOINTS[checkpoint][0] for checkpoint in (after, before)]
    return f'<tr><th scope="row">{pair[0]} against {pair[1]}</th>{"".join(cells)}</tr>'


def _signed(value: float, places: int) -> str:
    text = written(value, places)
    return text if text.startswith("−") or not float(text) else f"+{text}"
