"""Tables for people."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..printable import printable
from .numbers import all_runs, at_most, attacks
from .terminal import Terminal, plain

if TYPE_CHECKING:  # it imports torch
    from ..results import Results

Cell: TypeAlias = str | Text  # ours, with markup; or plain text
OUTSIDE = "outside the guarantee"
# Column: header, and decimals of its values. The brief ones fit a terminal of 80 columns.
BRIEF = {
    "reward": ("reward", 3),
    "reference_reward": ("reference reward", 3),
    "kl": ("KL (nats)", 2),
    "perplexity": ("perplexity", 2),
    "distinct_2": ("distinct-2", 3),
    "completion_length": ("tokens", 2),
    "text_loss": ("text loss", 3),
}
FULL = {
    "epsilon": ("epsilon", 4),
    "reward": BRIEF["reward"],
    "reference_reward": BRIEF["reference_reward"],
    "win_rate": ("win rate", 3),
    "kl": BRIEF["kl"],
    "perplexity": BRIEF["perplexity"],
    "distinct_1": ("distinct-1", 3),
    "distinct_2": BRIEF["distinct_2"],
    "distinct_3": ("distinct-3", 3),
    "rouge1": ("ROUGE-1", 3),
    "rouge2": ("ROUGE-2", 3),
    "rougeL": ("ROUGE-L", 3),
    "completion_length": BRIEF["completion_length"],
    "text_loss": BRIEF["text_loss"],
}
WITH_INTERVAL = ("reward", "reference_reward", "rouge1", "rouge2", "rougeL")  # the brief table shows no others


def print_results(results: Results) -> None:
    """The end of a run: the guarantee, where the release is, and what was measured."""
    console = Terminal()
    summary = results.to_json()
    console.say(guarantee(summary))
    if results.statement.stages and (sentence := attacks(results.statement.attack_success)):
        console.say(sentence)
    for entry in results.statement.ledger:
        if entry["runs"] > 1:
            console.say(
                f"all {entry['runs']} runs on {entry['dataset']!r} together: {all_runs(entry)} "
                "(dpalign ledger shows them)."
            )
    if results.evaluation:
        sampled = any("reward" in row for row in summary["evaluation"].values())
        title = f"On public {'prompts' if sampled else 'texts'}"
        console.print(evaluation_table(summary["evaluation"], title, results.outside_the_guarantee))
        if line := about_texts(summary["evaluation"]):
            console.say(line)
    for stage, pairs in results.pairs.items():
        console.print(agreement_line(stage, pairs.as_dict()))
    for name, best in results.best_of.items():
        console.say(chosen_line(name, best.as_dict()))
    for stage, found in results.measurements.items():
        if found is None:
            console.print(f"{stage} was lost by an interruption.")
            continue
        noise = found["noise_standard_deviation"]
        numbers = ", ".join(f"{k.replace('_', ' ')} {found[k]:.3f} (noise {noise[k]:.3f})" for k in noise)
        console.print(f"on held-out private units, noised: {numbers}.")
    if results.release is not None:
        console.say(f"release: {results.release}")


def about_texts(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the column of losses on texts is, where there is one."""
    counts = [row["text_records"] for row in rows.values() if row.get("text_records") is not None]
    return f"text loss: nats per token of {counts[0]:,} held-out public texts; lower is better." if counts else ""


def agreement_line(stage: str, pairs: Mapping[str, Any]) -> str:
    """How often a stage's model agrees with people on public pairs."""
    return (
        f"{stage} on {pairs['pairs']:,} public pairs: accuracy {pairs['accuracy']:.3f} ± {pairs['accuracy_ci95']:.3f}, "
        f"{free_agreement(pairs)}calibration error {pairs['calibration_error']:.3f}, margin {pairs['margin']:.2f}."
        f"{distance(pairs)}"
    )


def chosen_line(name: str, best: Mapping[str, Any]) -> str:
    """What a reward is worth where it is used."""
    who = "free rewards choose" if name == "free" else "reward chooses"
    return (
        f"among {best['completions']} completions of {best['prompts']} public prompts, what the {who} has reference "
        f"reward {best['judge']:.3f} ± {best['judge_ci95']:.3f}: {best['gain']:.3f} ± {best['gain_ci95']:.3f} above "
        "their mean."
    )


def free_agreement(pairs: Mapping[str, Any]) -> str:
    """How often the scores agree that need nobody's data, where a reward has some."""
    if "free_accuracy" not in pairs:
        return ""
    return f"free rewards {pairs['free_accuracy']:.3f} ± {pairs['free_accuracy_ci95']:.3f}, "


def distance(pairs: Mapping[str, Any]) -> str:
    """How far the pairs' texts are from those that the policy writes, where a policy was there."""
    if "shift" not in pairs:
        return ""
    return (
        f" As the reward model reads them, these texts are {pairs['shift']:.2f} deviations from what the policy writes "
        f"itself, and {pairs['outside']:.0%} of them are farther out than 95% of it (of texts like its own: 5%)."
    )


def print_compared(rows: dict[str, dict[str, Any]], said: Sequence[str], outside: Collection[str]) -> None:
    """A run beside what is free and what is not private, and what its private data bought."""
    console = Terminal()
    if rows:
        console.print(evaluation_table(rows, "Beside what is free", outside))
    for sentence in said:
        console.say(sentence)


def guarantee(summary: dict[str, Any]) -> str:
    """One sentence."""
    if not summary["private"] or math.isinf(summary["epsilon"]):
        return "NOT PRIVATE: this run gives no guarantee."
    if not summary.get("stages", True):
        return "No private record was read: the run drew nothing and spent nothing."
    return (
        f"({at_most(summary['epsilon'])}, {summary['delta']:.3g})-differentially private, adding or removing one unit."
    )


def evaluation_table(
    rows: dict[str, dict[str, Any]],
    title: str = "On public prompts",
    outside: Collection[str] = (),
    *,
    full: bool = False,
    transposed: bool = False,
) -> Table:
    """One row per model, with the columns that were measured.

    Args:
        outside: columns whose numbers no privacy guarantee covers; the table says so, and of models of epsilon inf.
        full: all columns and intervals, instead of those that fit a narrow terminal.
        transposed: one column per model.
    """
    columns = {c: v for c, v in (FULL if full else BRIEF).items() if any(c in row for row in rows.values())}
    if not full and "text_loss" in columns:
        columns.pop("completion_length", None)  # both are too wide for 80 columns
    headers: list[Cell]
    headers = [f"{header}\n({OUTSIDE})" if c in outside else header for c, (header, _) in columns.items()]
    names: list[Cell] = [plain(labelled(name, row)) for name, row in rows.items()]
    cells: list[list[Cell]]
    cells = [
        [cell(row, c, decimals, full=full).replace("[", "\\[") for c, (_, decimals) in columns.items()]  # no markup
        for row in rows.values()
    ]
    if transposed:
        headers, names, cells = names, headers, [list(column) for column in zip(*cells, strict=True)]
    missing = [printable(sentence) for sentence in unscored(rows)]
    table = Table(title=plain(title), caption=plain("\n".join(missing), lines=True) if missing else None)
    table.add_column("" if transposed else "model", overflow="fold")
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    for name, row in zip(names, cells, strict=True):
        table.add_row(name, *row)
    return table


def print_evaluation(rows: dict[str, dict[str, Any]], title: str, outside: Collection[str], notes: list[str]) -> None:
    """The full table and notes below; a column per model on a terminal that is too narrow for a row per model."""
    console = Terminal()
    table = evaluation_table(rows, title, outside, full=True)
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    if needed > console.width and console.is_terminal:
        table = evaluation_table(rows, title, outside, full=True, transposed=True)
    elif needed > console.width:
        console = Terminal(width=needed)  # a file keeps its lines whole
    console.print(table)
    for note in notes:
        console.say(note)


def labelled(name: str, row: dict[str, Any]) -> str:
    """The model's name, with a label if its own statement says that it was trained without privacy."""
    return f"{name} ({OUTSIDE})" if row.get("epsilon") == math.inf else name


def cell(row: Mapping[str, Any], column: str, decimals: int, *, full: bool) -> str:
    """A number as text, with its interval if the table is the full one or the column always shows it."""
    value, half = row.get(column), row.get(f"{column}_ci95", math.nan)
    if value is None:
        return "baseline" if column == "win_rate" else ""
    if math.isnan(value):
        return "-"
    if column == "epsilon":
        return f"{value:.{decimals}g}"
    text = f"{value:.{decimals}f}"
    if column == "win_rate":
        return f"{text} [{row['win_rate_low']:.{decimals}f}, {row['win_rate_high']:.{decimals}f}]"
    shown = (full or column in WITH_INTERVAL) and not math.isnan(half)
    return f"{text} ± {half:.{decimals}f}" if shown else text


def unscored(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each model with completions that a reward could not score: its mean is of the others."""
    return [
        f"the {reward} could not score {row[key]} of {row['prompts']} completions of {name}"
        for name, row in rows.items()
        for key, reward in (("unscored", "reward"), ("reference_unscored", "reference reward"))
        if row.get(key)
    ]
