"""Fetch a remote object: whole and right, or a typed error within a deadline.

What breaks is asked for again, after a pause that doubles and is drawn at random, from the byte
where it broke if the server still has the same object, else from the start.
"""

import hashlib
import random
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, NamedTuple, TypeVar

from echolab.data.remote.transport import PLACE, Interrupted, Refused, Reply, ask, shown, silence
from echolab.errors import DataError, StorageError

Result = TypeVar("Result")

LARGEST = 2**31  # bytes of an object of which no size is expected: it is kept in memory
INDEXED = "the object is not the one that was indexed; upload the whole dataset again"

# Pauses must differ between processes, and must not move the seeded generators.
_CHANCE = random.SystemRandom()


class FetchError(DataError):
    """A remote object that could not be had: the network's or server's fault, not a sample's."""


class UnreachableError(FetchError, StorageError):
    """A server or network that did not answer in time; it may later."""


class Patience(NamedTuple):
    """How long to bear with a server."""

    attempts: int = 6
    stall_seconds: float = 30.0  # without a byte
    deadline_seconds: float = 900.0  # for one object, all attempts and pauses together
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 30.0


class Expected(NamedTuple):
    """What an object must be."""

    bytes: int
    sha256: str


class _Watched:
    """A thread that makes blocking calls for another, which can give up on them.

    Not every file system has a timeout, and no name server has.  A call given up on keeps its
    thread until it returns; the thread keeps nobody from ending.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._results.put((True, call()))
            except BaseException as error:
                self._results.put((False, error))

    def call(self, function: Callable[[], Result], seconds: float) -> Result:
        """What `function` gives or raises; Interrupted after `seconds`."""
        self._calls.put(function)
        try:
            good, result = self._results.get(timeout=seconds)
        except Empty:
            raise Interrupted(silence(seconds)) from None
        if not good:
            raise result
        return result

    def end(self, last: Callable[[], Any]) -> None:
        """Let the thread make one more call, for which nobody waits, and end."""
        self._calls.put(last)
        self._calls.put(None)


class _Body:
    """The bytes that have come so far, in a file."""

    count: int
    tag: str | None

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.restart()

    def restart(self) -> None:
        self.file.seek(0)
        self.count, self.tag, self.hash = 0, None, hashlib.sha256()

    def add(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.count += len(data)


def fetch(url: str, file: BinaryIO, expected: Expected | None, patience: Patience) -> None:
    """Write the object at `url` to `file` from its start.

    With `expected` None it is whole if it is as long as the server said.  Raises FetchError, in one
    line that names the address, what was wrong and what to do; UnreachableError where the same
    request may succeed later.
    """
    began = time.monotonic()
    deadline = began + patience.deadline_seconds
    body, last, attempts = _Body(file), Interrupted("no time to ask"), 0
    while attempts < patience.attempts and time.monotonic() < deadline:
        if attempts:
            left = max(0.0, deadline - time.monotonic())
            time.sleep(min(pause(attempts, patience), left))
        attempts += 1
        try:
            _attempt(url, body, expected, patience.stall_seconds, deadline)
            return
        except Refused as error:
            raise FetchError(f"{shown(url)}: {error}; {error.remedy}") from error
        except Interrupted as error:
            last = error
            if error.lost:
                body.restart()
    kind = FetchError if last.remedy is INDEXED else UnreachableError
    raise kind(
        f"{shown(url)}: {last}; gave up after {attempts} attempts and "
        f"{time.monotonic() - began:.3g} s; {last.remedy}"
    ) from last


def _attempt(
    url: str, body: _Body, expected: Expected | None, stall: float, deadline: float
) -> None:
    watched, close = _Watched(), lambda: None

    def seconds() -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Interrupted(f"too slow: {body.count} bytes came in time")
        return min(stall, left)

    try:
        wait = seconds()
        reply = watched.call(lambda: ask(url, body.count, body.tag, wait), wait)
        close = reply.close
        _begin(body, reply, expected)
        limit = _most(reply, expected)
        while body.count < limit and (data := watched.call(reply.read, seconds())):
            body.add(data[: limit - body.count])  # a server may send for ever
        _check(body, reply, expected)
    finally:
        watched.end(close)


def _begin(body: _Body, reply: Reply, expected: Expected | None) -> None:
    """Go on where the last attempt broke, if this is the same object."""
    if reply.start and (reply.start, reply.tag) != (body.count, body.tag):
        what = f"the object changed meanwhile (ETag {body.tag} to {reply.tag})"
        raise Interrupted(what, lost=True)
    if not reply.start:
        body.restart()
    body.tag = reply.tag
    if expected and reply.size not in (None, expected.bytes):
        what = f"{reply.size} bytes are there, dataset.json says {expected.bytes}"
        raise Interrupted(what, remedy=INDEXED, lost=True)


def _most(reply: Reply, expected: Expected | None) -> int:
    """How many bytes are read and kept at most."""
    if expected:
        return expected.bytes
    if reply.size is not None and reply.size > LARGEST:
        raise Refused(f"{reply.size} bytes, at most {LARGEST} are read", PLACE)
    return LARGEST + 1 if reply.size is None else reply.size


def _check(body: _Body, reply: Reply, expected: Expected | None) -> None:
    if body.count > LARGEST and not expected:
        raise Refused(f"does not end after {LARGEST} bytes", PLACE)
    whole = expected.bytes if expected else reply.size
    if whole is not None and body.count < whole:
        raise Interrupted(f"cut at byte {body.count} of {whole}")
    if expected and (found := body.hash.hexdigest()) != expected.sha256:
        what = f"wrong bytes: sha256 {found[:12]}..., dataset.json says {expected.sha256[:12]}..."
        raise Interrupted(what, remedy=INDEXED, lost=True)


def pause(attempt: int, patience: Patience) -> float:
    """Seconds before the next attempt: doubling, and random so that ranks do not come at once."""
    longest = min(
        patience.first_pause_seconds * 2.0 ** (attempt - 1), patience.longest_pause_seconds
    )
    return longest * _CHANCE.uniform(0.5, 1.0)
