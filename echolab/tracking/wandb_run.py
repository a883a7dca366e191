"""One run on Weights & Biases, mirrored from what the run folder holds; offline unless logged in.

Only plain scalars, mp4 files and tables are sent: no source code, command line, environment,
machine description or console output.  https://docs.wandb.ai/ref/python/
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb

from echolab.errors import ConfigError, MediaError
from echolab.redaction import masked, masked_values

STEP = "trainer/step"

Mode = Literal["auto", "offline", "online", "disabled"]
MODES = ("auto", "offline", "online", "disabled")
Cell = str | int | float | bool | None


class WandbRun:
    """A wandb run whose id is the caller's, so that every attempt of a run goes on in it.

    Records lie in `folder`/wandb.  wandb's own step only counts calls; curves are drawn over
    `trainer/step`, since wandb drops whatever goes back in its own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        run_id: str,
        name: str,
        config: Mapping[str, Any],
        mode: Mode = "auto",
    ) -> None:
        """`auto` follows WANDB_MODE, else is online when the user is logged in, else offline.

        Raises ConfigError for an unknown mode or an id that wandb would refuse.
        """
        if mode not in MODES:
            raise ConfigError(f"wandb mode {mode!r} is not one of {', '.join(MODES)}")
        if not re.fullmatch(r"[\w-]{1,64}", run_id):
            raise ConfigError(f"wandb run id {run_id!r}: use up to 64 letters, digits, - and _")
        self.mode = _chosen(mode)
        self._run: Any = None
        if self.mode != "disabled":
            folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=masked(project),
                id=run_id,
                name=masked(name),
                config=masked_values(config),
                dir=str(folder),
                mode=self.mode,
                # offline, wandb takes the id as it is, and warns if it is told to resume
                resume="allow" if self.mode == "online" else None,
                reinit="create_new",
                settings=_settings(),
            )
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars at a step of the optimiser."""
        if self._run is not None:
            self._run.log({STEP: step, **scalars})

    def log_videos(self, step: int, videos: Mapping[str, Path]) -> None:
        """Upload mp4 files, with their sound, by name.  Raises MediaError if one is not there."""
        for path in videos.values():
            if path.suffix != ".mp4" or not path.is_file():
                raise MediaError(f"{path}: not an mp4 file that exists; wandb takes no other video")
        if self._run is not None and videos:
            # wandb.Video turns arrays into video by moviepy, but takes mp4 files as they are
            media = {key: wandb.Video(str(path), format="mp4") for key, path in videos.items()}
            self._run.log({STEP: step, **media})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table, such as the scores of several checkpoints."""
        if self._run is not None:
            table = wandb.Table(columns=list(columns), data=masked_values(rows))
            self._run.log({name: table})

    def finish(self) -> None:
        """End the run; a second call does nothing.

        wandb's service may still be writing the offline file for some 20 ms after this returns;
        the end of the process waits for it.
        """
        if self._run is not None:
            self._run.finish()
            self._run = None


def _chosen(mode: Mode) -> Literal["offline", "online", "disabled"]:
    if mode != "auto":
        return mode
    # mode= in code would beat WANDB_MODE, so the variable is read here
    match os.environ.get("WANDB_MODE"):
        case ("offline" | "online" | "disabled") as wanted:
            return wanted
    return "online" if wandb.api.api_key else "offline"


def _settings() -> wandb.Settings:
    return wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,  # holds the command line
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
