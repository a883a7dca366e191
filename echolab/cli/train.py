"""`echolab train`: start the ranks of a run and supervise them.

echolab train [experiment=NAME] [key=value ...]    one run; the same command resumes it
echolab train -m key=a,b,c [launcher=slurm]        a sweep; each member is its own process, or job
echolab train --help                               groups and settings

This process only supervises: torch is imported by the ranks (`train_rank`).
"""

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echolab.cli import sweep
from echolab.config.compose import as_hydra, compose, compose_both, compose_unresolved, quoted
from echolab.config.folders import folders_of, with_absolute_folder, without_folder
from echolab.config.parts import timeouts_from
from echolab.config.sweep_members import members
from echolab.data.download import parse_url
from echolab.errors import BusyError, ConfigError, EcholabError
from echolab.heartbeat import Heartbeat, heartbeat_from_environment
from echolab.launch import exit_codes, processes, rank_process, run_dir, slurm
from echolab.launch.supervisor import Supervisor
from echolab.launch.topology import LAUNCH, cpu_warning, find_topology
from echolab.redaction import mask_output, mask_secrets
from echolab.training.signals import SIGNALS, StopSignals, grace_from

HYDRA_OPTIONS = re.compile(r"(--hydra-help|-c|--cfg|-i|--info|-sc)(=.*)?")
HELP = ("-h", "--help")
SWEEP = ("-m", "--multirun")


def main(argv: list[str]) -> int:
    """Run `echolab train`; return an exit code of `launch.exit_codes`."""
    # Handle help and Hydra's own options.
    argv = with_absolute_folder(argv)
    if any(word in HELP for word in argv):
        return print_help([word for word in argv if word not in HELP])
    if any(HYDRA_OPTIONS.fullmatch(word) for word in argv):
        return _run_hydra_option(argv)
    # All other words must be settings.
    words = [word for word in argv if word not in SWEEP]
    if options := [word for word in without_folder(words) if word.startswith("-")]:
        raise ConfigError(
            f"train: no option {options[0]}; options are -m, --config-dir, --help and --cfg, and "
            "settings are written key=value"
        )
    if len(words) < len(argv):
        return sweep.run(members(words, compose_both), command, job)
    # This process is a rank, started by a supervisor, or the supervisor itself.
    if LAUNCH in os.environ:
        return rank(argv)
    return supervise(argv, compose(argv)).exit_code


def print_help(words: list[str]) -> int:
    """Print the help of all settings, or of the settings that words without `=` name.

    With overrides the help shows the values of the composed settings as defaults.
    """
    from echolab.config.help import help_of

    wanted = [word for word in words if "=" not in word and not word.startswith("-")]
    overrides = [word for word in without_folder(words) if "=" in word]
    composed = compose_unresolved(words) if overrides else None
    print(help_of(wanted, folders_of(words), composed))
    return exit_codes.DONE


def command(words: list[str]) -> list[str]:
    """Return the command line of `echolab train` with these words."""
    return [sys.executable, "-P", "-m", "echolab.cli", "train", *words]


def supervise(argv: list[str], config: Mapping[str, Any]) -> Supervisor:
    """Start the ranks of this machine and wait for their end.

    Raise ConfigError, BusyError, DataError, CheckpointError or WeightsError, before anything is
    written, if the run folder cannot be used, or if a path or a device does not exist.
    """
    from echolab.config.paths import check_gpus, check_paths

    if url := parse_url(config["run_dir"]):
        raise ConfigError(
            f"run_dir={mask_secrets(url)}: a run's folder lies on a disk; give a path"
        )
    # The first node's supervisor checks the folder and the paths.
    folder, trainer = Path(config["run_dir"]), config["trainer"]
    topology = find_topology(trainer["devices"], trainer["num_nodes"])
    if topology.supervisor == 0:
        run_dir.check_run_folder(folder)
        check_paths(config)
    check_gpus(trainer)
    if warning := cpu_warning(topology, int(config["data"]["num_workers"])):
        print(warning, file=sys.stderr, flush=True)
    # The ranks compose the settings again: pass the resolved run_dir, which may contain the time.
    words = [*argv, f"run_dir={quoted(config['run_dir'])}"]
    # Supervise the ranks until the last has ended.
    timeouts = timeouts_from(config["timeouts"])
    grace = grace_from(config["signal_grace_seconds"])
    supervisor = Supervisor(topology, command(words), folder, timeouts, grace)
    supervisor.watch()
    return supervisor


def rank(argv: list[str]) -> int:
    """Train as one rank of a launch.

    The supervisor started this process with signals blocked; `StopSignals` records them for the
    first step sync.  After an exception the process writes an error file and ends at once, so that
    no collective or destructor can hang during a normal exit.
    """
    heartbeat = heartbeat_from_environment()
    StopSignals().__enter__()  # until the process ends
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        code = _train(*compose_both(argv), heartbeat)
    except BaseException as error:
        _end_at_once(error, heartbeat)
        raise
    heartbeat.enter("teardown")
    return code


def _train(config: Mapping[str, Any], kept: Mapping[str, Any], heartbeat: Heartbeat) -> int:
    from echolab.cli import train_rank  # imports torch, which the supervisor must not

    # Record the end before waiting for the tracker.
    result = train_rank.train(
        config, heartbeat, lambda error: _end_at_once(error, heartbeat), _record_end, kept
    )
    return train_rank.exit_code(result, Path(config["run_dir"]))


def _record_end(result: Any) -> None:
    # Without a supervisor no process reads the end file.
    if folder := rank_process.local_folder():
        end = rank_process.End(
            result.reason, result.stopped_by, result.unsaved, result.step, result.steps
        )
        rank_process.write_end_file(folder, run_dir.rank_from_environment(), end)


def _end_at_once(error: BaseException, heartbeat: Heartbeat) -> None:
    """Record an exception and end this process, if a supervisor started it."""
    folder = rank_process.local_folder()
    if folder is None:
        return
    # The supervisor reads the cause from this file.
    code = rank_process.write_error_file(
        folder, run_dir.rank_from_environment(), error, heartbeat.section, heartbeat.step
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_hydra_option(argv: list[str]) -> int:
    """Let Hydra handle --cfg; raise ConfigError for settings that Hydra would refuse."""
    import hydra

    compose_unresolved(argv)
    folder = str(folders_of(argv)[0])
    before, sys.argv = sys.argv, ["echolab train", *as_hydra(argv)]
    try:
        hydra.main(version_base="1.3", config_path=folder, config_name="train")(
            _refuse_hydra_option
        )()
    finally:
        sys.argv = before
    return exit_codes.DONE


def _refuse_hydra_option(config: object) -> None:
    raise ConfigError("train: of Hydra's options -m, --help and --cfg alone are for training")


def job(words: list[str]) -> None:
    """Train one member of a sweep, in its Slurm job, as the supervisor of this task's ranks.

    Requeue the job after a stop that the user did not request: a signal other than SIGTERM and
    SIGINT, the time limit, or host memory.  Otherwise exit with the supervisor's exit code.
    """
    supervisor = None
    with processes.SignalRelay() as relay, mask_output():
        try:
            config = compose(words)
            if not relay.received:
                supervisor = supervise(words, config)
        except EcholabError as error:
            print(f"echolab: error: {error}", file=sys.stderr, flush=True)
            busy = isinstance(error, BusyError)
            raise SystemExit(exit_codes.RETRYABLE if busy else exit_codes.FATAL) from error
    # scancel sends SIGTERM, Ctrl-C sends SIGINT: the user requested the stop.
    stop_signal = supervisor.stop_signal if supervisor else relay.received[0]
    code = supervisor.exit_code if supervisor else exit_codes.STOPPED_SAVED
    cause = exit_codes.CAUSES[supervisor.record.cause if supervisor else "preempted"]
    if cause.budget == "preemption" and stop_signal not in (signal.SIGTERM, signal.SIGINT):
        slurm.requeue_this_job()
    if code:
        raise SystemExit(code)
