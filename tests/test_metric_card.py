"""Metric cards: equal for equal measures, different for any difference, exact over JSON."""

import json
from dataclasses import fields, replace

import pytest

from echolab.metrics.card import Card, differences

CARD = Card(metric="fid", definition="|m1 - m2|^2 + ...", preprocessing="bilinear 299", clips=64)


def test_a_card_and_its_hash_survive_json() -> None:
    stored = json.loads(json.dumps(CARD.to_json()))
    stated = stored.pop("hash")
    assert Card(**stored) == CARD and Card(**stored).hash == stated == CARD.hash


@pytest.mark.parametrize("name", [field.name for field in fields(Card) if field.name != "sampling"])
def test_every_field_of_the_measure_changes_the_hash(name: str) -> None:
    value = getattr(CARD, name)
    other = {"a": "b"} if isinstance(value, dict) else type(value)(7)
    changed = replace(CARD, **{name: other})
    assert changed.hash != CARD.hash
    (line,) = differences(CARD, changed)
    assert line == f"{name}: {value}, {other}"


def test_sampling_describes_the_system_and_not_the_measure() -> None:
    changed = CARD.with_evaluation(sampling={"steps": 50})
    assert changed.hash == CARD.hash and changed.to_json()["sampling"] == {"steps": 50}
