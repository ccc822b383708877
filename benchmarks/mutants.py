"""Mutation testing: one small change in privacy/, gradients/, training/ or algorithms/, and some test must fail.

    .venv/bin/python benchmarks/mutants.py --runs 100 --output docs/results/mutants.runs.jsonl --reasons docs/results/mutants.reasons.json --summary docs/results/mutants.json

Mutants are all places where an operator of `Places` applies: comparisons, arithmetic, `and` and `or`, negated conditions, dropped `not` and
`-`, numbers, booleans, min and max, any and all, dropped calls and increments, break and continue. Messages (texts, f-strings, what is raised,
what is told), annotations and decorators are left alone. A shuffle that is the same each time puts them in order, each package by
its share; `--runs N` takes N: those that the output has, as long as their lines stand (an edit changes the order of the others), then the first.

First the unchanged tests run once, each with the lines that it reaches: they must pass. Then, for each mutant, the tests that reach its line,
quickest first, then the others of their files, up to `--seconds` of tests, and the first failure ends it. Hundreds of tests
reach the training loop: the one that was written for a survivor is named in the file `--first`. All that in processes
forked from this one, which has imported everything but dpalign, on a copy of the project. A finished mutant is one JSON line; those that are
there are not run again while their line is the same, survivors with `--again`. The reasons file says for
each survivor why it is equivalent or what explains it: without one the exit status is 1.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("privacy", "gradients", "training", "algorithms")
# Next to these packages, and without minutes of their own.
TESTS = [
    "privacy/accounting", "privacy/attack_success", "privacy/composition", "privacy/contained", "privacy/context",
    "privacy/fields", "privacy/gate", "privacy/loop", "privacy/noise", "privacy/own_pairs", "privacy/own_text", "privacy/parts",
    "privacy/products", "privacy/private_evaluation", "privacy/sampling", "privacy/self_check", "privacy/sensitivity", "privacy/trainables",
    "privacy/who_is_who", "alignment", "anchor", "basis", "callbacks", "dpo", "drawn_examples", "formats", "gradients", "grpo",
    "head", "ledger_format", "new_algorithm", "nist", "offline", "optimizer", "ppo", "reward_model", "reward_query", "rloo",
    "rows", "trajectories", "resume", "recompute", "many_processes", "written_rewards", "policy", "evaluate", "plan", "data", "whole",
]  # fmt: skip
TIMED = ("tests/test_plan.py::test_calibration_is_quick",)  # a bound in seconds, which a busy machine misses without any change
COMPARED = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
COMPUTED = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*", "&": "|", "|": "&", "@": "*"}
CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "amin": "amax", "amax": "amin"}
SIGNS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not", ast.In: "in",
    ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.BitAnd: "&", ast.BitOr: "|", ast.MatMult: "@",
}  # fmt: skip
TOLD = ("tell", "warn", "_tell", "report", "print")  # what only says something
CHECKS = ("strict", "frozen", "kw_only", "slots", "exist_ok", "parents")  # keywords that change nothing where all is right


# Mutants --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """`new` in place of the characters [start, end) of a file below src/dpalign.

    on_import: whether that is read on import, before any test: which tests reach it says nothing.
    """

    name: str
    file: str
    line: int
    start: int
    end: int
    new: str
    before: str
    after: str
    on_import: bool = False


class Places(ast.NodeVisitor):
    """All mutants of a file; a name is its file, where it stands, what it does, and which of several that is."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text, self.found, self.inside, self.count = file, text, [], [], Counter()  # type: ignore[var-annotated]
        self.functions = 0
        lines = text.splitlines(keepends=True)
        self.starts = [sum(len(line) for line in lines[:number]) for number in range(len(lines) + 1)]
        self.lines = lines
        self.visit(ast.parse(text))

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def add(self, does: str, start: int, end: int, new: str) -> None:
        place = f"{self.file}::{'.'.join(self.inside) or 'module'}::{does}"
        self.count[place] += 1
        line = self.text.count("\n", 0, start) + 1
        first, last = self.starts[line - 1], self.starts[self.text.count("\n", 0, end) + 1]
        after = self.text[first:start] + new + self.text[end:last]
        words = [" ".join(shown.split()) for shown in (self.text[first:last], after)]
        self.found.append(Mutant(f"{place}::{self.count[place]}", self.file, line, start, end, new, *words, self.functions == 0))

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """The operator between two operands, which may stand in brackets."""
        start, end = self.span(left)[1], self.span(right)[0]
        place = self.text.find(old, start, end)
        if place >= 0:
            self.add(f"{old} to {new}", place, place + len(old), new)

    # What is left alone.
    def visit_Raise(self, node: ast.Raise) -> None: ...
    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...
    def visit_Import(self, node: ast.Import) -> None: ...
    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...
    def visit_Assert(self, node: ast.Assert) -> None: ...

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in CHECKS:
            self.visit(node.value)

    def _scope(self, node: Any) -> None:
        self.inside.append(node.name)
        for default in [*getattr(node, "args", ast.arguments([], [], None, [], [], None, [])).defaults]:
            self.visit(default)
        for default in getattr(getattr(node, "args", None), "kw_defaults", []):
            if default:
                self.visit(default)
        self.functions += not isinstance(node, ast.ClassDef)
        for statement in node.body:
            self.visit(statement)
        self.functions -= not isinstance(node, ast.ClassDef)
        self.inside.pop()

    visit_FunctionDef = visit_ClassDef = visit_AsyncFunctionDef = _scope

    # What is changed.
    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            called = node.value.func
            if (called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")) in TOLD:
                return
            self.add("call dropped", *self.span(node), "pass")
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("assignment dropped", *self.span(node), "pass")
        self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, kind, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            self.between(left, right, SIGNS[type(kind)], COMPARED[SIGNS[type(kind)]])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in (node.left, node.right))
        if not texts and type(node.op) in SIGNS:
            old = SIGNS[type(node.op)]
            self.between(node.left, node.right, old, COMPUTED[old])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, f" {old} " if " " in self.text[self.span(left)[1] : self.span(right)[0]] else old, f" {new} ")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start, end = self.span(node)
        if isinstance(node.op, ast.Not | ast.USub):
            does = "not dropped" if isinstance(node.op, ast.Not) else "- dropped"
            self.add(does, start, end, self.text[start + len(does.split()[0]) : end].lstrip())
        self.generic_visit(node)

    def _condition(self, test: ast.expr) -> None:
        plain = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn)
        if not plain and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):  # which has that mutant already
            start, end = self.span(test)
            self.add("condition negated", start, end, f"(not ({self.text[start:end]}))")

    def _branch(self, node: Any) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self._condition(node.test)
            self.generic_visit(node)

    visit_If = visit_While = visit_IfExp = _branch

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(f"{node.value} to {not node.value}", *self.span(node), str(not node.value))
        elif isinstance(node.value, int | float):
            new = node.value + 1 if isinstance(node.value, int) or not node.value else node.value * 2
            self.add(f"{node.value} to {new}", *self.span(node), repr(new))

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in CALLED:
            end = self.span(function)[1]
            self.add(f"{name} to {CALLED[name]}", end - len(name), end, CALLED[name])
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self.add("break to continue", *self.span(node), "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.add("continue to break", *self.span(node), "break")


def mutants_of(files: list[str]) -> list[Mutant]:
    """Of these files or folders below src/dpalign, in the order in which they are run: each package by its share, at every length."""
    top, order = ROOT / "src" / "dpalign", []
    sources = sorted(file for name in files for file in ((top / name).rglob("*.py") if (top / name).is_dir() else [top / name]))
    packages: dict[str, list[Mutant]] = {}
    for source in sources:
        file = source.relative_to(top).as_posix()
        packages.setdefault(file.split("/")[0], []).extend(Places(file, source.read_text(encoding="utf-8")).found)
    for package, found in packages.items():
        random.Random(package).shuffle(found)
        order += [((place + 0.5) / len(found), mutant) for place, mutant in enumerate(found)]
    return [mutant for _, mutant in sorted(order, key=lambda pair: (pair[0], pair[1].name))]


# Tests in processes of their own ---------------------------------------------------------------------------------------


class Observed:
    """A plugin of pytest: a JSON line for each finished test, with its seconds, whether it passed, and the lines that it reached."""

    def __init__(self, output: Path, source: Path | None) -> None:
        self.output, self.source = output, f"{source}/" if source else None
        self.now: set[tuple[CodeType, int]] = set()
        self.fixtures: dict[str, set[tuple[CodeType, int]]] = {}
        self.failed = False

    def _global(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._local if frame.f_code.co_filename.startswith(self.source) else None  # type: ignore[arg-type]

    def _local(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.now.add((frame.f_code, frame.f_lineno))
        return self._local

    @contextlib.contextmanager
    def _seeing(self) -> Iterator[set[tuple[CodeType, int]]]:
        outer, self.now = self.now, set()
        if self.source:
            sys.settrace(self._global)
        try:
            yield self.now
        finally:
            sys.settrace(None)
            outer |= self.now
            self.now = outer

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        """What a fixture of a whole file reaches, every test that uses it reaches."""
        with self._seeing() as seen:
            yield
        self.fixtures.setdefault(fixturedef.argname, set()).update(seen)
        if self.source:
            sys.settrace(self._global)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Any:
        began, self.failed = time.monotonic(), False
        with self._seeing() as seen:
            yield
        seen = seen.union(*(self.fixtures.get(name, set()) for name in getattr(item, "fixturenames", ())))
        lines: dict[str, set[int]] = {}
        for code, line in seen:
            lines.setdefault(code.co_filename.removeprefix(self.source or ""), set()).add(line)
        row = {"test": item.nodeid, "seconds": round(time.monotonic() - began, 3), "passed": not self.failed}
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"lines": {name: sorted(found) for name, found in lines.items()}}) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed


def forget() -> None:
    """Whatever of dpalign and of its tests has been imported is imported anew."""
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None) or ""
        if name.split(".")[0] == "dpalign" or (Path(file).parent.name in ("tests", "privacy") and "site-packages" not in file):
            del sys.modules[name]


class Project:
    """A copy of what the tests need; files are changed there only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for other in ROOT.iterdir():
            if other.name not in ("src", "tests", "build", "runs", ".git") and not other.name.startswith(".venv"):
                (folder / other.name).symlink_to(other)
        self.source = folder / "src" / "dpalign"

    @contextlib.contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        file = self.source / mutant.file
        text = file.read_text(encoding="utf-8")
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
            compiled.unlink()
        other = text[: mutant.start] + mutant.new + text[mutant.end :]
        ast.parse(other)  # what does not even start would count as killed
        file.write_text(other, encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(text, encoding="utf-8")

    def tested(self, tests: list[str], seconds: float, *, follow: bool) -> tuple[bool, list[dict[str, Any]], str]:
        """Whether the tests ended in time, a row for each that was finished, and what pytest wrote."""
        rows, said = self.folder / "rows", self.folder / "said"
        rows.write_text("")
        child = os.fork()
        if child == 0:
            self._child(tests, rows, said, follow)
        ended, until = False, time.monotonic() + seconds
        while not ended and time.monotonic() < until:
            time.sleep(0.05)
            ended = os.waitpid(child, os.WNOHANG)[0] == child
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what it has started
        if not ended:
            os.waitpid(child, 0)
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        return ended, found, said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""

    def _child(self, tests: list[str], rows: Path, said: Path, follow: bool) -> None:
        status = 99
        try:
            os.setpgid(0, 0)
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
            os.chdir(self.folder)
            forget()
            sys.path[:0] = [str(self.folder / "src"), str(self.folder / "tests")]
            os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "DPALIGN_LEDGER": str(self.folder / "ledger.sqlite")}
            sys.dont_write_bytecode = not follow
            if not follow:
                os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", f"--basetemp={self.folder / 'kept'}"]
            options += [f"--deselect={test}" for test in TIMED]
            plugin = Observed(rows, self.source if follow else None)
            status = int(pytest.main([*(options if not follow else options[1:]), *tests], [plugin]))
        except BaseException as error:
            print(error, file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


# Which tests reach what -------------------------------------------------------------------------------------------------


def reached(project: Project, files: list[str], kept: Path, seconds: float) -> list[dict[str, Any]]:
    """A row for each test of these files; a file is run again when it, or anything that may be changed, is another."""
    source = "".join(f.read_text(encoding="utf-8") for package in PACKAGES for f in sorted((project.source / package).rglob("*.py")))
    known = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    found: list[dict[str, Any]] = []
    for file in files:
        name = f"tests/{file.replace('privacy/', 'privacy/test_') if '/' in file else f'test_{file}'}.py"
        key = hashlib.sha256((source + (ROOT / name).read_text(encoding="utf-8")).encode()).hexdigest()
        rows = next((line["rows"] for line in known if line["file"] == name and line["key"] == key), None)
        if rows is None:
            _, rows, said = project.tested([name], seconds, follow=True)
            wrong = [row["test"] for row in rows if not row["passed"]]
            if wrong or not rows:
                raise SystemExit(f"tests of {name} fail without any change, so that no mutant would tell anything: {wrong}\n{said[-3000:]}")
            with kept.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"file": name, "key": key, "rows": rows}) + "\n")
            print(f"{name}: {len(rows)} tests, {sum(row['seconds'] for row in rows):.0f} s", file=sys.stderr, flush=True)
        found += rows
    return found


def chosen(tests: list[dict[str, Any]], mutant: Mutant, seconds: float, first: str | None = None) -> list[str]:
    """Those that reach the mutant's line, or its file (of what is read on import), then the others of their files."""
    near = [row for row in tests if not mutant.on_import and mutant.line in row["lines"].get(mutant.file, ())]
    near = near or [row for row in tests if mutant.file in row["lines"]]
    files = {row["test"].split("::")[0] for row in near}
    names = {row["test"] for row in near}
    beside = [row for row in tests if row["test"].split("::")[0] in files and row["test"] not in names]
    found, left = [first] if first else [], seconds
    for row in [row for rows in (near, beside) for row in sorted(rows, key=lambda row: row["seconds"])]:
        left -= row["seconds"]
        if left < 0 and found:
            break
        if row["test"] != first:
            found.append(row["test"])
    return found


def judged(project: Project, mutant: Mutant, tests: list[str], limit: float) -> dict[str, Any]:
    began = time.monotonic()
    with project.changed(mutant):
        ended, rows, said = project.tested(tests, limit, follow=False) if tests else (True, [], "")  # pytest takes none for all
    failed = [row["test"] for row in rows if not row["passed"]]
    whole = ended and len(rows) == len(tests) and not failed
    by = failed[0] if failed else "" if whole else "no end within the limit" if not ended else said.strip().rsplit("\n", 1)[-1][-200:]
    return {
        "mutant": mutant.name, "line": mutant.line, "before": mutant.before, "after": mutant.after, "killed": ended and not whole,
        "timed_out": not ended, "by": by, "tests": len(rows), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


# Together ---------------------------------------------------------------------------------------------------------------


def summed(rows: list[dict[str, Any]], mutants: list[Mutant], reasons: dict[str, str]) -> dict[str, Any]:
    """Of the newest row of each mutant that still is one."""
    lines = {mutant.name: mutant.before for mutant in mutants}
    newest = {row["mutant"]: row for row in rows if lines.get(row["mutant"]) == row["before"]}
    ran = [*newest.values()]
    packages = sorted({name.split("/")[0] for name in lines})

    def by(package: str, names: list[str]) -> int:
        return sum(name.split("/")[0] == package for name in names)

    killed = [row["mutant"] for row in ran if row["killed"]]
    survivors = [row for row in ran if not row["killed"]]
    return {
        "killed": len(killed),
        "total": len(ran),
        "share": round(len(killed) / len(ran), 4) if ran else None,
        "population": len(mutants),
        "timed_out": sum(row["timed_out"] for row in ran),
        "packages": {p: {"killed": by(p, killed), "total": by(p, [*newest]), "population": by(p, [*lines])} for p in packages},
        "survivors": [
            {key: row[key] for key in ("mutant", "line", "before", "after")} | {"reason": reasons.get(row["mutant"])} for row in survivors
        ],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="mutants, together with those that the output has")
    parser.add_argument("--files", nargs="+", default=[*PACKAGES], help="files or folders below src/dpalign")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files below tests, without test_ and .py")
    parser.add_argument("--seconds", type=float, default=40.0, help="of tests for one mutant, as long as they take without it")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one mutant; one that takes longer is not killed: a busy machine is slow, too")
    parser.add_argument("--again", action="store_true", help="survivors are run again")
    parser.add_argument("--output", type=Path, default=Path("runs/mutants.jsonl"))
    parser.add_argument("--reached", type=Path, default=Path("runs/mutants.tests.jsonl"), help="which lines each test reaches")
    parser.add_argument("--first", type=Path, help="a JSON object, from the name of a mutant to the test that is tried first")
    parser.add_argument("--reasons", type=Path, help="a JSON object, from the name of a survivor to its reason")
    parser.add_argument("--summary", type=Path, help="file for the last line")
    given = parser.parse_args(arguments)
    for file in (given.output, given.reached):
        file.parent.mkdir(parents=True, exist_ok=True)
    population = mutants_of(given.files)
    rows = [json.loads(line) for line in given.output.read_text(encoding="utf-8").splitlines()] if given.output.exists() else []
    done = {(row["mutant"], row["before"]): row["killed"] for row in rows}
    asked = sorted(population, key=lambda mutant: (mutant.name, mutant.before) not in done)[: given.runs]
    waiting = [mutant for mutant in asked if not done.get((mutant.name, mutant.before), False)]
    waiting = [mutant for mutant in waiting if given.again or (mutant.name, mutant.before) not in done]
    first: dict[str, str] = json.loads(given.first.read_text(encoding="utf-8")) if given.first else {}
    if waiting:
        for module in ("dpalign", "dpalign.cli", "dpalign.run", "dpalign.trl", "hypothesis", "scipy.stats", "opacus"):
            importlib.import_module(module)  # with everything that it imports
        with tempfile.TemporaryDirectory(prefix="dpalign-mutants-") as place:
            project = Project(Path(place))
            tests = reached(project, given.tests, given.reached, 3 * given.limit)
            for mutant in waiting:
                row = judged(project, mutant, chosen(tests, mutant, given.seconds, first.get(mutant.name)), given.limit)
                rows.append(row)
                with given.output.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
                print("killed  " if row["killed"] else "SURVIVED", row["seconds"], mutant.name, file=sys.stderr, flush=True)
    reasons = json.loads(given.reasons.read_text(encoding="utf-8")) if given.reasons and given.reasons.exists() else {}
    found = summed(rows, population, reasons)
    if given.summary:
        given.summary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))
    unexplained = [survivor["mutant"] for survivor in found["survivors"] if not survivor["reason"]]
    if unexplained:
        raise SystemExit(f"no reason is given for {len(unexplained)} that survived: {', '.join(unexplained)}")


if __name__ == "__main__":
    main()
