"""Whether things were made by the same frozen encoders, and whether datasets share samples.

Latents of two autoencoders look alike and mean different pictures; so do features.  Every dataset,
checkpoint and file of candidates carries the fingerprints of its encoders by name (video, text,
image, audio); what carries none, such as a foreign dataset, is taken on trust.
"""

from collections.abc import Mapping

from echolab.data.shard_reader import ShardDataset
from echolab.errors import DataError


def check_same_encoders(
    place: object, encoders: Mapping[str, str], other: object, others: Mapping[str, str]
) -> None:
    """Raise DataError naming the first encoder in which two things differ."""
    for name in sorted(encoders.keys() & others.keys()):
        if encoders[name] != others[name]:
            raise DataError(
                f"{place}: its {name} encoder is {encoders[name][:12]}, that of {other} is "
                f"{others[name][:12]}; encode both with one, or give what was made with the same"
            )


def shared_samples(one: ShardDataset, other: ShardDataset) -> int:
    """Return how many samples of `one` are in `other` too: the same key, bytes and checksums."""
    number = {key: i for i, key in enumerate(one.keys)}
    return sum(
        _content(one, number[key]) == _content(other, i)
        for i, key in enumerate(other.keys)
        if key in number
    )


def _content(dataset: ShardDataset, i: int) -> dict[str, tuple[int, int]]:
    """Return size and checksum of each member of a sample."""
    return {name: place[1:] for name, place in dataset.sample(i).members.items()}
