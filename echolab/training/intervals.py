"""How often a run logs, saves and validates.  Imports no torch."""

from echolab.errors import ConfigError


class Intervals:
    """Every how many steps; 0 is never."""

    def __init__(
        self,
        log: int = 10,
        save: int = 500,
        validate: int = 0,
        replicas: int = 100,
        snapshot: int = 0,
    ) -> None:
        if snapshot and (not save or snapshot % save):
            raise ConfigError(
                f"snapshot_every={snapshot}: must be a multiple of save_every={save}; change either"
            )
        self.log, self.save, self.validate = log, save, validate
        self.snapshot = snapshot  # keep the averages of optim.posthoc_ema_stds
        self.replicas = replicas  # compare what all ranks should hold

    def keeps_snapshot(self, step: int) -> bool:
        """Return whether the power averages of the checkpoint of this step stay."""
        return self.due(self.snapshot, step)

    @staticmethod
    def due(every: int, step: int) -> bool:
        """Return whether `step` is one of every `every` steps."""
        return every > 0 and step % every == 0
