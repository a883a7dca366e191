"""Errors that a user can cause.  Each message names file, key, number and remedy in one line."""


class EcholabError(Exception):
    """Something the user can put right; the command line prints its message alone and exits 1."""


class ConfigError(EcholabError):
    """A setting that is unknown, missing or out of range."""


class BusyError(EcholabError):
    """A run folder in which another process is at work; later the same command may do."""


class FencedError(EcholabError):
    """A run that a later launch has taken from this process, which must write nothing any more."""


class PassingError(EcholabError):
    """A failure that may be over when the same command is given again; exit code 77."""


class DataError(EcholabError):
    """A shard, sample or dataset that does not keep the contract."""


class MediaError(EcholabError):
    """A picture, video or sound that cannot be used."""


class CheckpointError(EcholabError):
    """A checkpoint that is damaged, or of another network."""


class SaveError(CheckpointError):
    """A checkpoint that cannot be written."""


class WeightsError(EcholabError):
    """A model file that is missing, or is not the file it claims to be."""


class SharedError(EcholabError):
    """A fault that all ranks find together and raise alike; `rank` has it, None where unknown."""

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class DivergedError(SharedError):
    """A loss, gradient or weight that is not finite."""


class ReplicaError(SharedError):
    """Ranks that should hold the same bits and do not."""


class ParityError(EcholabError):
    """Exported weights that do not compute what the training model does."""
