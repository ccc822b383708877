"""Imports go one way: a room imports only rooms below it."""

import ast
from pathlib import Path

import dpalign

SOURCE = Path(dpalign.__file__).parent
# From the top down; rooms on one line are level. `privacy` imports nothing of ours but the error type.
ROOMS = [
    ["cli"],
    ["trainers"],
    ["pipeline"],
    ["planning"],
    ["recipe"],
    ["reporting"],
    ["evaluation"],
    ["training"],
    ["algorithms"],
    ["rewards"],
    ["models"],
    ["data", "gradients"],
    ["privacy"],
    ["files"],
    ["errors", "version"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imports_of(file: Path) -> set[str]:
    """Our own top-level rooms that a file imports."""
    package = ("dpalign", *file.relative_to(SOURCE).with_suffix("").parts)[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            names = [target[1]] if len(target) > 1 and target[1] else [alias.name for alias in node.names]
            rooms |= {name for name in names if name in LEVEL}
    return rooms


def upward(file: Path) -> list[str]:
    room = file.relative_to(SOURCE).with_suffix("").parts[0]
    return [f"{room} -> {other}" for other in imports_of(file) if other != room and LEVEL[other] <= LEVEL[room]]


def test_imports_go_down_only():
    files = [f for f in SOURCE.rglob("*.py") if f.relative_to(SOURCE).parts[0] not in ("__init__.py", "__main__.py")]
    assert {f.relative_to(SOURCE).with_suffix("").parts[0] for f in files} == set(LEVEL)
    assert not [arrow for file in files for arrow in upward(file)]


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    (tmp_path / "privacy").mkdir()
    (tmp_path / "privacy" / "bad.py").write_text("from ..training.loop import Stage\nfrom .. import pipeline\n")
    monkeypatch.setattr("test_architecture.SOURCE", tmp_path)
    assert set(upward(tmp_path / "privacy" / "bad.py")) == {"privacy -> training", "privacy -> pipeline"}
