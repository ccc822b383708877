"""The notebook runs from its first cell to its last, in a folder of its own."""

from __future__ import annotations

import ast
import json
from typing import Any

import torch

from reader import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """What a notebook shows of a cell: the value of its last line, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "notebook"}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            torch.set_num_threads(1)
            assert not cell["outputs"] and cell["execution_count"] is None  # nobody's old numbers
            shown.append(run_cell("".join(cell["source"]), names))
    people, (sigma, noise), (epsilon, _), stages, size, text, whole = shown
    assert people[0]["person"] == "p0" and 0 < noise < sigma and 3.9 < epsilon <= 4
    assert [stage for stage, *_ in stages] == ["sft", "rloo"] and {unit for _, unit, _ in stages} == {"person"}
    assert size > 10_000 and text.count("visitor") == 1 and 3.9 < whole <= 4
    assert "assumed: " in capsys.readouterr().out


def test_a_cell_shows_its_last_line():
    names: dict[str, Any] = {}
    assert run_cell("x = 2\nx + 1", names) == 3 and names["x"] == 2 and run_cell("y = x", names) is None
