"""Imports go one way: a room imports only rooms below it."""

import ast
from pathlib import Path

import dpalign

SOURCE = Path(dpalign.__file__).parent
# From the top down; rooms on one line are level. `privacy` imports nothing of ours but the error type and a mode for files.
ROOMS = [
    ["cli"],
    ["trl"],
    ["trainers"],
    ["sweep"],
    ["compared"],
    ["run"],
    ["following", "inputs"],
    ["loaded"],
    ["hub", "records", "survey", "workspace"],
    ["boundary"],
    ["plan", "release"],
    ["parsing", "provenance"],
    ["recipe"],
    ["reporting"],
    ["results"],
    ["audit"],
    ["evaluation"],
    ["training"],
    ["algorithms"],
    ["rewards"],
    ["engines"],
    ["models"],
    ["data", "gradients"],
    ["privacy"],
    ["files"],
    ["settings"],
    ["domains", "printable"],
    ["world"],
    ["launched"],
    ["errors", "names", "stages", "version"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imports_of(file: Path) -> set[str]:
    """Our own top-level rooms that a file imports."""
    package = ("dpalign", *file.relative_to(SOURCE).with_suffix("").parts)[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            front = package[: len(package) - node.level + 1] if node.level else ()
            named = (*front, *(node.module.split(".") if node.module else ()))
            targets = [(*named, alias.name) for alias in node.names]
        rooms |= {target[1] for target in targets if target[0] == "dpalign" and len(target) > 1 and target[1] in LEVEL}
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
    lines = ["from ..training.loop import Stage", "from .. import run", "import dpalign.recipe", "import json"]
    lines += ["from dpalign.models import Policy", "from dpalign import data", "from .entropy import SystemEntropy"]
    (tmp_path / "privacy" / "bad.py").write_text("\n".join(lines))
    monkeypatch.setattr("test_architecture.SOURCE", tmp_path)
    seen = {f"privacy -> {room}" for room in ("training", "run", "recipe", "models", "data")}
    assert set(upward(tmp_path / "privacy" / "bad.py")) == seen


def test_units_are_reached_through_the_gate_alone():
    """Nobody else samples, builds a mechanism or writes to the ledger: a step is journaled, drawn and answered there."""
    doors = {
        str(file.relative_to(SOURCE))
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("poisson_sample", "GaussianMechanism", "Intent")
    }
    assert doors == {"privacy/gate.py", "privacy/ledger.py"}  # the ledger reads its rows


def test_no_function_is_longer_than_a_page():
    long = [
        f"{file.relative_to(SOURCE)}: {node.name}"
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long


NAMES = {"sft", "reward_model", "reward_query", "dpo", "ppo", "rloo", "grpo", "offline", "measurement"}
# Where a stage may be called by its name: the list, the recipe's fields, and each stage's own file.
OWN = {"stages.py", "recipe.py", "evaluation/private.py"}
# Not the stage: the folder of a released reward model, the source of a reward, the field of an old sweep's line, and a
# loss by its name in TRL.
ALSO = {
    ("settings/grpo.py", "grpo"),
    ("release.py", "reward_model"),
    ("settings/rewards.py", "reward_model"),
    ("results.py", "reward_model"),
}


def named_stages(file: Path, source: Path) -> list[str]:
    """Literals that are a stage's name, and `recipe.NAME`, outside the places where they belong."""
    place = str(file.relative_to(source))
    if place in OWN or place.startswith("algorithms/"):
        return []
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and node.value in NAMES and (place, node.value) not in ALSO:
            found.append(f"{place}: {node.value!r}")
        elif isinstance(node, ast.Attribute) and node.attr in NAMES and ast.unparse(node.value).endswith("recipe"):
            found.append(f"{place}: {ast.unparse(node)}")
    return found


def test_no_stage_is_known_by_its_name():
    from dpalign.stages import STAGES

    assert set(STAGES) == NAMES
    assert not [name for file in SOURCE.rglob("*.py") for name in named_stages(file, SOURCE)]


def test_a_stage_named_elsewhere_is_seen(tmp_path):
    bad = tmp_path / "run.py"
    bad.write_text('if stage == "rloo":\n    x = recipe.ppo\ny = config.reward_model\nz = "sft and ppo"\n')
    assert named_stages(bad, tmp_path) == ["run.py: 'rloo'", "run.py: recipe.ppo"]
