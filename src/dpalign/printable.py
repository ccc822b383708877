"""Text of other people made fit to be shown: completions, names of data and files, a stranger's statement, messages."""

from __future__ import annotations

import re
import unicodedata

# Control, format, surrogate, private and unassigned characters, separators of lines and paragraphs: what can move the
# cursor, colour the screen, turn the direction of the text round or end a line.
UNFIT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
JOINERS = "\u200c\u200d"  # spelling in many scripts, and parts of emoji; they only join


def printable(text: str, *, lines: bool = False, unfit: str = "", longest: int | None = None) -> str:
    """The text with every character that is not for reading as a visible escape (`\\x1b`, `\\u202e`).

    Args:
        lines: keep line ends and tabs, as running text has them; a name or a sentence has none.
        unfit: further characters to escape.
        longest: cut to so many characters, the last of them `…`.
    """
    kept = JOINERS + ("\n\t" if lines else "")
    if not text.isprintable() or unfit:
        text = "".join(_escape(c) if c in unfit or (c not in kept and _is_unfit(c)) else c for c in text)
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def code_span(text: str) -> str:
    """The text on one line as Markdown code, where nothing in it is markup: no link, heading, cell or tag."""
    return f"`{printable(text, unfit='`|<>') or ' '}`"


def figure_text(text: str) -> str:
    """The text on one line for a figure, cut to what fits, without formulas."""
    return printable(text, longest=80).replace("$", r"\$")


def fit_json(json: str) -> str:
    """The same JSON with what is not for reading as JSON's own escapes; line ends between its tokens stay."""
    if json.isprintable():
        return json
    return re.sub("[^ -~\n]", lambda found: _json_escape(found[0]) if _is_unfit(found[0]) else found[0], json)


def _is_unfit(character: str) -> bool:
    return unicodedata.category(character) in UNFIT


def _escape(character: str) -> str:
    code = ord(character)
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    return short or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
