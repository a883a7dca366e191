"""Rows of `echolab bench step` for saving: how long training stops for a checkpoint.

A save is begun after a step and goes on beside the next ones.  What the step is longer by is the
copy to host memory, measured alone beside it, and the stall: what is left.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from echolab.bench.engine import STEP, WARM, Subject, bare_of, batches_of, training_of
from echolab.bench.rows import Row, cost_of, say
from echolab.data.train_dataset import MicroBatch
from echolab.training.checkpoints.writer import CheckpointWriter
from echolab.training.engine.master_weights import MASTER, MOMENTS

BETWEEN = 3  # plain steps before each save
AT_MOST = 200  # steps beside one save


class Save(NamedTuple):
    """Seconds of one save and of the steps around it."""

    plain: float  # a step
    begin: float  # what a step is longer by
    copy: float  # the same bytes, copied and nothing else
    beside: list[float]  # steps while the thread writes
    finish: float  # publishing, once all is on disk


class Saver:
    """A bare loop that saves."""

    def __init__(self, subject: Subject, net: nn.Module, item: MicroBatch) -> None:
        self.bare, self.item, self.device = bare_of(subject, net), item, subject.device
        masters, ema = self.bare.masters, self.bare.ema
        self.folder = subject.folder / "saves"
        self.writer = CheckpointWriter(self.folder, masters, ema, keep=lambda step: False)
        self.number = 0
        self.pinned = subject.device == "cuda"
        self.hosts = [torch.empty_like(t, device="cpu", pin_memory=self.pinned)
                      for t in self._tensors()]  # fmt: skip

    def _tensors(self) -> list[Tensor]:
        masters, ema = self.bare.masters, self.bare.ema
        parts = [masters.flats(part) for part in (MASTER, *MOMENTS)]
        return [tensor for part in [*parts, *ema.flats.values()] for tensor in part]

    def _step(self) -> None:
        self.bare.step(self.item)
        self.bare.average()

    def _begin(self) -> None:
        self.number += 1
        self.writer.begin({"step": self.number})

    def _copy(self) -> None:
        for host, tensor in zip(self.hosts, self._tensors(), strict=True):
            host.copy_(tensor.detach(), non_blocking=self.pinned)

    def seconds(self, what: str) -> float:
        """Of one `step`, `begin`, `copy` or `finish`."""
        run = {"step": self._step, "begin": self._begin, "copy": self._copy,
               "finish": self.writer.finish}[what]  # fmt: skip
        return cost_of(run, self.device).seconds

    def save(self) -> Save:
        """Plain steps, then one save with the steps that go on beside it."""
        plain = statistics.median(self.seconds("step") for _ in range(BETWEEN))
        copy = self.seconds("copy")
        begin = self.seconds("begin")
        beside: list[float] = []
        while not self.writer.written() and len(beside) < AT_MOST:
            beside.append(self.seconds("step"))
        while not self.writer.written():  # steps too short to wait for
            time.sleep(0.01)
        return Save(plain, begin, copy, beside, self.seconds("finish"))


def save_rows(subject: Subject, net: nn.Module, pairs: int) -> Iterator[Row]:
    """Begin, copy and stall of an asynchronous save; the steps beside it; the whole."""
    say(f"measuring engine/save in {subject.folder}")
    item = next(batches_of(training_of(subject, net, "bare", 1, subject.machine())))
    saver = Saver(subject, net, item)
    for _ in range(WARM):
        saver.seconds("step")
    saver.save()  # makes its buffers, which later saves use again
    saves = [saver.save() for _ in range(pairs)]
    saver.writer.close()
    shutil.rmtree(saver.folder)
    plain = statistics.median(save.plain for save in saves)

    def row(name: str, values: list[float]) -> Row:
        return Row(f"engine/save/{name}", statistics.median(values), "s", STEP, plain)

    yield row("begin", [save.begin for save in saves])
    yield row("copy", [save.copy for save in saves])
    yield row("stall", [save.begin - save.copy for save in saves])
    beside = [seconds for save in saves for seconds in save.beside]
    if beside:
        yield row("step_beside", beside)
    yield row("finish", [save.finish for save in saves])
    yield row("whole", [saver.writer.seconds])
    yield Row("engine/save/steps_beside", statistics.median(len(s.beside) for s in saves), "steps")
    yield Row("engine/save/size", sum(host.nbytes for host in saver.hosts) / 2**20, "MiB")
