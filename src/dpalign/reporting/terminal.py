"""The only way to a terminal: what is shown there is printable."""

from __future__ import annotations

from typing import Any, NoReturn

from rich.console import Console
from rich.status import Status
from rich.text import Text

from ..printable import printable


class Terminal(Console):
    """A console for sentences and tables of ours, and, by `plain`, for text of other people.

    Whatever is given as a string loses what is no text, though not its line ends; nothing is guessed from it (no
    highlights, no emoji names).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, lines=True), **options)

    def status(self, status: Any, **options: Any) -> Status:
        return super().status(plain(status) if isinstance(status, str) else status, **options)

    def say(self, sentence: str) -> None:
        """One line with the names that it quotes; there is no markup in it, and a file keeps it whole."""
        self.print(printable(sentence), markup=False, soft_wrap=not self.is_terminal)

    def on_broken_pipe(self) -> NoReturn:
        """Nobody reads any more: the command ends as the signal would end it."""
        raise BrokenPipeError


def plain(text: str, style: str = "", *, lines: bool = False) -> Text:
    """Text of other people for a cell, a title or a line: no markup in it, and one line unless it may have several."""
    return Text(printable(text, lines=lines), style=style)
