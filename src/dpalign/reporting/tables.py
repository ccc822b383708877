"""Tables for people."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

EVALUATION_COLUMNS = ("reward", "kl", "perplexity", "distinct_2", "completion_length")


def print_summary(summary: dict[str, Any]) -> None:
    """The end of a run: the guarantee, where the release is, and the public evaluation if there was one."""
    console = Console(highlight=False)
    console.print(guarantee(summary), markup=False)
    for entry in summary["ledger"]:
        if entry["runs"] > 1:
            console.print(
                f"all {entry['runs']} runs on {entry['dataset']!r} together: epsilon "
                f"{entry['epsilon_of_all_private_runs']:.3f} (dpalign ledger shows them).",
                markup=False,
            )
    if "evaluation" in summary:
        console.print(evaluation_table(summary["evaluation"]))
    console.print(f"release: {summary['release']}", markup=False)


def guarantee(summary: dict[str, Any]) -> str:
    """One sentence."""
    if not summary["private"] or math.isinf(summary["epsilon"]):
        return "NOT PRIVATE: this run gives no guarantee."
    return f"({summary['epsilon']:.4g}, {summary['delta']:.3g})-differentially private, adding or removing one unit."


def evaluation_table(rows: dict[str, dict[str, Any]], title: str = "On public prompts") -> Table:
    """One row per model."""
    table = Table(title=title)
    table.add_column("model")
    for column in ("reward", "KL (nats)", "perplexity", "distinct-2", "tokens"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        reward = f"{row['reward']:.3f} ± {row['reward_ci95']:.3f}"
        rest = [f"{row[c]:.3f}" if c == "distinct_2" else f"{row[c]:.2f}" for c in EVALUATION_COLUMNS[1:]]
        table.add_row(name, reward, *rest)
    return table
