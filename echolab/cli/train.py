"""`echolab train`: Hydra's settings to plain values, plain values to one call of `fit`.

echolab train [experiment=NAME] [key=value ...]    one run; the same command goes on with it
echolab train -m key=a,b,c [launcher=slurm]        a sweep; each member is its own process
echolab train --help                               groups and settings
"""

import hashlib
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echolab.cli.training_objects import training_from
from echolab.data.progress import progress
from echolab.errors import ConfigError
from echolab.launch import exit_codes, local, runs
from echolab.tracking.metrics import MetricsLog
from echolab.tracking.wandb_run import WandbRun
from echolab.training.fit import FitResult, fit

CONF = Path(__file__).resolve().parents[2] / "conf"
HYDRAS = re.compile(r"(-m|--multirun|-h|--help|--hydra-help|-c|--cfg|-i|--info|-sc)(=.*)?")


def main(argv: list[str]) -> int:
    """Train; the exit codes are those of `launch.exit_codes`."""
    if any(HYDRAS.fullmatch(word) for word in argv):
        return _with_hydra(argv)
    config = compose(argv)
    trainer = config["trainer"]
    if trainer["devices"] > 1 and trainer["nodes"] == 1 and not local.started_by_launcher():
        command = [sys.executable, "-m", "echolab.cli", "train", *argv]
        return local.run_ranks(command, trainer["devices"])
    return exit_code(train(config), Path(config["run"]))


def compose(overrides: list[str]) -> dict[str, Any]:
    """The resolved settings as plain values; ConfigError, in one line, for what Hydra refuses."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose("train", overrides)
            plain: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
                config, resolve=True, throw_on_missing=True
            )
    except (HydraException, OmegaConfBaseException) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{CONF}: {words}; `echolab train --help` lists the settings") from error
    return plain


def _with_hydra(argv: list[str]) -> int:
    """Sweeps, help and completion are Hydra's own."""
    import hydra

    before, sys.argv = sys.argv, ["echolab train", *argv]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(member)()
    finally:
        sys.argv = before
    return exit_codes.DONE


def member(config: Any) -> float:
    """One member of a sweep; its folder is named by what it was told.

    On this machine it is a process of its own, which starts its ranks: Lightning would have every
    rank run the whole sweep again.  In a Slurm job the ranks are there already.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    told = list(HydraConfig.get().overrides.task)
    folder = Path(config.run) / member_name(told)
    if os.environ.get("SLURM_PROCID") is None:
        command = [sys.executable, "-m", "echolab.cli", "train"]
        words = [word for word in told if not word.startswith(("run=", "launcher="))]
        code = local.run_ranks([*command, *words, f"run={folder}"], 1, alone=True)
        if code:
            raise SystemExit(code)
        return float(code)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    result = train({**plain, "run": str(folder)})
    if result.stopped_by:
        # submitit waits for this signal: it queues the member again, which then goes on.
        signal.raise_signal(result.stopped_by)
    return float(exit_code(result, folder))


def member_name(told: list[str]) -> str:
    """A folder's name from a member's overrides, the same whenever it is run again."""
    common = r"(experiment|run|launcher|debug|data\.\w+|trainer|logger|schedule\.epochs)="
    words = sorted(word for word in told if not re.match(common, word))
    name = re.sub(r"[^\w.+-]+", "-", "_".join(words)) or "member"
    if len(name) > 100:  # cut names must still differ
        name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def exit_code(result: FitResult, folder: Path) -> int:
    """Say how the run ended, and which code tells it."""
    first = runs.own_rank() == 0
    if result.done:
        if first:
            print(f"echolab: {folder}: all {result.steps} steps done; newest {result.checkpoint}")
        return exit_codes.DONE
    if first:
        print(
            f"echolab: {folder}: stopped by {signal.Signals(result.stopped_by).name} and saved "
            f"at step {result.step} of {result.steps}; the same command goes on",
            file=sys.stderr,
        )
    return exit_codes.STOPPED_SAVED


def train(config: Mapping[str, Any]) -> FitResult:
    """Train the run of these settings; rank 0 holds its folder and tells metrics."""
    try:
        training = training_from(config, runs.digest(config))
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"a setting is missing or of the wrong kind ({error}); see `echolab train --help`"
        ) from error
    folder = training.folder
    if runs.own_rank() != 0:
        return fit(training)
    with runs.claim(folder, config, may_change=("schedule",)) as run:
        logger = config["logger"]
        wandb_run = WandbRun(
            folder,
            project=logger["project"],
            run_id=run.id,
            name=folder.name,
            config=config,
            mode=logger["mode"],
        )
        metrics = MetricsLog(folder / "metrics.jsonl", run.attempt)

        def log(step: int, values: dict[str, float]) -> None:
            metrics.log(step, values)
            wandb_run.log(step, values)

        try:
            with progress(f"training {folder}", training.schedule.steps) as advance:

                def on_step(step: int, steps: int) -> None:
                    advance(step, "")

                return fit(training._replace(log=log, on_step=on_step))
        finally:
            wandb_run.finish()
