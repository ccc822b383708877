"""Arguments of the commands that take no recipe; imports nothing heavy, so that `plan` answers at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..domains import domain_of, shown
from ..errors import DPAlignError
from ..names import instead
from ..printable import printable

PREPEND_BOS = "put BOS in front of prompts (default: as the release was trained)"

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE = "of a model's frozen weights (default: auto, float32 or bfloat16 by what this device computes faster)"
LEDGER = "the ledger file (default: as for `dpalign run`)"


def add_shared_texts(parser: argparse._ActionsContainer, told: str) -> None:
    """Whether contents are compared, or their holder's word is taken."""
    parser.add_argument("--shared_texts", choices=("checked", "declared"), default="checked", help=told)


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
        if value in (math.inf, -math.inf) and "inf" not in text.lower():  # 1e400 is no way to say infinity
            raise argparse.ArgumentTypeError(f"{shown(text)} is larger than a number can be")
        if value != value or value not in domain:
            raise argparse.ArgumentTypeError(f"{shown(value)} must be {domain}")
        return value

    return read


class Switch(argparse.Action):
    """`--name` and `--no_name`; without either, nothing is said."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        (name,) = option_strings
        super().__init__([name, f"--no_{name.removeprefix('--')}"], dest, nargs=0, **options)

    def __call__(self, parser: object, given: argparse.Namespace, values: object, option: str | None = None) -> None:
        setattr(given, self.dest, option == self.option_strings[0])


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, and say what an unknown option may have meant."""

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(self._about(unknown[0]))
        return given

    def _about(self, word: str) -> str:
        name = word.partition("=")[0].removeprefix("--")
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        meant = instead(name, known) if word.startswith("--") else ""
        return f"unrecognized arguments: {printable(word)}{f': {meant}' if meant else ''}"

    def error(self, message: str) -> NoReturn:
        raise DPAlignError(f"{message} (see {self.prog} --help).")
