"""A person's code, run so that nothing it raises ends a run: not `sys.exit`, not a KeyboardInterrupt of its own.

On a private row an exit status would be an answer about that row. What is not contained: `os._exit`, a signal that the
code sends itself, and crashes of the interpreter.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import DPAlignError
from ..world import refuse_lost

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Raised(Exception):
    """A person's code raised something; `error` is what, and may quote a row."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(type(error).__name__)
        self.error = error


def contained(code: Callable[[], T]) -> T:
    """What `code()` returns.

    Raises:
        Raised: whatever it raises. A signal from outside (Ctrl-C) goes on as it is, also where the code swallows what
            its handler raises, or raises something else instead; so does the end of another process of the run, which
            may hold weights that the code computes with.
    """
    try:
        with _signals_seen() as seen:
            result = code()
    except BaseException as error:
        refuse_lost()
        for number in seen:
            _handle(number)
        raise Raised(error) from None
    for number in seen:
        _handle(number)
    return result


def _handle(number: int) -> None:
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, None)


@contextmanager
def _signals_seen() -> Iterator[list[int]]:
    """The signals that arrive within the block, after whose handlers an exception is theirs and not the code's."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # signals go to the main thread
        return
    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        handlers[signal.Signals(number)](number, frame)

    try:
        for number in handlers:
            signal.signal(number, note)
        yield seen
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def import_function(source: str, what: str) -> Callable[..., Any]:
    """The function that `module:function` names, a file in the working folder included.

    Args:
        what: it is to be, for the message: `reward`, say.

    Raises:
        DPAlignError: it cannot be imported, whatever is wrong in its file, or is no function.
    """
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a file beside the recipe, as with `python -m`
    try:
        function: Callable[..., Any] = contained(lambda: getattr(importlib.import_module(module), name))
    except Raised as raised:
        said = (str(raised.error).splitlines() or [""])[0]
        raise DPAlignError(f"{what} {source!r} cannot be imported: {type(raised.error).__name__}: {said}") from None
    if not callable(function):
        raise DPAlignError(f"{what} {source!r} is not a function.")
    return function


@dataclass(frozen=True)
class Signature:
    """How a reward function takes rows.

    by_name: `completions` is not its second argument, as in TRL's `f(completions, **columns)`: all are given by name.
    takes_prompts: where all are given by name. takes: names of columns; None: any. needs: those without a default.
    """

    by_name: bool
    takes_prompts: bool
    takes: frozenset[str] | None
    needs: tuple[str, ...]


def signature_of(function: Callable[..., Any]) -> Signature:
    """Of a function, an object that is called, or a partial; if it does not tell: (prompts, completions, **columns)."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return Signature(False, True, None, ())
    kinds = inspect.Parameter
    rest = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    in_order = [n for n, p in parameters.items() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    by_name = in_order[1:2] != ["completions"] and ("completions" in named or (rest and not in_order))
    first = ["prompts", "completions"] if by_name else in_order[:2]
    columns = {n: p for n, p in named.items() if n not in first}
    needs = tuple(n for n, p in columns.items() if p.default is kinds.empty)
    return Signature(by_name, rest or "prompts" in named, None if rest else frozenset(columns), needs)


def call_rows(
    function: Callable[..., Any], prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]
) -> Any:
    """What a reward function returns, called as it takes its arguments."""
    signature = signature_of(function)
    if not signature.by_name:
        return function(prompts, completions, **columns)
    asked = {"prompts": prompts} if signature.takes_prompts else {}
    return function(**asked, completions=completions, **columns)
