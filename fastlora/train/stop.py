"""SIGINT, SIGTERM and SIGHUP: the first ends training after the step in hand, the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A stop signal; `exit_code` is 128 + its number. Not an Exception: no handler may swallow it."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        self.told = False
        """Whether the user has been told how to go on."""
        super().__init__(signal.Signals(signal_number).name)


class StopSignals:
    """Within it, SIGINT, SIGTERM and SIGHUP raise Interrupted; while `deferring`, they only set `pending`."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._until: str | None = None
        """What a signal has to wait for."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferring(self, until: str = "this step") -> Iterator[None]:
        """Interrupted comes at the end of it: for what must not be cut, or would swallow an exception."""
        self._until = until
        try:
            yield
        finally:
            self._until = None
        self.raise_pending()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.pending is not None:
            os._exit(128 + number)
        self.pending = number
        if self._until is None:
            raise Interrupted(number)
        # write(2) and not print: the signal may have come in the middle of a print.
        with suppress(OSError):  # after SIGHUP the terminal is gone
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2,
                f"\nstopping after {self._until}; again to leave at once\n".encode(),
            )

    def raise_pending(self) -> None:
        if self.pending is not None:
            raise Interrupted(self.pending)
