"""Sections of a step are timed, and readable by another process while this one is busy or
blocked.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echolab.heartbeat import (
    LOCAL_DIR,
    SECTIONS,
    SIZE,
    Heartbeat,
    heartbeat_from_environment,
    heartbeat_path,
    read_heartbeat,
    stacks_path,
)

WRITER = """
from echolab.heartbeat import SECTIONS, heartbeat_from_environment
heartbeat = heartbeat_from_environment()
print("ready", flush=True)
while True:
    heartbeat.enter(SECTIONS[heartbeat.switches % len(SECTIONS)], heartbeat.switches)
"""
BLOCKED = """
import sys
from echolab.heartbeat import heartbeat_from_environment
heartbeat = heartbeat_from_environment()
heartbeat.enter("data_wait", 7)
def read_for_ever():
    sys.stdin.buffer.raw.read(1)
print("ready", flush=True)
read_for_ever()
"""


def start(program: str, folder: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, LOCAL_DIR: str(folder), "RANK": "3"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    return process


def test_every_second_belongs_to_a_section() -> None:
    begun, heartbeat = time.monotonic(), Heartbeat(None)
    for section in ("data_wait", "forward", "backward", "forward", "pause"):
        time.sleep(0.01)
        heartbeat.enter(section, 4)
    # the present stay is not in it
    assert sum(heartbeat.seconds.values()) == pytest.approx(heartbeat.since - begun, abs=1e-3)
    assert heartbeat.seconds["forward"] >= 0.02 and 0.01 <= heartbeat.longest["forward"] < 0.02 + 1
    assert heartbeat.seconds["forward"] >= heartbeat.longest["forward"]
    assert (
        heartbeat.seconds["vote"] == 0
        and heartbeat.switches == 5
        and set(heartbeat.seconds) == set(SECTIONS)
    )
    with pytest.raises(ValueError, match="no section 'train'"):
        heartbeat.enter("train")
    assert heartbeat.section == "pause"


def test_a_written_heartbeat_is_read(tmp_path: Path) -> None:
    path = heartbeat_path(tmp_path, 0)
    assert read_heartbeat(path) is None
    path.write_bytes(bytes(SIZE))
    assert read_heartbeat(path) is None
    heartbeat = Heartbeat(path)
    beat = read_heartbeat(path)
    assert beat and (beat.section, beat.step, beat.first_step, beat.switches) == ("init", 0, -1, 0)
    heartbeat.enter("data_wait", 12)
    heartbeat.enter("forward")
    heartbeat.enter("vote", 13)
    beat = read_heartbeat(path)
    assert beat and (beat.section, beat.step, beat.first_step, beat.switches) == ("vote", 13, 12, 3)
    assert beat.since == heartbeat.since
    assert beat.seconds == heartbeat.seconds and beat.longest == heartbeat.longest


def test_a_reader_never_sees_a_partial_heartbeat(tmp_path: Path) -> None:
    """The writer's section and step follow from its count, so that each read can be checked."""
    process, seen = start(WRITER, tmp_path), set()
    reads, end = 0, time.monotonic() + 60
    try:
        while reads < 20_000 or (len(seen) <= 100 and time.monotonic() < end):
            reads += 1
            beat = read_heartbeat(heartbeat_path(tmp_path, 3))
            assert beat
            if beat.switches:
                assert beat.section == SECTIONS[(beat.switches - 1) % len(SECTIONS)]
                assert beat.step == beat.switches - 1
            seen.add(beat.switches)
    finally:
        process.kill()
        process.wait()
    assert len(seen) > 100


def test_stacks_come_from_a_process_that_is_blocked_in_c(tmp_path: Path) -> None:
    process = start(BLOCKED, tmp_path)
    try:
        end = time.monotonic() + 20
        while "read_for_ever" not in (stacks := stacks_path(tmp_path, 3).read_text()):
            assert time.monotonic() < end, stacks
            process.send_signal(signal.SIGQUIT)
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    beat = read_heartbeat(heartbeat_path(tmp_path, 3))
    assert beat and (beat.section, beat.step) == ("data_wait", 7)


def test_without_a_supervisor_no_heartbeat_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCAL_DIR, raising=False)
    heartbeat = heartbeat_from_environment()
    heartbeat.enter("forward")
    assert heartbeat.section == "forward"
