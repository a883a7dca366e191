"""Signals ask for a stop; the stop itself happens between two steps, on all ranks at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Remembers the first signal, and does nothing else in the handler.

    The handlers before it come back at the end.  A second Ctrl-C is not patient any more:
    KeyboardInterrupt.  Outside the main thread Python allows no handlers, and there are none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._remember)
        return self

    def take_back(self) -> None:
        """Lightning puts a handler of its own in front, with a broadcast in it; undo that."""
        for number in self._before:
            signal.signal(number, self._remember)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def ignore_signals(worker: int = 0) -> None:
    """For loader workers: only their parent decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
