"""A sign of life while something goes on: what it is, for how long, and how long it was expected to take.

A line says nothing but that time has passed: what goes on, how many seconds it may take and after how many seconds a
line is due are public. How many lines there are tells how long it took, to half a minute, as a watch would: a log of a
private run is the data holder's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from types import TracebackType

from .numbers import duration

EVERY = 30.0  # seconds between lines of a log
LOOK = 1.0  # seconds between looks at the clock


class Heartbeat:
    """Tells every so often, from a thread of its own, what has been going on since `about` was called last.

    Args:
        tell: shows what goes on, and for how long, in words. every: seconds between two times.
    """

    def __init__(
        self, tell: Callable[[str, str], None], every: float = EVERY, clock: Callable[[], float] = monotonic
    ) -> None:
        self._tell, self._every, self._clock = tell, every, clock
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.about("")

    def about(self, what: str, expected: float | None = None) -> None:
        """From now on this goes on. expected: seconds that it may take, by public numbers; None where unknown."""
        with self._lock:
            self._what, self._expected = what, expected
            self._began = self._told = self._clock()

    def look(self) -> None:
        """Tells, if it is time."""
        with self._lock:
            now = self._clock()
            if now - self._told < self._every:
                return
            self._told += (now - self._told) // self._every * self._every
            passed = self._told - self._began
            so_far = f"of about {duration(self._expected)}" if self._expected is not None else "so far"
            said = self._what, f"{duration(passed)} {so_far}"
        self._tell(*said)

    def _run(self) -> None:
        try:
            while not self._stopped.wait(LOOK):
                self.look()
        except (OSError, ValueError):
            return  # nobody reads any more, or the stream is closed: who writes next from the main thread will say so

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
