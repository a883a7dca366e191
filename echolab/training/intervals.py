"""How often a run logs, saves and validates.  Imports no torch."""

from echolab.errors import ConfigError


class Intervals:
    """Every how many steps; 0 is never."""

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
        self.snapshot_every = snapshot_every  # keep the averages of optim.posthoc_ema_stds
        self.replica_check_every = replica_check_every  # compare what all ranks should hold

    def keeps_snapshot(self, step: int) -> bool:
        """Return whether the power averages of the checkpoint of this step stay."""
        return self.due(self.snapshot_every, step)

    @staticmethod
    def due(every: int, step: int) -> bool:
        """Return whether `step` is one of every `every` steps."""
        return every > 0 and step % every == 0
