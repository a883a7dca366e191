"""How often a run logs, saves and validates.  Imports no torch."""

from echolab.errors import ConfigError


class Intervals:
    """Intervals in optimizer steps; 0 means never."""

    def __init__(
        self,
        log_every: int = 10,
        save_every: int = 500,
        val_every: int = 0,
        replica_check_every: int = 100,
        snapshot_every: int = 0,
    ) -> None:
        if snapshot_every and (not save_every or snapshot_every % save_every):
            raise ConfigError(
                f"snapshot_every={snapshot_every}: must be a multiple of "
                f"save_every={save_every}; change either"
            )
        self.log_every, self.save_every, self.val_every = log_every, save_every, val_every
        self.snapshot_every = snapshot_every  # keep a snapshot of optim.posthoc_ema_stds
        self.replica_check_every = replica_check_every  # compare replicated state between ranks

    def keeps_snapshot(self, step: int) -> bool:
        """Return whether to keep the power averages of this step's checkpoint as a snapshot."""
        return self.due(self.snapshot_every, step)

    @staticmethod
    def due(every: int, step: int) -> bool:
        """Return whether `step` is a multiple of the interval `every`; False if `every` is 0."""
        return every > 0 and step % every == 0
