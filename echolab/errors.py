"""Errors that a user can cause.  Each message is one line: `subject: fault; remedy`.

The exit code of each class is in `launch.exit_codes`.
"""

import re

# Control characters, lone surrogates, line separators, and marks that change the text direction.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def escape_unprintable(text: str) -> str:
    """Escape characters that would control a terminal, such as ESC; keep line ends and tabs.

    Apply this to names and messages from files and servers before they are shown.
    """
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class EcholabError(Exception):
    """An error that the user can fix; the command line prints only its message and exits with 1."""

    def __str__(self) -> str:
        return escape_unprintable(super().__str__()).replace("\n", "\\n")


class ConfigError(EcholabError):
    """A setting that is unknown, missing or out of range."""


# Errors about a run folder or dataset folder that another process uses.


class BusyError(EcholabError):
    """A folder that another process writes to; the same command may succeed later."""


class FencedError(EcholabError):
    """A run that a later launch took over, so that this process must stop writing."""


class RetryableError(EcholabError):
    """A temporary failure: the same command may succeed later; exit code 77."""


# Errors about data and storage.


class DataError(EcholabError):
    """A shard, sample or dataset that violates the dataset format."""


class StorageError(EcholabError):
    """A file system or server that still fails after retries; the data may be undamaged."""


class DiskFullError(StorageError):
    """A file that cannot be written: no space, a quota, or a read-only disk."""


class SharedMemoryError(EcholabError):
    """A /dev/shm without space for the batches of data loader workers."""


class WorkerError(EcholabError):
    """A data loader worker that ended or was killed."""


class MediaError(EcholabError):
    """An image, video or audio track that cannot be used."""


# Errors about checkpoints and weights.


class CheckpointError(EcholabError):
    """A checkpoint that is damaged or belongs to another network."""


class SaveError(CheckpointError):
    """A checkpoint that cannot be written."""


class WeightsError(EcholabError):
    """A model file that is missing, damaged or of another model."""


class MissingWeightsError(WeightsError):
    """A released model that is in no folder of weights; a score that needs it can be left out."""


# Training failures that all ranks detect in the same step.


class CollectiveError(EcholabError):
    """An error that all ranks raise together; `rank` is the rank at fault, None if unknown."""

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class DivergedError(CollectiveError):
    """A loss, gradient or weight that is not finite, at `step` (from 0; None if unknown)."""

    step: int | None = None


class ReplicaError(CollectiveError):
    """Replicas that differ between ranks."""


class ParityError(EcholabError):
    """An exported model whose outputs differ from those of the training model."""
