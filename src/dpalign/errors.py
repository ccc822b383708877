"""The one exception that is meant for people."""


class DPAlignError(Exception):
    """What was given, what was expected and what to do, in one sentence.

    The message never quotes a private record: it may name a file, a column, a line number before the
    first draw, or a setting, and nothing else.
    """
