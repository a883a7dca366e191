"""Fetch in the background what will be read next."""

import os
from collections.abc import Callable, Iterable
from threading import Condition, Thread

from echolab.errors import EcholabError


class Ahead:
    """Calls `fetch(shard)` for the first `most` shards expected, one after another, in a thread.

    A new expectation takes the place of the old one.  The thread starts with the first, in the
    process that has it: it would not outlive a fork.
    """

    def __init__(self, fetch: Callable[[int], None], most: int) -> None:
        self.fetch, self.most = fetch, most
        self._owner = 0

    def __getstate__(self) -> dict[str, object]:
        return {"fetch": self.fetch, "most": self.most, "_owner": 0}

    def expect(self, shards: Iterable[int]) -> None:
        """Numbers of shards in the order in which they will be read; never blocks."""
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._wanted: list[int] = []
            self._changed = Condition()
            Thread(target=self._work, name="ahead", daemon=True).start()
        with self._changed:
            self._wanted = list(dict.fromkeys(shards))[: self.most]
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                shard = self._wanted.pop(0)
            try:
                self.fetch(shard)
            except (EcholabError, OSError):
                pass  # who reads the shard tries again, and tells
