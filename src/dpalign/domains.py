"""What a setting may be: every number states its interval where its field is, and is finite unless that says so.

`check_settings` goes over a config and the configs inside it: types, intervals, text, and what `validate` says of the
fields together. Nothing else is asked, so a recipe is refused before a file is opened or written.
"""

from __future__ import annotations

import math
import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import DPAlignError

SEEDS = "[0, 9223372036854775807]"  # what torch takes
COUNT = "[1, 100000000]"  # of rows, units or tokens: beyond it somebody has mistyped
LENGTH = "[1, 1000000]"  # in tokens
STEPS = "[1, 200000]"  # the accountant composes that many in seconds
SCALE = "[-1e9, 1e9]"
LONGEST_TEXT = 4096  # of a name or path


@dataclass(frozen=True)
class Domain:
    """An interval, and whether infinity is meant too. ordered: a range, whose second number is the larger one."""

    low: float
    high: float
    with_low: bool
    with_high: bool
    or_inf: bool = False
    ordered: bool = False

    def __contains__(self, number: float) -> bool:
        if number in (math.inf, -math.inf):
            return self.or_inf and number > 0
        above = number >= self.low if self.with_low else number > self.low
        return above and (number <= self.high if self.with_high else number < self.high)

    def __str__(self) -> str:
        low = f"{'at least' if self.with_low else 'above'} {self.low:.10g}"
        high = f"{'at most' if self.with_high else 'below'} {self.high:.10g}"
        return f"{low} and {high}{', or inf' if self.or_inf else ''}"


def within(default: Any, interval: str, *, or_inf: bool = False, ordered: bool = False) -> Any:
    """A dataclass field whose numbers lie in an interval, such as `[0, 1)`; where it holds several, each of them.

    Args:
        or_inf: infinity is meant too. ordered: of two numbers, the second is the larger.
    """
    return field(default=default, metadata={"domain": domain_of(interval, or_inf=or_inf, ordered=ordered)})


def domain_of(interval: str, *, or_inf: bool = False, ordered: bool = False) -> Domain:
    """What `within` makes of an interval."""
    low, high = interval[1:-1].split(",")
    return Domain(float(low), float(high), interval[0] == "[", interval[-1] == "]", or_inf, ordered)


def check_settings(settings: Any, path: str = "") -> None:
    """Refuses settings with a value that cannot be, in the configs inside too.

    Args:
        path: of the settings, for the message: `sft`, say.

    Raises:
        DPAlignError: the first one, by its name.
    """
    for f in fields(settings):
        value, name = getattr(settings, f.name), f"{path}.{f.name}" if path else f.name
        expected = hints_of(settings.__class__)[f.name]
        if not _is_of(value, expected):
            raise DPAlignError(f"field {name}: expected {_type_name(expected)}, got {shown(value)}.")
        if is_dataclass(value):
            check_settings(value, name)
            continue
        domain = f.metadata.get("domain")
        for leaf in _leaves(value):
            if isinstance(leaf, str):
                _check_text(name, leaf, may_be_empty=f.default == "")
            else:
                _check_number(name, leaf, domain)
        if domain is not None and domain.ordered and value is not None and not value[0] < value[1]:
            raise DPAlignError(f"{name} {shown(value)} must be a range [low, high] with low < high.")
    if hasattr(settings, "validate"):
        try:
            settings.validate()
        except DPAlignError as error:
            raise DPAlignError(f"{path}: {error}" if path else str(error)) from None


def shown(value: object) -> str:
    """A value for a message: printable, and short whatever it is."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_number(name: str, number: float, domain: Domain | None) -> None:
    if isinstance(number, float) and math.isnan(number):
        raise DPAlignError(f"{name} is not a number (NaN).")
    if domain is None and number in (math.inf, -math.inf):
        raise DPAlignError(f"{name} {number} must be finite.")
    if domain is not None and number not in domain:
        raise DPAlignError(f"{name} {shown(number)} must be {domain}.")


def _check_text(name: str, text: str, *, may_be_empty: bool) -> None:
    if not text.strip() and not (may_be_empty and not text):
        raise DPAlignError(f"{name} is empty: leave it out, or give it a value.")
    if not text.isprintable():
        raise DPAlignError(f"{name} {shown(text)} holds control characters.")
    if len(text) > LONGEST_TEXT:
        raise DPAlignError(f"{name} has {len(text)} characters, more than {LONGEST_TEXT}.")


def _leaves(value: Any) -> Iterator[Any]:
    """The numbers and texts in a value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (*_leaves(key), *_leaves(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value


def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a class's fields; read once, since that compiles each annotation."""
    return _hints(kind)


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_of(value: Any, expected: Any) -> bool:
    """Whether a value has the type of a field; an int will do for a float, and a bool for neither."""
    origin, arguments = get_origin(expected), get_args(expected)
    if expected is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_of(one, arguments[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(_is_of, value, arguments))
    if origin is dict:
        key, inner = arguments
        return isinstance(value, dict) and all(_is_of(k, key) and _is_of(v, inner) for k, v in value.items())
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _type_name(expected: Any) -> str:
    if get_origin(expected) in (Union, types.UnionType):
        return " or ".join(_type_name(one) for one in get_args(expected))
    if get_origin(expected) is Literal:
        return " or ".join(map(repr, get_args(expected)))
    return "nothing" if expected is type(None) else getattr(expected, "__name__", str(expected))
