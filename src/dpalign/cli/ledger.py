"""`dpalign ledger`: what all runs together have spent, by dataset and run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import DPAlignError
from ..privacy import accountant
from ..privacy.ledger import Ledger, default_path
from ..privacy.parts import epsilon_of
from ..privacy.statement import account
from ..reporting.numbers import all_runs, at_most, attacks
from ..reporting.terminal import Terminal, plain
from .arguments import Parser, number

DESCRIPTION = """Replays the ledger: every run on a dataset's declared name adds up, finished or not. The ledger is
private; its epsilon is an upper bound on what all releases made from that data reveal together."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns the datasets with their totals and runs."""
    parser = Parser(prog="dpalign ledger", description=DESCRIPTION)
    parser.add_argument("--ledger", help=f"the ledger file (default: {default_path()})")
    parser.add_argument("--dataset", help="only this dataset")
    parser.add_argument(
        "--delta", type=number(float, "(0, 1)"), help="delta of the totals (default: by the dataset's units)"
    )
    given = parser.parse_args(arguments)
    path = default_path() if given.ledger is None else given.ledger
    if not Path(path).is_file():
        raise DPAlignError(f"there is no ledger {path}: nothing was spent through it, or its path is another one.")
    if given.delta is not None:
        accountant.check_delta(given.delta)
    ledger = Ledger(path)
    names = [n for n in ledger.datasets() if given.dataset in (None, n)]
    if given.dataset and not names:
        raise DPAlignError(f"the ledger {path} knows no dataset {given.dataset!r}.")
    result = {"ledger": str(path), "datasets": [_dataset(ledger, name, given.delta) for name in names]}
    if not as_json:
        _print(result)
    return result


def _dataset(ledger: Ledger, name: str, delta: float | None) -> dict[str, Any]:
    intents = ledger.intents(dataset=name)
    spendings = ledger.spendings(dataset=name)
    units = max((i.units / (i.high - i.low) for i in intents), default=1.0)
    delta = accountant.default_delta(math.ceil(units)) if delta is None else delta
    runs = []
    for run_name in dict.fromkeys(s.run for s in spendings):
        own = [s for s in spendings if s.run == run_name]
        stages = list(dict.fromkeys(s.stage for s in own))
        runs.append(
            {
                "run": run_name,
                "stages": stages,
                "draws": sum(s.mechanism.steps for s in own),
                "epsilon": epsilon_of(own, delta),
            }
        )
    return {
        **account(ledger, name, delta),
        "units": units,
        "delta": delta,
        "runs": runs,
    }


def _print(result: dict[str, Any]) -> None:
    console = Terminal()
    console.say(f"ledger {result['ledger']}")
    for dataset in result["datasets"]:
        table = Table(title=plain(f"{dataset['dataset']}: {dataset['units']:g} units, delta {dataset['delta']:.2g}"))
        for column in ("run", "stages", "draws", "epsilon"):
            table.add_column(column, justify="left" if column in ("run", "stages") else "right")
        for r in dataset["runs"]:
            epsilon = "NOT PRIVATE" if math.isinf(r["epsilon"]) else at_most(r["epsilon"])
            table.add_row(plain(r["run"]), plain(", ".join(r["stages"])), str(r["draws"]), epsilon)
        console.print(table)
        console.say(f"all private runs together: {all_runs(dataset)}")
        if sentence := attacks(dataset["attack_success_of_all_private_runs"]):
            console.say(sentence)
        if dataset["runs_without_privacy"]:
            console.print(f"[bold]{dataset['runs_without_privacy']} run(s) without privacy are not in that number.[/]")
