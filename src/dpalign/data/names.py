"""One spelling for all spellings: of a unit's name, and of a text."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal

from ..errors import DPAlignError
from .load import Record


def unit_key(record: Record, column: str, number: int) -> str:
    """A unit's name, written as `same_name` does.

    Raises:
        DPAlignError: no name, or neither text nor a whole number.
    """
    name = same_name(unit_value(record, column))
    if name is None:
        raise DPAlignError(
            f"record {number} names no unit in column {column!r}: every record needs text or a whole number there."
        )
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise DPAlignError(f"record {number} has half of a character (a lone surrogate) in the unit column {column!r}.")
    return name


def unit_value(record: Record, column: str) -> object:
    """What a record holds in a column; `meta.user` is `user` inside `meta`, unless a column is called so itself."""
    value: object = record
    for part in [column] if column in record else column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def same_name(value: object) -> str | None:
    """One spelling for all spellings of a unit's name; None of what names nobody.

    Composed and decomposed letters (Unicode NFC), spaces around and doubled within, and 7, 7.0, "7" and "7.0" make no
    other unit; capitals do, and so do leading zeros.
    """
    if isinstance(value, float | Decimal) and math.isfinite(value) and value.as_integer_ratio()[1] == 1:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    name = same_text(str(value))
    if re.fullmatch(r"-?[0-9]+\.0+", name, re.ASCII):
        name = name.partition(".")[0]
    return ("0" if name == "-0" else name) or None


def same_text(text: str) -> str:
    """Unicode NFC, one space where there are several, none around."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())
