"""The table of a paper: our rows and the published ones, each value with its card or `unknown`."""

import io
from dataclasses import asdict
from typing import Any

from rich.console import Console

from echolab.metrics.card import Card
from echolab.tracking.published import PUBLISHED, UNKNOWN, card_notes, paper_rows, paper_table
from echolab.tracking.score_table import card_marks, score_table, visible_marks

CARD = Card(metric="sync_c", definition="median - min", preprocessing="crop 0.4", clips=64)
CODED = Card(**{**asdict(CARD), "codec": "libx264 crf 23"})


def row(name: str, value: float, card: Card | None, seed: int = 0) -> dict[str, Any]:
    cards = {"sync_c": card.to_json()} if card else {}
    return {"checkpoint": name, "seed": seed, "scores": {"sync_c": value}, "cards": cards}


def test_equal_cards_share_a_letter_and_others_do_not() -> None:
    rows = [row("a", 1.0, CARD), row("b", 2.0, CODED), row("c", 3.0, CARD), row("d", 4.0, None)]
    assert card_marks(rows) == {"sync_c": {0: "a", 1: "b", 2: "a"}}
    assert visible_marks(rows) == {"sync_c": {"a": "a", "b": "b", "c": "a", "d": "?"}}


def test_more_cards_than_letters() -> None:
    cards = [Card(**{**asdict(CARD), "clips": count}) for count in range(60)]
    marks = card_marks([row(str(i), 1.0, card) for i, card in enumerate(cards)])["sync_c"]
    assert [marks[i] for i in (0, 25, 26, 51, 52)] == ["a", "z", "aa", "az", "ba"]
    assert len(set(marks.values())) == 60


def test_a_column_of_equal_cards_or_of_none_has_no_marks() -> None:
    for card in (CARD, None):
        rows = [row("sft", 1.0, card), row("dpo", 2.0, card)]
        assert visible_marks(rows) == {}
        html = score_table(rows, {})
        assert 'class="card"' not in html and 'class="best"' in html


def test_values_of_different_cards_are_marked_and_never_compared() -> None:
    html = score_table([row("sft", 1.0, CARD), row("dpo", 2.0, CODED)], {})
    assert html.count('class="card"') == 2 and "not comparable" in html
    assert 'class="best"' not in html  # a codec is no better model
    assert "DPO against SFT" in html and 'class="better"' not in html


def test_seeds_of_different_cards_show_both_letters() -> None:
    rows = [row("sft", 1.0, CARD), row("sft", 2.0, CODED, seed=1)]
    assert visible_marks(rows) == {"sync_c": {"sft": "a b"}}


def test_a_papers_table_has_ground_truth_first_and_published_rows_last() -> None:
    ours = [row("dpo", 0.7, CARD), row("shuffled_sound", 0.3, CARD), row("ground_truth", 0.9, CARD)]
    rows = paper_rows(ours)
    names = [line["checkpoint"] for line in rows]
    assert names[:3] == ["ground_truth", "shuffled_sound", "dpo"]
    assert len(rows) == 3 + len(PUBLISHED)
    assert [line["marks"]["sync_c"] for line in rows[:3]] == ["a", "a", "a"]
    for line in rows[3:]:
        assert set(line["marks"].values()) == {UNKNOWN}
    assert card_notes(rows) == [
        f"sync_c [a]: card {CARD.hash}, 64 clips of 0 frames at 0 fps, codec none, none (none)"
    ]


def test_the_table_prints_every_value_with_its_mark() -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(paper_table(paper_rows([row("dpo", 0.7, CARD)])))
    text = console.export_text()
    assert "0.700 [a]" in text and "4.780 [unknown]" in text and "arXiv 2507.03905v1" in text
