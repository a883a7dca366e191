"""The arrays of dataset.json equal its JSON, in any of its forms; every change is detected."""

import hashlib
import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echolab.data.index import fingerprint, parse_index
from echolab.errors import DataError

spans = st.tuples(st.integers(0, 2**60), st.integers(0, 2**60), st.integers(0, 2**32 - 1))
members = st.dictionaries(st.sampled_from(["mp4", "json", "tracks.npz", "ü.png"]), spans)


@st.composite
def datasets(draw: Any, most: int = 12) -> dict[str, Any]:
    """Draw the contents of dataset.json, as dictionaries."""
    counts = draw(st.lists(st.integers(0, 4), max_size=most // 3))
    shards = [
        {"name": f"a-{i:06d}.tar", "sha256": f"{i:064x}", "bytes": 2**61 + i, "samples": count}
        for i, count in enumerate(counts)
    ]
    texts = st.text(
        st.characters(codec="utf-8", exclude_characters="./", exclude_categories=("C", "Z")),
        min_size=1,
        max_size=9,
    )
    keys = draw(st.lists(texts, min_size=sum(counts), max_size=sum(counts), unique=True))
    names = [shard["name"] for shard in shards for _ in range(shard["samples"])]
    samples = [
        {"key": key, "shard": name, "members": draw(members)}
        for key, name in zip(keys, names, strict=True)
    ]
    head = {"kind": "foreign", "encoders": draw(st.dictionaries(texts, texts, max_size=2))}
    fields = {"samples": ['"samples":['], "text": draw(texts)}
    content = [1, *head.values(), shards, samples]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    name = hashlib.sha256(text.encode()).hexdigest()
    return {
        "format": 1, **head, "description": fields, "fingerprint": name, "shards": shards,
        "samples": samples,
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(index=datasets(), form=st.integers(0, 3))
def test_the_arrays_equal_the_json(index: dict[str, Any], form: int) -> None:
    text = [
        json.dumps(index, separators=(",", ":")),
        json.dumps(index, indent=1),
        json.dumps(index, separators=(",", ":"), ensure_ascii=False) + "\n",
        json.dumps(dict(reversed(index.items())), separators=(",", ":")),
    ][form]
    head, table = parse_index(text.encode(), "dataset.json")
    table = pickle.loads(pickle.dumps(table))  # noqa: S301
    samples = index["samples"]
    assert list(table.keys) == [sample["key"] for sample in samples]
    assert table.keys[::-2] == list(table.keys)[::-2] and len(table) == len(samples)
    assert [table.members(i) for i in range(len(table))] == [s["members"] for s in samples]
    names = [table.shards[table.shard_of(i)].name for i in range(len(table))]
    assert names == [sample["shard"] for sample in samples]
    assert head["description"] == index["description"]


@settings(max_examples=60, deadline=None)
@given(index=datasets(), data=st.data())
def test_every_change_is_detected(index: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(index, separators=(",", ":"))
    described = text.index('"description"'), text.index('"fingerprint"')  # free to be changed
    at = data.draw(
        st.integers(0, len(text) - 1).filter(lambda i: not described[0] <= i < described[1])
    )
    other = data.draw(st.sampled_from('0a",:[]{} \x00').filter(lambda c: c != text[at]))
    for changed in (text[:at] + other + text[at + 1 :], text[:at], text + text[at:]):
        if _means(changed) != index:
            with pytest.raises(DataError, match=r"^x/dataset\.json: .*make the dataset again$"):
                parse_index(changed.encode(), "x/dataset.json")


def _means(text: str) -> object:
    try:
        return {"fingerprint": None, **json.loads(text)}
    except (ValueError, TypeError):
        return None


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
def test_the_fingerprint_equals_that_of_the_full_json(count: int) -> None:
    samples = [{"key": f"k{i}", "members": {"b": (i, 2, 3), "a": (4, 5, 6)}} for i in range(count)]
    content = [1, "raw", {"x": "y", "a": "ü"}, [{"name": "n"}], samples]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    names = fingerprint("raw", {"x": "y", "a": "ü"}, [{"name": "n"}], iter(samples))
    assert names == hashlib.sha256(text.encode()).hexdigest()


def test_samples_are_in_the_order_of_their_shards() -> None:
    shards = [{"name": f"a-{i}.tar", "sha256": "0" * 64, "bytes": 1, "samples": 1} for i in (0, 1)]
    for names in (["a-1.tar", "a-0.tar"], ["a-0.tar"], ["a-0.tar", "a-1.tar", "a-1.tar"]):
        samples = [{"key": f"k{i}", "shard": n, "members": {}} for i, n in enumerate(names)]
        index = {"format": 1, "kind": "raw", "encoders": {}, "description": {}}
        index |= {"fingerprint": fingerprint("raw", {}, shards, samples)}
        index |= {"shards": shards, "samples": samples}
        with pytest.raises(DataError, match="the shard that counts it|shards that count"):
            parse_index(json.dumps(index).encode(), "x")
