"""Arguments of the commands that take no recipe; imports nothing heavy, so that `plan` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from ..domains import domain_of, shown
from ..errors import DPAlignError

PREPEND_BOS = "put BOS in front of prompts (default: as the release was trained)"


def number(kind: type[int] | type[float], interval: str, *, or_inf: bool = False) -> Callable[[str], Any]:
    """An argument's type: a number in an interval, such as `[1, 64]`."""
    domain = domain_of(interval, or_inf=or_inf)

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{shown(text)} is no {'whole number' if kind is int else 'number'}"
            ) from None
        if value != value or value not in domain:
            raise argparse.ArgumentTypeError(f"{shown(value)} must be {domain}")
        return value

    return read


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise DPAlignError(f"{message} (see {self.prog} --help).")
