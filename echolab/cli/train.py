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

from echolab.cli.settings_check import check, missing, names, no_such_setting
from echolab.data.transport import url_of
from echolab.errors import ConfigError, EcholabError
from echolab.launch import exit_codes, local, runs, told
from echolab.launch.deadlines import Deadlines
from echolab.launch.layout import LAUNCH, cpu_warning, layout
from echolab.launch.supervisor import Supervisor
from echolab.redaction import masked
from echolab.training.sections import Beats, beats_from_environment
from echolab.training.stopping import SIGNALS, StopSignals

CONF = Path(__file__).resolve().parents[2] / "conf"
# What Hydra raises for overrides that it does not expect, such as data=[1].
HYDRAS_OWN = (TypeError, ValueError, AttributeError, KeyError, AssertionError, RecursionError)
OPTIONAL = ("experiment", "debug")  # groups that may be null
HYDRAS = re.compile(r"(-m|--multirun|-h|--help|--hydra-help|-c|--cfg|-i|--info|-sc)(=.*)?")


def main(argv: list[str]) -> int:
    """Train; the exit codes are those of `launch.exit_codes`."""
    if any(HYDRAS.fullmatch(word) for word in argv):
        return _with_hydra(argv)
    if LAUNCH in os.environ:
        return rank(argv)
    return supervise(argv, compose(argv)).code


def compose(overrides: list[str]) -> dict[str, Any]:
    """Return the resolved and checked settings as plain values.

    Raise ConfigError, in one line, for what Hydra or `settings_check.check` refuses.
    """
    return compose_both(overrides)[0]


def compose_both(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of `compose`, and the same without secrets, for the run's folder."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    from echolab.cli.stored_settings import stored, with_types

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra_compose("train", overrides)
            plain: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
                config, resolve=True, throw_on_missing=True
            )
            kept = stored(config)
    except MissingMandatoryValue as error:
        raise ConfigError(missing(tuple(str(error.full_key).split(".")))) from error
    except (HydraException, OmegaConfBaseException, *HYDRAS_OWN) as error:
        raise ConfigError(_refused_by_hydra(error, overrides)) from error
    checked = check(plain)
    return checked, with_types(kept, plain, checked)


def _refused_by_hydra(error: Exception, overrides: list[str]) -> str:
    """Return Hydra's message on one line; groups and unknown settings get one of ours.

    Hydra advises `+key=value`, which would be refused as well.
    """
    words = " ".join(str(error).split())
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        choices = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
        if key and choices and value not in (*choices, *(["null"] if key in OPTIONAL else [])):
            return f"{key}={value}: must be one of {', '.join(choices)}"
    if match := re.match(r"Could not override '([\w.]+)'", words):
        key = match[1]
        value = next((w.partition("=")[2] for w in overrides if w.startswith(f"{key}=")), "")
        if key not in names():
            return no_such_setting(tuple(key.split(".")), value)
    subject = getattr(error, "override", None) or CONF
    return f"{subject}: {words}; `echolab train --help` lists the settings"


def supervise(argv: list[str], config: Mapping[str, Any]) -> Supervisor:
    """Start the ranks of this machine and wait for their end, which the supervisor then tells.

    Raises ConfigError or BusyError before anything is written where the run's folder cannot be
    taken.
    """
    if url := url_of(config["run"]):
        raise ConfigError(f"run={masked(url)}: a run's folder lies on a disk; give a path")
    folder, trainer, told_of = Path(config["run"]), config["trainer"], dict(config["supervise"])
    told_of.pop("infrastructure")
    places = layout(trainer["devices"], trainer["nodes"])
    if places.supervisor == 0:
        runs.check_ours(folder)
    if warning := cpu_warning(places, int(config["data"]["workers"])):
        print(warning, file=sys.stderr, flush=True)
    supervisor = Supervisor(
        places,
        [sys.executable, "-P", "-m", "echolab.cli", "train", *argv],
        folder,
        Deadlines(**told_of),
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

    result = train_rank.train(
        config, beats, lambda error: _end_at_once(error, beats), _tell_end, kept
    )
    return train_rank.exit_code(result, Path(config["run"]))


def _tell_end(result: Any) -> None:
    if folder := told.own_folder():
        end = told.End(result.reason, result.stopped_by, result.unsaved, result.step, result.steps)
        told.tell_end(folder, runs.own_rank(), end)


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
    supervisor = supervise(words, check({**plain, "run": str(folder)}))
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
