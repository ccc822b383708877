"""`dpalign report`: the report of a finished run or sweep, written again; a run's perhaps beside other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from ..reporting.html import FoundRun, write_report
from ..reporting.nist import write_nist
from ..reporting.terminal import Terminal
from .arguments import Parser

DESCRIPTION = """Writes RUN/report.html, one self-contained page to read, print or publish: the guarantee, every stage's
mechanism, noised training curves, results and completions on public prompts. It is made from what lies outside
private/ alone. RUN/private/report.html says more (the command, time and memory, what the data does) and stays with the
data holder.

Of a sweep's folder it writes the table of all settings: reward, KL and cost, private against free and without
privacy; on private data, what ran without privacy is in private/report.html only.

With --nist it writes RUN/nist-sp-800-226.md instead: answers to what NIST SP 800-226 asks of a claim of differential
privacy, from the run's published numbers; what only the data holder knows is left open.

`dpalign run` and `dpalign sweep` write both at their end. Nothing is drawn, and no model is loaded."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns where the reports are, and which runs only the data holder's shows."""
    parser = Parser(prog="dpalign report", description=DESCRIPTION)
    parser.add_argument("run", help="a finished run's or sweep's folder")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="RUN",
        help="other finished runs to compare with; one without privacy on private data is in private/ only",
    )
    parser.add_argument("--nist", action="store_true", help="answers to the questions of NIST SP 800-226, as Markdown")
    given = parser.parse_args(arguments)
    if given.nist:
        return _nist(given, as_json)
    if (Path(given.run) / "sweep.json").is_file():
        if given.beside:
            raise DPAlignError("--beside is for a run's report: a sweep's compares its own settings.")
        from ..reporting.sweep_page import write_sweep_report  # imports torch

        return told(*write_sweep_report(Path(given.run)), as_json)
    beside = [Path(folder) for folder in given.beside]
    page = write_report(Path(given.run), beside)
    return told(page, [str(folder) for folder in beside if not may_be_shown(Path(given.run), folder)], as_json)


def _nist(given: Any, as_json: bool) -> dict[str, Any]:
    if given.beside:
        raise DPAlignError("--beside is for a run's report: --nist answers for one run.")
    page = write_nist(Path(given.run))
    if not as_json:
        Terminal().say(f"answers to NIST SP 800-226: {page}")
    return {"nist": str(page)}


def told(page: Path, hidden: list[str], as_json: bool) -> dict[str, Any]:
    """Says where the pages are, and what only the data holder's shows."""
    own = page.parent / "private" / page.name
    if not as_json:
        console = Terminal()
        console.say(f"report: {page}")
        if own.is_file():
            console.say(f"for the data holder alone: {own}")
        for name in hidden:
            console.say(f"{name} is without privacy: it is in the data holder's report only.")
    return {"report": str(page), "private_report": str(own) if own.is_file() else None, "only_private": hidden}


def may_be_shown(folder: Path, other: Path) -> bool:
    """Whether a run may be compared with another one in public."""
    return FoundRun.read(other).may_be_shown_beside(FoundRun.read(folder))
