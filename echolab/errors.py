"""Errors that a user can cause.  Each message is one line: `subject: fault; remedy`."""

import re

# Control characters, lone surrogates, line separators, and marks that reverse reading direction.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def escape_unprintable(text: str) -> str:
    """Return the text with escapes for characters that would steer a terminal, such as ESC.

    Names and messages from files and servers go through this before they are shown.  Line ends and
    tabs stay.
    """
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class EcholabError(Exception):
    """An error that the user can fix; the command line prints its message alone and exits 1."""

    def __str__(self) -> str:
        return escape_unprintable(super().__str__()).replace("\n", "\\n")


class ConfigError(EcholabError):
    """A setting that is unknown, missing or out of range."""


class BusyError(EcholabError):
    """A folder that another process writes to; later the same command may succeed."""


class FencedError(EcholabError):
    """A run that a later launch has taken over, so that this process must not write any more."""


class RetryableError(EcholabError):
    """A failure that may pass: the same command may succeed later; exit code 77."""


class DataError(EcholabError):
    """A shard, sample or dataset that breaks the contract."""


class StorageError(EcholabError):
    """A file system or server that fails, also after retries; the data may be undamaged."""


class DiskFullError(StorageError):
    """A file that cannot be written: no room, a quota, or a read-only disk."""


class SharedMemoryError(EcholabError):
    """/dev/shm is too full for the batches of the loader's workers."""


class WorkerError(EcholabError):
    """A worker process of the data loader that ended, or was killed."""


class MediaError(EcholabError):
    """An image, video or audio track that cannot be used."""


class CheckpointError(EcholabError):
    """A checkpoint that is damaged, or of another network."""


class SaveError(CheckpointError):
    """A checkpoint that cannot be written."""


class WeightsError(EcholabError):
    """A model file that is missing, or is not the file it claims to be."""


class CollectiveError(EcholabError):
    """A fault that all ranks raise together; `rank` has it, None if unknown."""

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class DivergedError(CollectiveError):
    """A loss, gradient or weight that is not finite; `step` (from 0) has it, None if unknown."""

    step: int | None = None


class ReplicaError(CollectiveError):
    """Ranks that should hold the same bits and do not."""


class ParityError(EcholabError):
    """Exported weights that do not compute what the training model does."""
