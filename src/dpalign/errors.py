"""The one exception that is meant for people, and whether another one's message may be shown."""

import threading
from typing import Any


class DPAlignError(Exception):
    """What was given, what was expected and what to do, in one sentence.

    The message never quotes a private record: it may name a file, a column, a line number before the
    first draw, or a setting, and nothing else.

    said_elsewhere: another process of the run tells it.
    """

    said_elsewhere = False


class TooLongError(DPAlignError):
    """A record has more tokens than its stage takes. tokens: it has."""

    def __init__(self, message: str, tokens: int) -> None:
        super().__init__(message)
        self.tokens = tokens


class EngineError(DPAlignError):
    """A rollout engine that fails, or samples from other weights than it was given: the run stops, and can go on.

    The message says nothing of what it was asked: whoever was drawn is not in it.
    """


class FoundError(DPAlignError):
    """What a command looked for and should not have found. result: all of it, as `--json` prints it."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


RECORDS_READ = threading.Event()
"""Set as soon as this process reads records: from then on a library's message may quote one, and is not shown."""
