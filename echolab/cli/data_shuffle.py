"""`echolab data shuffle-report FOLDER`: how well a dataset's order shuffles."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from echolab.arguments import parse
from echolab.data.batch_sampler import Order
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shuffle import BLOCK, BUFFER, epoch_order
from echolab.data.shuffle_quality import shuffling, uniformity
from echolab.errors import ConfigError, DataError

UNLIKELY = 0.001  # of the test of uniformity: below it, something is wrong
ADJACENT = 0.02  # share of neighbours left together


@dataclass(frozen=True)
class ShuffleArguments:
    """Work out the order of some epochs, as training with these settings would meet it.

    Exit code 1 where samples are not spread evenly, or where an epoch repeats another.
    """

    folder: str = field(metadata={"help": "the dataset's folder or address"})
    epochs: int = field(default=20, metadata={"ge": 2, "help": "how many to work out, 2 or more"})
    seed: int = field(default=0, metadata={"ge": 0, "help": "as of the run"})
    block: int = field(default=BLOCK, metadata={"ge": 1, "help": "as data.shuffle_block_size"})
    buffer: int = field(default=BUFFER, metadata={"ge": 0, "help": "as data.shuffle_buffer"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def report(dataset: ShardDataset, arguments: ShuffleArguments) -> dict[str, Any]:
    """All measures, means over the epochs but for the extremes."""
    shards, count = dataset.samples_by_shard, len(dataset)
    orders = [
        epoch_order(
            shards, dataset.fingerprint, seed=arguments.seed, epoch=epoch,
            block=arguments.block, buffer=arguments.buffer,
        )
        for epoch in range(arguments.epochs)
    ]  # fmt: skip
    found = [shuffling(shards, order, block=arguments.block) for order in orders]
    pairs = zip(orders, orders[1:], strict=False)
    return {
        "folder": arguments.folder,
        "samples": count,
        "shards": len(shards),
        "adjacency": max(one.adjacency for one in found),
        "moved": float(np.mean([one.moved for one in found])),
        "shards_in_100": float(np.mean([one.shards for one in found])),
        "open_blocks": max(one.open_blocks for one in found),
        "repeated": max(float(np.mean(one == other)) for one, other in pairs),
        "uniformity": uniformity(orders, block=arguments.block),
    }


def main(argv: list[str]) -> int:
    """Measure, and say what is wrong."""
    command = "echolab data shuffle-report"
    arguments = parse(ShuffleArguments, argv, command=command, positional=("folder",))
    if arguments.epochs < 2:
        raise ConfigError(f"epochs={arguments.epochs}: must be 2 or more")
    Order(arguments.block, arguments.buffer).check()
    dataset = open_dataset(arguments.folder)
    if not len(dataset):
        raise DataError(f"{arguments.folder}: holds no sample; nothing to shuffle")
    told = report(dataset, arguments)
    uneven = told["uniformity"] is not None and told["uniformity"] < UNLIKELY
    told["good"] = not uneven and told["repeated"] < 1
    if arguments.format == "json":
        print(json.dumps(told))
    else:
        print("\n".join(in_words(told)))
    return 0 if told["good"] else 1


def in_words(told: dict[str, Any]) -> list[str]:
    """One line a measure."""
    likely = told["uniformity"]
    weak = f"; above {ADJACENT:.0%}, take a larger buffer or a smaller block"
    return [
        f"{told['folder']}: {told['samples']} samples in {told['shards']} shards",
        f"neighbours left together   {told['adjacency']:.2%}"
        + (weak if told["adjacency"] > ADJACENT else ""),
        f"moved                      {told['moved']:.3f} of an epoch; 0.333 is a perfect shuffle",
        f"shards among 100 samples   {told['shards_in_100']:.1f}",
        f"blocks open at once        {told['open_blocks']}",
        f"equal places in two epochs {told['repeated']:.2%}",
        "uniform places             "
        + ("too few samples to tell" if likely is None else f"p = {likely:.3f}"),
    ]
