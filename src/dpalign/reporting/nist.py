"""Answers to the questions that NIST SP 800-226 asks of a claim of differential privacy, from a finished run.

From what lies outside private/ alone. The questions are in our own words, in the order of the document's pyramid: how
strong the promise is, whether mathematics and code keep it, what it stands on. What only the data holder knows is left
open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ..errors import DPAlignError
from ..files import write_text
from ..printable import code_span
from .html import UNWRITABLE, FoundRun, ledger_line, stage_of
from .numbers import at_most, attacks

NIST = "nist-sp-800-226.md"


def write_nist(folder: Path) -> Path:
    """Writes the answers into a finished run's folder.

    Raises:
        DPAlignError: no finished run, or one with files that no run writes.
    """
    run = FoundRun.read(folder)
    try:
        text = answers(run)
    except UNWRITABLE:
        raise DPAlignError(
            f"{folder} holds files that no run writes: run its recipe again, nothing is drawn."
        ) from None
    write_text(folder / NIST, text)
    return folder / NIST


def answers(run: FoundRun) -> str:
    """The document, as Markdown; what others have named is code in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": code_span, "ledger": lambda entry: code_span(ledger_line(entry))}
    return environment.get_template("nist.md.jinja").render(run=_shown(run))


def _shown(run: FoundRun) -> dict[str, Any]:
    summary = run.summary
    stages = [stage_of(stage, summary["delta"]) for stage in summary["stages"]]
    epsilon = float(summary["epsilon"])
    return {
        "name": run.name,
        "private": run.is_private,
        "epsilon": at_most(epsilon),
        "factor": _factor(epsilon),
        "delta": f"{summary['delta']:.3g}",
        "attacks": attacks(summary.get("attack_success", [])),
        "units": sorted({stage["unit"] for stage in summary["stages"]}),
        "datasets": sorted({stage["dataset"] for stage in summary["stages"]}),
        "smallest": min((_units(stage) for stage in summary["stages"]), default=0.0),
        "random_one": summary["delta"] * max((_units(stage) for stage in summary["stages"]), default=0.0),
        "stages": stages,
        "together": _composition(summary["stages"]),
        "ledger": summary["ledger"],
        "without_privacy": sum(entry["runs_without_privacy"] for entry in summary["ledger"]),
        "several": any(entry["runs"] > 1 for entry in summary["ledger"]),
        "demo": run.is_demo and bool(summary["ledger"]),
        "assumptions": summary["assumptions"],
        "not_covered": summary["not_covered"],
        "accountant": summary["accountant"],
        "adjacency": summary["adjacency"],
        "versions": summary["versions"],
        "measured": bool(run.evaluation),
    }


def _units(stage: Mapping[str, Any]) -> float:
    return float(stage["units"])


def _factor(epsilon: float) -> str:
    """e^epsilon, rounded up; in powers of ten where it is large."""
    if not math.isfinite(epsilon):
        return "any factor"
    factor = math.exp(min(epsilon, 700.0))
    return at_most(factor, 1) if factor < 1e4 else f"10^{math.ceil(epsilon / math.log(10))}"


def _composition(stages: list[Mapping[str, Any]]) -> str:
    """How the stages add up: whether some unit may be in two of them."""
    meet = [
        (one["stage"], other["stage"])
        for number, one in enumerate(stages)
        for other in stages[number + 1 :]
        if one["dataset"] == other["dataset"]
        and max(one["part"][0], other["part"][0]) < min(one["part"][1], other["part"][1])
    ]
    if len(stages) < 2:
        return "There is one stage."
    if not meet:
        return "No unit is in two stages (parallel composition): the run costs what its most expensive stage costs."
    pairs = ", ".join(f"{code_span(one)} and {code_span(other)}" for one, other in meet)
    return f"Units may be in several stages ({pairs}): what those cost is composed (sequential composition)."
