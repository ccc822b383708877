"""What docs/reviewers.md and docs/security.md point to is there, and every claim has its code and its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["reviewers.md", "security.md"]
POINTER = re.compile(r"`((?:src|tests|tools|examples|benchmarks|docs)/[\w./-]+\.\w+)(?:::(\w+))?`")


def broken(text: str) -> list[str]:
    """What is pointed to and is not there."""
    return [
        f"{file}::{name}" if name else file
        for file, name in POINTER.findall(text)
        if not (ROOT / file).is_file() or (name and name not in functions_of(file))
    ]


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def claims(text: str) -> list[list[str]]:
    """Claim, code and test of each row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if len(row) == 3 and row[0] != "claim"]


@pytest.mark.parametrize("page", PAGES)
def test_every_pointer_is_to_something(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert len(POINTER.findall(text)) > 15 and broken(text) == []


def test_every_claim_has_code_and_a_test_that_holds_it():
    found = claims((ROOT / "docs" / "reviewers.md").read_text(encoding="utf-8"))
    assert len(found) > 25
    assert [claim for claim, code, _ in found if not POINTER.findall(code)] == []
    assert [
        claim for claim, _, tests in found if not all(name for _, name in POINTER.findall(tests) or [("", "")])
    ] == []


def test_what_is_gone_is_found():
    text = "`src/dpalign/gone.py` `tests/test_plan.py::test_gone` `tests/test_plan.py::test_without_privacy` `docs/privacy.md`"
    assert broken(text) == ["src/dpalign/gone.py", "tests/test_plan.py::test_gone"]
