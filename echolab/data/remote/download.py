"""Fetch a remote object completely and verified, or raise a typed error within a deadline.

A broken transfer is retried after a random pause that doubles, from the byte where it broke if the
server still has the same object, else from the start.
"""

import hashlib
import random
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, NamedTuple, TypeVar

from echolab.data.remote.transport import (
    PLACE,
    PermanentError,
    Response,
    TransientError,
    ask,
    public_url,
    silence,
)
from echolab.errors import DataError, StorageError

Result = TypeVar("Result")

MAX_BYTES = 2**31  # of an object whose size is unknown: it is kept in memory
INDEXED = "the object is not the one that was indexed; upload the size dataset again"

# Pauses must differ between processes, and must not advance the seeded generators.
_RANDOM = random.SystemRandom()


class FetchError(DataError):
    """A remote object that could not be fetched: a fault of network or server, not of a sample."""


class UnreachableError(FetchError, StorageError):
    """A server or network that did not answer in time; it may answer later."""


class RetryPolicy(NamedTuple):
    """How often and how long to retry a server."""

    attempts: int = 6
    stall_seconds: float = 30.0  # without a byte
    deadline_seconds: float = 900.0  # for one object, all attempts and pauses together
    first_pause_seconds: float = 0.5
    max_pause_seconds: float = 30.0


class Expected(NamedTuple):
    """The size and checksum that an object must have."""

    bytes: int
    sha256: str


class _CallThread:
    """A thread that makes blocking calls for another thread, which can give up on them.

    Not every file system has a timeout, and no name server has.  An abandoned call keeps its thread
    until it returns; the thread is a daemon, so that the process can end.
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
        """Return or raise as `function` does; raise TransientError after `seconds`."""
        self._calls.put(function)
        try:
            good, result = self._results.get(timeout=seconds)
        except Empty:
            raise TransientError(silence(seconds)) from None
        if not good:
            raise result
        return result

    def end(self, last: Callable[[], Any]) -> None:
        """Make one more call, for which nobody waits, and end the thread."""
        self._calls.put(last)
        self._calls.put(None)


class _Body:
    """The bytes received so far, in a file."""

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


def fetch(url: str, file: BinaryIO, expected: Expected | None, retry_policy: RetryPolicy) -> None:
    """Write the object at `url` to `file` from its start.

    With `expected` None it is complete if it is as long as the server said.  Raises FetchError, in
    one line that names the address, the fault and the remedy; UnreachableError if the same request
    may succeed later.
    """
    began = time.monotonic()
    deadline = began + retry_policy.deadline_seconds
    body, last, attempts = _Body(file), TransientError("no time to ask"), 0
    while attempts < retry_policy.attempts and time.monotonic() < deadline:
        if attempts:
            left = max(0.0, deadline - time.monotonic())
            time.sleep(min(backoff_seconds(attempts, retry_policy), left))
        attempts += 1
        try:
            _attempt(url, body, expected, retry_policy.stall_seconds, deadline)
            return
        except PermanentError as error:
            raise FetchError(f"{public_url(url)}: {error}; {error.remedy}") from error
        except TransientError as error:
            last = error
            if error.lost:
                body.restart()
    kind = FetchError if last.remedy is INDEXED else UnreachableError
    raise kind(
        f"{public_url(url)}: {last}; gave up after {attempts} attempts and "
        f"{time.monotonic() - began:.3g} s; {last.remedy}"
    ) from last


def _attempt(
    url: str, body: _Body, expected: Expected | None, stall: float, deadline: float
) -> None:
    caller, close = _CallThread(), lambda: None

    def seconds() -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TransientError(f"too slow: {body.count} bytes came in time")
        return min(stall, left)

    try:
        wait = seconds()
        response = caller.call(lambda: ask(url, body.count, body.tag, wait), wait)
        close = response.close
        _begin(body, response, expected)
        limit = _size_limit(response, expected)
        while body.count < limit and (data := caller.call(response.read, seconds())):
            body.add(data[: limit - body.count])  # a server may send without end
        _check(body, response, expected)
    finally:
        caller.end(close)


def _begin(body: _Body, response: Response, expected: Expected | None) -> None:
    """Continue where the last attempt broke if this is the same object."""
    if response.start and (response.start, response.tag) != (body.count, body.tag):
        what = f"the object changed (ETag {body.tag} to {response.tag})"
        raise TransientError(what, lost=True)
    if not response.start:
        body.restart()
    body.tag = response.tag
    if expected and response.size not in (None, expected.bytes):
        what = f"{response.size} bytes are there, dataset.json says {expected.bytes}"
        raise TransientError(what, remedy=INDEXED, lost=True)


def _size_limit(response: Response, expected: Expected | None) -> int:
    """Return how many bytes are read and kept at most."""
    if expected:
        return expected.bytes
    if response.size is not None and response.size > MAX_BYTES:
        raise PermanentError(f"{response.size} bytes, at most {MAX_BYTES} are read", PLACE)
    return MAX_BYTES + 1 if response.size is None else response.size


def _check(body: _Body, response: Response, expected: Expected | None) -> None:
    if body.count > MAX_BYTES and not expected:
        raise PermanentError(f"does not end after {MAX_BYTES} bytes", PLACE)
    size = expected.bytes if expected else response.size
    if size is not None and body.count < size:
        raise TransientError(f"cut at byte {body.count} of {size}")
    if expected and (sha256 := body.hash.hexdigest()) != expected.sha256:
        what = f"wrong bytes: sha256 {sha256[:12]}..., dataset.json says {expected.sha256[:12]}..."
        raise TransientError(what, remedy=INDEXED, lost=True)


def backoff_seconds(attempt: int, retry_policy: RetryPolicy) -> float:
    """Return seconds before the next attempt: doubling, and random so that ranks spread out."""
    limit = min(
        retry_policy.first_pause_seconds * 2.0 ** (attempt - 1), retry_policy.max_pause_seconds
    )
    return limit * _RANDOM.uniform(0.5, 1.0)
