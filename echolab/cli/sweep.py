"""Run the members of a sweep one after another, or as Slurm jobs, and report how each ended.

A failed member does not stop the others.  The same command resumes the sweep: members that are
done, pruned or diverged are skipped, the others are started again.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from echolab.config.sweep_members import Member, launcher_of
from echolab.errors import ConfigError, EcholabError
from echolab.launch import exit_codes, slurm
from echolab.launch.attempts import RUNNING, Attempt, attempts_of
from echolab.launch.exit_codes import CAUSES
from echolab.launch.launch_records import newest_checkpoint
from echolab.launch.processes import SignalRelay
from echolab.redaction import mask_secrets

POLL_SECONDS = 5.0  # between two queries of Slurm's queue
RECORD_SECONDS = 15.0  # delay after which a shared file system shows files of other hosts
JOB_FILE = ".job"  # in a member's folder: the id of its pending or running Slurm job
EXTRA_CPUS = 2  # CPUs of a rank in addition to one for each loader worker
# The exit code of a sweep is the first in this list that a member ended with: interrupted, stopped
# (the same command resumes), failed with a retry allowed, failed with a fault to correct.
BY_SEVERITY = (
    exit_codes.INTERRUPTED, exit_codes.STOPPED_UNSAVED, exit_codes.STOPPED_SAVED,
    exit_codes.RETRYABLE, exit_codes.FATAL,
)  # fmt: skip


Launch = tuple[str, float]  # id and start time


class Ended(NamedTuple):
    """The end of a member of a sweep, or the reason why it was not started."""

    member: Member
    code: int  # exit code, see launch.exit_codes
    summary: str

    @property
    def well(self) -> bool:
        """True if the member needs neither a restart nor a correction."""
        return self.code in (exit_codes.DONE, exit_codes.PRUNED)


def run(
    members: Sequence[Member],
    command: Callable[[list[str]], list[str]],
    job: Callable[[list[str]], None],
) -> int:
    """Run all members that are not settled; print how each ended; return an exit code.

    `command` returns the command line for a member's words, `job` trains a member in a Slurm job.
    """
    # Members that are done, pruned or diverged are not started.
    launcher = kind_of_launcher(members)
    ended: dict[str, Ended] = {}
    for member in members:
        if before := settled(member):
            ended[member.name] = before
    todo = [member for member in members if member.name not in ended]
    # Start the other members on this machine, or as jobs.
    if launcher == "local":
        finished = run_locally(todo, command)
    else:
        refuse_secrets(todo)
        parameters = {m.name: slurm_parameters(m.config, launcher_of(m.overrides)) for m in todo}
        finished = in_slurm(todo, parameters, job)
    for result in finished:
        print(f"echolab: {result.member.name}: {result.summary}", flush=True)
        ended[result.member.name] = result
    return report([ended[member.name] for member in members])


def kind_of_launcher(members: Sequence[Member]) -> str:
    """Return local or slurm; raise ConfigError if members differ, or for other Hydra launchers."""
    kinds = {str(member.config["launcher"]["kind"]) for member in members}
    # hydra/launcher must match the group `launcher`.
    plugin = str(launcher_of(members[0].overrides)["_target_"]).rpartition(".")[2]
    kind = {"BasicLauncher": "local", "SlurmLauncher": "slurm"}.get(plugin, plugin)
    if kinds != {kind}:
        raise ConfigError(
            f"launcher={', '.join(sorted(kinds))} with {plugin}: give launcher=local or "
            "launcher=slurm for all members, and no hydra/launcher"
        )
    return kind


def refuse_secrets(members: Sequence[Member]) -> None:
    """Raise ConfigError if a member's words hold a secret, since Slurm would store it in files."""
    for member in members:
        for word in member.words:
            if mask_secrets(word) != word:
                raise ConfigError(
                    f"{mask_secrets(word)}: Slurm would keep its secret in files; put it into a "
                    "variable and write ${oc.env:NAME} in its place"
                )


def report(ended: Sequence[Ended]) -> int:
    """Print a table of all members, failed members last; return the sweep's exit code."""
    # Failed members are printed last, so that they remain visible in the terminal.
    rows = sorted(
        ended, key=lambda result: -1 if result.well else BY_SEVERITY.index(code_of(result))
    )
    width = max(len(result.member.name) for result in rows)
    print(f"echolab: a sweep of {len(rows)}:")
    for result in rows:
        print(f"  {result.member.name:<{width}}  {result.summary}  {result.member.folder}")
    bad = [result for result in rows if not result.well]
    sys.stdout.flush()
    if bad:
        print(
            f"echolab: error: {len(bad)} of {len(rows)} members are not done: "
            f"{', '.join(result.member.name for result in bad)}; "
            "`echolab why FOLDER` says why, the same command retries those that may succeed",
            file=sys.stderr,
        )
    codes = {code_of(result) for result in bad}
    return next((code for code in BY_SEVERITY if code in codes), exit_codes.DONE)


def code_of(ended: Ended) -> int:
    """Return a member's exit code, or RETRYABLE for a code that is not in BY_SEVERITY."""
    return ended.code if ended.code in BY_SEVERITY else exit_codes.RETRYABLE


# -- how a member ended ---------------------------------------------------------------------------


def settled(member: Member) -> Ended | None:
    """Return how a member ended if it need not be started again, else None."""
    attempts = known_attempts(member.folder)
    if not attempts or attempts[-1].cause not in ("done", "pruned", "diverged"):
        return None
    last = attempts[-1]
    if newest_checkpoint(member.folder) != last.checkpoint:
        return None
    # A run that diverged can continue if it was rolled back since.
    if last.cause == "diverged" and rolled_back(member.folder, last):
        return None
    ended = ended_with(member, last)
    return ended._replace(summary=f"{ended.summary} (not started again)")


def rolled_back(folder: Path, last: Attempt) -> bool:
    """Return whether `echolab rollback` changed a run after its last attempt."""
    from echolab.training.guards import events  # and torch

    return any(e.kind == "rollback" and e.time > last.ended for e in events.read(folder))


def known_attempts(folder: Path, *, over: bool = False) -> list[Attempt]:
    """Return the attempts of a run; empty if their records cannot be read."""
    try:
        return attempts_of(folder, assume_ended=over)
    except EcholabError:
        return []


def ended_with(member: Member, last: Attempt) -> Ended:
    """Return how the last attempt of a member ended."""
    code = last.exit_code if last.exit_code >= 0 else CAUSES[last.cause].exit_code
    step = f" at step {last.step}" if last.step > 0 and last.cause != "done" else ""
    return Ended(member, code, f"{last.cause}: {CAUSES[last.cause].summary}{step}")


def ended_since(
    member: Member, launches: set[Launch], otherwise: Ended, seconds: float = 0.0
) -> Ended:
    """Return how a member ended in a launch that is not among `launches`.

    Wait up to `seconds` for its record; return `otherwise` if there is no such launch.
    """
    end = time.monotonic() + seconds
    while True:
        over = time.monotonic() >= end
        new = [a for a in known_attempts(member.folder, over=over) if launch_of(a) not in launches]
        if new and new[-1].cause != RUNNING:
            return ended_with(member, new[-1])
        if over:
            return otherwise
        time.sleep(1.0)


def launch_of(attempt: Attempt) -> Launch:
    """Return id and start time of an attempt, since two starts in one job step share the id."""
    return attempt.launch, attempt.started


def launches_of(member: Member) -> set[Launch]:
    """Return the launches of a member so far."""
    return {launch_of(attempt) for attempt in known_attempts(member.folder)}


# -- on this machine ------------------------------------------------------------------------------


def run_locally(
    todo: Sequence[Member], command: Callable[[list[str]], list[str]]
) -> Iterator[Ended]:
    """Run the members one after another; forward a signal to the running one, start no more."""
    with SignalRelay() as relay:
        for member in todo:
            if relay.received:
                yield Ended(member, exit_codes.STOPPED_SAVED, "not started")
                continue
            print(f"echolab: {member.name}: starts in {member.folder}", flush=True)
            launches = launches_of(member)
            code = relay.run(command(member.words))
            otherwise = Ended(member, code, f"ended with {code} before it began")
            if relay.received and code:
                otherwise = Ended(member, exit_codes.STOPPED_SAVED, "stopped before it began")
            yield ended_since(member, launches, otherwise)


# -- in Slurm -------------------------------------------------------------------------------------


def slurm_parameters(config: Mapping[str, Any], launcher: Mapping[str, Any]) -> dict[str, Any]:
    """Return hydra.launcher with the GPUs and CPUs that a member's ranks need.

    Values of the user are kept; gpus_per_node=0 requests no GPU.
    """
    filled = {key: value for key, value in launcher.items() if key != "_target_"}
    # Fill in the GPUs and CPUs that the user did not set.
    trainer = config["trainer"]
    devices = int(trainer["devices"])
    more = {str(key).replace("-", "_") for key in filled.get("additional_parameters") or {}}
    given = more | {key for key, value in filled.items() if value is not None}
    if trainer["accelerator"] in ("gpu", "cuda") and not given & {
        "gpus_per_node", "gpus_per_task", "gres", "gpus",
    }:  # fmt: skip
        filled["gpus_per_node"] = devices
    if not given & {"cpus_per_task", "cpus_per_gpu"}:
        ranks = max(1, devices // int(filled["tasks_per_node"]))  # started by one task
        filled["cpus_per_task"] = ranks * (int(config["data"]["num_workers"]) + EXTRA_CPUS)
    if filled.get("gpus_per_node") == 0:
        filled["gpus_per_node"] = None
    return filled


def in_slurm(
    todo: Sequence[Member],
    parameters: Mapping[str, Mapping[str, Any]],
    job: Callable[[list[str]], None],
) -> Iterator[Ended]:
    """Run the members as job arrays, one per set of resources; wait until all have ended.

    Jobs that an earlier start of the sweep queued are not queued again.  The first Ctrl-C or
    SIGTERM stops all jobs, which save; after the second one the sweep no longer waits for them.
    """
    with SignalRelay() as relay:
        # Adopt the jobs that an earlier start of the sweep queued.
        jobs = {number: member for member in todo if (number := job_of(member))}
        known = slurm.job_states(list(jobs)) or {}
        jobs = {number: member for number, member in jobs.items() if number in known}
        new = [member for member in todo if member not in jobs.values()]
        launches = {member.name: launches_of(member) for member in new}
        jobs |= submitted(new, parameters, job)
        stopped: set[str] = set()
        while jobs:
            pause(relay, bool(stopped))
            if stopped and len(relay.received) > 1:
                break
            alive = slurm.job_states(list(jobs))
            if alive is None:
                continue
            if relay.received:
                stopped |= slurm.stop_jobs(alive, stopped)
            for number in set(jobs) - set(alive):
                member = jobs.pop(number)
                before, own = launches.get(member.name, set()), parameters[member.name]
                yield ended_in_job(member, number, before, own, stopped=bool(relay.received))
        for number, member in jobs.items():
            yield Ended(member, exit_codes.STOPPED_UNSAVED, f"left in job {number}")


def ended_in_job(
    member: Member, job: str, launches: set[Launch], parameters: Mapping[str, Any], *, stopped: bool
) -> Ended:
    """Return how a member ended, after its job has left the queue."""
    (member.folder / JOB_FILE).unlink(missing_ok=True)
    log = slurm.log_path(str(parameters["submitit_folder"]), job)
    summary = f"job {job} ended before it trained; see {log}"
    otherwise = Ended(member, exit_codes.RETRYABLE, summary)
    if stopped:
        otherwise = Ended(member, exit_codes.STOPPED_SAVED, "not started")
    elif (known := slurm.job_of(job)) and known.exit_code == exit_codes.FATAL:
        # The supervisor refused the settings before it took the run folder.
        otherwise = Ended(member, exit_codes.FATAL, f"config: refused in job {job}; see {log}")
    return ended_since(member, launches, otherwise, RECORD_SECONDS)


def submitted(
    todo: Sequence[Member],
    parameters: Mapping[str, Mapping[str, Any]],
    job: Callable[[list[str]], None],
) -> dict[str, Member]:
    """Queue the members, store the job ids in their folders, and return the members by job id."""
    # Members that ask for the same resources share a job array.
    groups: dict[str, list[Member]] = {}
    for member in todo:
        groups.setdefault(json.dumps(parameters[member.name], sort_keys=True), []).append(member)
    jobs: dict[str, Member] = {}
    for group in groups.values():
        own = parameters[group[0].name]
        numbers = slurm.submit(job, [member.words for member in group], own)
        for number, member in zip(numbers, group, strict=True):
            jobs[number] = member
            member.folder.mkdir(parents=True, exist_ok=True)
            (member.folder / JOB_FILE).write_text(number)
            print(f"echolab: {member.name}: job {number}, in {member.folder}", flush=True)
    return jobs


def job_of(member: Member) -> str:
    """Return the id of the job that an earlier start queued for a member; "" if none."""
    try:
        return (member.folder / JOB_FILE).read_text().strip()
    except OSError:
        return ""


def pause(relay: SignalRelay, stopping: bool) -> None:
    """Wait for POLL_SECONDS, or until a signal that was not handled yet."""
    end = time.monotonic() + POLL_SECONDS
    while time.monotonic() < end and len(relay.received) == int(stopping):
        time.sleep(0.2)
