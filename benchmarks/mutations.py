"""What may become of a file that was whole: strategies of hypothesis that damage bytes, and trees of JSON or YAML."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

MARKER = "zebrafinch"  # in every record and in no name: what is said of a file may not have it
PLACE = st.integers(0, 2**24)
PIECES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n\n", b"\xed\xa0\x80", b"\x1b[2J", b"[" * 3000, b"{" * 60, b'"', b",", b";", b":", b"'",
    b"\t", b"}", b"]", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"null", b"\\ud800", b"\xe2\x80\xae", "é".encode(), b"\x80" * 16, b"&a *a ", b"!!python/name:os.system ",
]  # fmt: skip


def _deep(levels: int) -> Any:
    value: Any = "end"
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 0.5, 1e-9, 1e-200, 5e-324, 1e6, 1e9, 1e154, 1e200, 1e308, math.inf, -math.inf, math.nan, "inf", "-inf", "nan",
    10**7, 2**31, 2**53 + 1, 2**63, 10**18, 10**30, 10**400, "", " ", "x" * 5000, "\ud800", "\0", "a\x1b[2Jb", "\u202eb", "\ufeff", "e\u0301", "\u2028", "a\nb", "1", "true",
    "../..", "/dev/zero", "demo:", [], {}, [[]], [None], {"": None}, [0.0, 1.0], [1.0, 0.0], _deep(40), _deep(400), ["w1", 3], {"role": "user", "content": f"w1 {MARKER}"},
    [{"role": "user", "content": "w1"}, {"role": "assistant", "content": f"w2 {MARKER}"}], [{"from": "human", "value": "w3"}], [{"content": 3}],
]  # fmt: skip


class Twice(dict[str, Any]):
    """An object whose fields all stand twice when it is written."""

    def items(self) -> Any:
        return [*super().items()] * 2


values = st.one_of(
    st.sampled_from(VALUES).map(copy.deepcopy),  # what is put into a tree may change there
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=6),  # surrogates and control characters too
)


# Bytes ----------------------------------------------------------------------------------------------------------------


def _flip(content: bytes, a: int, b: int, other: bytes) -> bytes:
    return _set(content, a, content[a % len(content)] ^ (1 << b % 8)) if content else content


def _set(content: bytes, a: int, b: int, other: bytes = b"") -> bytes:
    place = a % len(content) if content else 0
    return content[:place] + bytes([b % 256]) + content[place + 1 :]


def _cut(content: bytes, a: int, b: int, other: bytes) -> bytes:
    place = a % (len(content) + 1)
    return content[:place] + content[place + b % (64 if b % 2 else 4096) :]


def _end(content: bytes, a: int, b: int, other: bytes) -> bytes:
    return content[: a % (len(content) + 1)]


def _insert(content: bytes, a: int, b: int, other: bytes) -> bytes:
    place = a % (len(content) + 1)
    return content[:place] + PIECES[b % len(PIECES)] + content[place:]


def _over(content: bytes, a: int, b: int, other: bytes) -> bytes:
    place, piece = a % (len(content) + 1), PIECES[b % len(PIECES)][:64]
    return content[:place] + piece + content[place + len(piece) :]


def _splice(content: bytes, a: int, b: int, other: bytes) -> bytes:
    return content[: a % (len(content) + 1)] + other[b % (len(other) + 1) :]


def _move(content: bytes, a: int, b: int, other: bytes) -> bytes:
    first, second = sorted((a % (len(content) + 1), b % (len(content) + 1)))
    return content[:first] + content[second:] + content[first:second]


def _front(content: bytes, a: int, b: int, other: bytes) -> bytes:
    return PIECES[a % 4] + content


def _ends(content: bytes, a: int, b: int, other: bytes) -> bytes:
    return content.replace(b"\n", b"\r\n" if a % 2 else b"\r")


def _wide(content: bytes, a: int, b: int, other: bytes) -> bytes:
    return content.decode("latin-1").encode("utf-16" if a % 2 else "utf-32")


Change = Callable[[bytes, int, int, bytes], bytes]
CHANGES: list[Change] = [_flip, _set, _cut, _end, _insert, _over, _splice, _move, _front, _ends, _wide]
IN_PLACE: list[Change] = [_flip, _set, _over]


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes], most: int = 3, changes: Sequence[Change] = CHANGES) -> bytes:
    """One of some files after a few changes of its bytes."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, most))):
        change = draw(st.sampled_from(changes))
        content = change(content, draw(PLACE), draw(PLACE), draw(st.sampled_from(seeds)))
    return content


# Trees ----------------------------------------------------------------------------------------------------------------


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """All (container, key) below a tree of lists and dictionaries."""
    for key in range(len(tree)) if isinstance(tree, list) else list(tree) if isinstance(tree, dict) else ():
        found.append((tree, key))
        _places(tree[key], found)
    return found


@st.composite
def changed(draw: st.DrawFn, seeds: Sequence[Any], most: int = 3) -> Any:
    """A tree after a few of its values, fields or names have changed; where it is a container, it stays one of its kind
    but for one time in many."""
    tree = copy.deepcopy(draw(st.sampled_from(seeds)))
    if draw(st.integers(0, 60)) == 60:
        return draw(values)
    for _ in range(draw(st.integers(1, most))):
        places = _places(tree, [])
        if not places:
            break
        container, key = places[draw(PLACE) % len(places)]
        kind = draw(st.integers(0, 9))
        if kind <= 4:
            container[key] = draw(values)
        elif kind == 5:
            del container[key]
        elif kind == 6:
            other, name = places[draw(PLACE) % len(places)]
            container[key] = copy.deepcopy(other[name])  # as it is now: no tree is inside itself
        elif kind == 7:
            container[key] = draw(st.sampled_from([lambda v: [v], lambda v: {"text": v}, lambda v: [v, v], str]))(container[key])
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == 8:
            container[draw(st.sampled_from(["", "format", "text", "\ud800", "a b", "x" * 300, str(key) + " "]))] = container.pop(key)
        elif isinstance(container[key], dict):
            container[key] = Twice(container[key])
    return tree


def as_json(tree: Any, plain: bool = True) -> bytes:
    """plain: ASCII with escapes; else the characters themselves, half ones too."""
    try:
        return json.dumps(tree, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer of more digits than Python writes, or a tree that is too deep
        return b'{"unwritable": ' + b"9" * 6000 + b"}"
