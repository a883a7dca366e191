"""`echolab train`: starts the ranks of a run and watches them; Hydra's settings to plain values.

echolab train [experiment=NAME] [key=value ...]    one run; the same command goes on with it
echolab train -m key=a,b,c [launcher=slurm]        a sweep; each member is its own process
echolab train --help                               groups and settings

This process only supervises: torch is imported by the ranks (`train_rank`).
"""

import hashlib
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echolab.data.transport import url_of
from echolab.errors import ConfigError, EcholabError
from echolab.launch import exit_codes, local, runs, told
from echolab.launch.deadlines import Deadlines
from echolab.launch.layout import LAUNCH, layout
from echolab.launch.supervisor import Supervisor
from echolab.redaction import masked
from echolab.training.sections import Beats, beats_from_environment
from echolab.training.stopping import SIGNALS, StopSignals

CONF = Path(__file__).resolve().parents[2] / "conf"
HYDRAS = re.compile(r"(-m|--multirun|-h|--help|--hydra-help|-c|--cfg|-i|--info|-sc)(=.*)?")


def main(argv: list[str]) -> int:
    """Train; the exit codes are those of `launch.exit_codes`."""
    if any(HYDRAS.fullmatch(word) for word in argv):
        return _with_hydra(argv)
    if LAUNCH in os.environ:
        return rank(argv)
    return supervise(argv, compose(argv)).code


def compose(overrides: list[str]) -> dict[str, Any]:
    """The resolved settings as plain values; ConfigError, in one line, for what Hydra refuses."""
    return compose_both(overrides)[0]


def compose_both(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resolved settings, and the same without secrets, as the run's folder keeps them."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from echolab.cli.stored_settings import stored

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose("train", overrides)
            plain: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
                config, resolve=True, throw_on_missing=True
            )
            kept = stored(config)
    except (HydraException, OmegaConfBaseException) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{CONF}: {words}; `echolab train --help` lists the settings") from error
    return plain, kept


def supervise(argv: list[str], config: Mapping[str, Any]) -> Supervisor:
    """Start the ranks of this machine and wait for their end, which the supervisor then tells.

    Raises ConfigError before anything is written where the run's folder cannot be taken.
    """
    if url := url_of(config["run"]):
        raise ConfigError(f"run={masked(url)}: a run's folder lies on a disk; give a path")
    folder, trainer, told_of = Path(config["run"]), config["trainer"], dict(config["supervise"])
    told_of.pop("infrastructure")
    try:
        deadlines = Deadlines(**{key: float(value) for key, value in told_of.items()}).check()
        places = layout(int(trainer["devices"]), int(trainer["nodes"]))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"supervise, trainer.devices or trainer.nodes is of the wrong kind ({error}); "
            "see `echolab train --help`"
        ) from error
    if places.supervisor == 0:
        runs.check_free(folder)
    supervisor = Supervisor(
        places, [sys.executable, "-P", "-m", "echolab.cli", "train", *argv], folder, deadlines
    )
    supervisor.watch()
    return supervisor


def rank(argv: list[str]) -> int:
    """Train as one rank of a launch.

    The supervisor started it with signals blocked: from here on they are kept for the first vote.
    An exception is told in a file, and the process ends there: nothing that an exit would run, no
    collective and no destructor, can hang.
    """
    beats = beats_from_environment()
    StopSignals().__enter__()  # to the end of the process: nothing is left to stop after training
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        code = _trained(*compose_both(argv), beats)
    except BaseException as error:
        _end_at_once(error, beats)
        raise
    beats.enter("teardown")
    return code


def _trained(config: Mapping[str, Any], kept: Mapping[str, Any], beats: Beats) -> int:
    from echolab.cli import train_rank  # and torch, which the supervisor does without

    result = train_rank.train(config, beats, lambda error: _end_at_once(error, beats), kept)
    if folder := told.own_folder():
        end = told.End(result.reason, result.stopped_by, result.unsaved, result.step, result.steps)
        told.tell_end(folder, runs.own_rank(), end)
    return train_rank.exit_code(result, Path(config["run"]))


def _end_at_once(error: BaseException, beats: Beats) -> None:
    """Tell of an exception and end this process, where a supervisor started it."""
    folder = told.own_folder()
    if folder is None:
        return
    code = told.tell_failure(folder, runs.own_rank(), error, beats.section, beats.step)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _with_hydra(argv: list[str]) -> int:
    """Sweeps, help and completion are Hydra's own."""
    import hydra

    shown = [word for word in argv if masked(word) != word]
    if "launcher=slurm" in argv and shown:
        raise ConfigError(
            f"{masked(shown[0])}: Slurm would keep its secret in files; put it into a variable and "
            "write ${oc.env:NAME} in its place"
        )
    before, sys.argv = sys.argv, ["echolab train", *argv]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(member)()
    finally:
        sys.argv = before
    return exit_codes.DONE


def member(config: Any) -> float:
    """One member of a sweep; its folder is named by what it was told.

    On this machine it is a process of its own.  In a Slurm job it is here, with its supervisor.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    told_words = list(HydraConfig.get().overrides.task)
    folder = Path(config.run) / member_name(told_words)
    words = [word for word in told_words if not word.startswith(("run=", "launcher="))]
    words.append(f"run={folder}")
    if os.environ.get("SLURM_PROCID") is None:
        code = local.run_ranks(
            [sys.executable, "-P", "-m", "echolab.cli", "train", *words], 1, alone=True
        )
        if code:
            raise SystemExit(code)
        return float(code)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    supervisor = supervise(words, {**plain, "run": str(folder)})
    if not told.expected(supervisor.code):
        raise EcholabError(
            f"{folder}: ended with {supervisor.code}; `echolab why {folder}` says why"
        )
    if supervisor.code and supervisor.asked:
        # submitit waits for this signal: it queues the member again, which then goes on.
        signal.raise_signal(supervisor.asked)
    return float(supervisor.code)


def member_name(told: list[str]) -> str:
    """A folder's name from a member's overrides, the same whenever it is run again."""
    common = r"(experiment|run|launcher|debug|data\.\w+|trainer|logger|schedule\.epochs)="
    words = sorted(word for word in told if not re.match(common, word))
    name = re.sub(r"[^\w.+-]+", "-", "_".join(words)) or "member"
    if len(name) > 100:  # cut names must still differ
        name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name
