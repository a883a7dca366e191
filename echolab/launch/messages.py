"""The words by which a supervisor ends."""

from pathlib import Path

from echolab.launch.diagnosis import Observation, witness
from echolab.launch.exit_codes import CAUSES
from echolab.launch.launch_records import NodeRecord
from echolab.launch.run_dir import ATTEMPTS

# Those that the user caused: the message says it all.
PLAIN = ("config", "data", "start", "refused", "diverged", "parity")
LOG_LINES = 20


def last_words(run: Path, record: NodeRecord) -> str:
    """One line that names rank, host, cause, section, step and what to do; what it said before."""
    seen = witness(record.rank, record.cause, record.observations)
    if record.cause == "interrupted":
        return "echolab: stopped"
    if seen and seen.failure and record.cause in PLAIN:
        return f"echolab: error: {seen.failure.message}"
    cause = CAUSES[record.cause]
    where = f" in {seen.section} at step {seen.step}" if seen else ""
    if record.rank < 0:
        who = "all ranks"
    else:
        who = f"rank {record.rank}" + (f" ({record.host})" if record.rank in record.ranks else "")
    line = (
        f"echolab: error: {run}: {who}: {cause.says}{where}: {record.detail}; "
        f"{cause.next_action} (echolab why {run})"
    )
    return "\n".join([*_before(run, record, seen), " ".join(line.split())])


def _before(run: Path, record: NodeRecord, seen: Observation | None) -> list[str]:
    """The trace of an exception that is a bug; what a rank without a terminal said last."""
    if seen and seen.failure and record.cause in ("code", "teardown"):
        return [seen.failure.trace.rstrip()]
    log = run / ATTEMPTS / record.launch / f"rank-{record.rank}.log"
    if record.cause not in ("killed", "exited") or not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return [f"rank {record.rank}| {line}" for line in lines]
