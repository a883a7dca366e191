"""Looks at the weights of a running training: their held-out loss; whether exports are alike."""

from pathlib import Path

import torch

from echolab.training import distributed
from echolab.training.config import Training
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters
from echolab.training.export_check import Sampling, check_parity, parity_clips
from echolab.training.module import DiffusionModule
from echolab.training.validation import Poll, Share, read_share, validate


class Evaluation:
    """Of the network in `module`; every method is collective and leaves no trace."""

    def __init__(
        self,
        training: Training,
        data: ShardDataModule,
        module: DiffusionModule,
        masters: Masters,
        ema: Ema,
    ) -> None:
        self.training, self.data = training, data
        self.module, self.masters, self.ema = module, masters, ema
        low = training.machine.precision != "32-true"
        self.dtype = torch.bfloat16 if low else torch.float32
        self._share: Share | None = None

    def prepare(self) -> None:
        """Read this rank's held-out clips, so that bad ones are found before the first step."""
        held_out, together = self.training.held_out, self.training.machine.sequence_parallel
        assert held_out
        row, rows = distributed.rank() // together, distributed.world() // together
        self._share = read_share(held_out, row, rows, self.training.reader_of(held_out.clips))

    def held_out(self, poll: Poll) -> dict[str, float]:
        """Errors at fixed noise, of the averaged weights and of the raw ones.

        `poll` is called before each batch, on all ranks alike.
        """
        held_out, phases = self.training.held_out, self.training.phases
        assert held_out and phases  # `Training.check` has seen to it
        if self._share is None:
            self.prepare()
        assert self._share
        return dict(
            validate(
                self.module.net,
                self.ema,
                self.masters,
                self._share,
                phases,
                held_out.sigmas,
                seed=self.training.seed,
                device=self.module.device,
                dtype=self.dtype,
                counts=self.data.writer is not None,
                poll=poll,
            )
        )

    def parity(self, checkpoint: Path, poll: Poll) -> dict[str, float]:
        """How far samples of the export of `checkpoint` are off; ParityError where too far.

        `poll` is called after each step of the sampler, on all ranks alike.
        """
        training = self.training
        clips = training.held_out.clips if training.held_out else training.clips[0]
        steps = training.schedule.supervised_steps(training.schedule.steps)
        learnt = training.curriculum.probabilities(steps)
        found = check_parity(
            self.module.net,
            self.ema,
            self.masters,
            checkpoint=checkpoint,
            folder=training.folder,
            clips=parity_clips(
                training.reader_of(clips), [task for task, share in learnt.items() if share > 0]
            ),
            how=Sampling(training.seed, training.shift),
            device=self.module.device,
            dtype=self.dtype,
            poll=poll,
        )
        return found.values()
