"""Validation of SyncNet: held-out contrastive loss, and accuracy by shift of the audio.

    val/loss               contrastive loss of each clip with its own windows, mean over clips
    val/accuracy/shift_0   share of windows whose own audio is the closest of the clip
    val/accuracy/shift_K   how often it is closer than the audio K frames earlier or later

The values have a table of one row per clip, which is summed over ranks as that of the held-out
errors, so that every clip counts once for any number of ranks.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from echolab.data.bad_samples import TolerantReader
from echolab.data.collate import collate_talkers
from echolab.errors import ConfigError
from echolab.metrics.sync_clips import HELD_OUT, read_talker
from echolab.metrics.sync_training import (
    SHIFTS,
    clip_losses,
    embed_talkers,
    scale_of,
    shift_accuracies,
)
from echolab.training.callbacks.callback import RunState
from echolab.training.callbacks.validation import (
    AVERAGED,
    FILLS_UP,
    RAW,
    Poll,
    Validation,
    autocast_dtype,
    both_tables,
    compute_dtype,
    places_of,
)
from echolab.training.datamodule import ValData
from echolab.types import SyncBatch

NAMES = ("loss", *(f"accuracy/shift_{shift}" for shift in (0, *SHIFTS)))


class TalkerShare(NamedTuple):
    """The batches that one rank evaluates; number and sizes are equal on all ranks."""

    clips: int  # number of clips, over all ranks
    batches: list[tuple[SyncBatch, list[int]]]  # batch and its clips; FILLS_UP marks padding


@torch.no_grad()
def sync_table(
    net: nn.Module, share: TalkerShare, *, device: torch.device, dtype: torch.dtype, poll: Poll
) -> Tensor:
    """Return the values of NAMES of each clip, [clips, 5]; zero for clips of other ranks."""
    # With zeros for clips of other ranks, the sum over ranks is the full table.
    table = torch.zeros(share.clips, len(NAMES), dtype=torch.float64)
    cast = autocast_dtype(net, dtype)
    for batch, places in share.batches:
        poll()
        pixels, cepstra = batch.crops.to(device).float() / 127.5 - 1, batch.cepstra.to(device)
        with torch.autocast(device.type, cast, enabled=cast != torch.float32):
            lips, audio = embed_talkers(net, pixels, cepstra)
        # One row per clip, without the clips that only fill up a batch.
        losses = clip_losses(lips, audio, scale_of(net))
        rows = torch.cat([losses[:, None], shift_accuracies(lips, audio)], 1).cpu().double()
        counted = [i for i, place in enumerate(places) if place != FILLS_UP]
        table[[places[i] for i in counted]] = rows[counted]
    return table


class SyncValidation(Validation):
    """Logs the held-out values of a SyncNet at intervals and at the end of the run."""

    def _read(self, val_data: ValData, row: int, rows: int, reader: TolerantReader) -> TalkerShare:
        """Return this rank's held-out clips; raise ConfigError if there is none."""
        # Use the requested number of clips, or all if there are fewer.
        clips = min(val_data.num_clips, len(val_data.clips))
        if clips < 1:
            raise ConfigError(
                f"{val_data.clips.folder}: {len(val_data.clips)} held-out clips, "
                f"data.val_num_clips={val_data.num_clips}; give at least one, or val_every=0"
            )
        read = partial(
            read_talker,
            val_data.clips,
            epoch=HELD_OUT,
            architecture=self.config.architecture,
            seed=self.config.seed,
        )
        # Every rank has as many places as the others; some only fill up.
        places, batches = places_of(clips, row, rows), []
        for first in range(0, len(places), val_data.batch_size):
            part = places[first : first + val_data.batch_size]
            talkers = [reader.read(max(place, 0), read) for place in part]
            batches.append((collate_talkers(val_data.clips, talkers), part))
        return TalkerShare(clips, batches)

    def _errors(self, state: RunState, share: TalkerShare) -> dict[str, float]:
        # Tables of all clips, of the averaged and of the raw weights.
        net, device = state.module.net, state.module.device
        averaged, raw = both_tables(
            partial(
                sync_table, net, share, device=device,
                dtype=compute_dtype(self.config.machine), poll=partial(self.sync.poll, state),
            ),
            net, self.ema, self.masters, device=device, counts=self.data.writer is not None,
        )  # fmt: skip
        return {
            f"{prefix}/{name}": float(column.mean())
            for prefix, table in ((AVERAGED, averaged), (RAW, raw))
            for name, column in zip(NAMES, table.T, strict=True)
        }
