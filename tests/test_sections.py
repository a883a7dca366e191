"""Sections are measured, and told to another process while this one is busy or blocked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echolab.heartbeat import (
    FOLDER,
    SECTIONS,
    SIZE,
    Beats,
    beats_from_environment,
    beats_path,
    read_beat,
    stacks_path,
)

WRITER = """
from echolab.heartbeat import SECTIONS, beats_from_environment
beats = beats_from_environment()
print("ready", flush=True)
while True:
    beats.enter(SECTIONS[beats.switches % len(SECTIONS)], beats.switches)
"""
BLOCKED = """
import sys
from echolab.heartbeat import beats_from_environment
beats = beats_from_environment()
beats.enter("data_wait", 7)
def read_for_ever():
    sys.stdin.buffer.raw.read(1)
print("ready", flush=True)
read_for_ever()
"""


def start(program: str, folder: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, FOLDER: str(folder), "RANK": "3"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    return process


def test_every_second_belongs_to_a_section() -> None:
    begun, beats = time.monotonic(), Beats(None)
    for section in ("data_wait", "forward", "backward", "forward", "pause"):
        time.sleep(0.01)
        beats.enter(section, 4)
    # the present stay is not in it
    assert sum(beats.seconds.values()) == pytest.approx(beats.since - begun, abs=1e-3)
    assert beats.seconds["forward"] >= 0.02 and 0.01 <= beats.longest["forward"] < 0.02 + 1
    assert beats.seconds["forward"] >= beats.longest["forward"]
    assert (
        beats.seconds["vote"] == 0 and beats.switches == 5 and set(beats.seconds) == set(SECTIONS)
    )
    with pytest.raises(ValueError, match="no section 'train'"):
        beats.enter("train")
    assert beats.section == "pause"


def test_what_was_told_is_read(tmp_path: Path) -> None:
    path = beats_path(tmp_path, 0)
    assert read_beat(path) is None
    path.write_bytes(bytes(SIZE))
    assert read_beat(path) is None
    beats = Beats(path)
    told = read_beat(path)
    assert told and (told.section, told.step, told.first, told.switches) == ("init", 0, -1, 0)
    beats.enter("data_wait", 12)
    beats.enter("forward")
    beats.enter("vote", 13)
    told = read_beat(path)
    assert told and (told.section, told.step, told.first, told.switches) == ("vote", 13, 12, 3)
    assert told.since == beats.since
    assert told.seconds == beats.seconds and told.longest == beats.longest


def test_a_reader_never_sees_half_a_word(tmp_path: Path) -> None:
    """The writer's section and step follow from its count; what is read must fit, each time."""
    process, seen = start(WRITER, tmp_path), set()
    try:
        for _ in range(20_000):
            told = read_beat(beats_path(tmp_path, 3))
            assert told
            if told.switches:
                assert told.section == SECTIONS[(told.switches - 1) % len(SECTIONS)]
                assert told.step == told.switches - 1
            seen.add(told.switches)
    finally:
        process.kill()
        process.wait()
    assert len(seen) > 100


def test_stacks_come_from_a_process_that_is_blocked_in_c(tmp_path: Path) -> None:
    process = start(BLOCKED, tmp_path)
    try:
        end = time.monotonic() + 20
        while "read_for_ever" not in (told := stacks_path(tmp_path, 3).read_text()):
            assert time.monotonic() < end, told
            process.send_signal(signal.SIGQUIT)
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    beat = read_beat(beats_path(tmp_path, 3))
    assert beat and (beat.section, beat.step) == ("data_wait", 7)


def test_without_a_supervisor_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    beats = beats_from_environment()
    beats.enter("forward")
    assert beats.section == "forward"
