"""The report of a sweep: means and 95% intervals over seeds, a table, Markdown and the privacy-utility figure."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from ..evaluation.closed_gap import closed_gap
from ..files import write_text
from ..printable import code_span, figure_text
from ..results import FREE, PAIRS
from .numbers import all_runs
from .terminal import plain

SINGLE = "* one run: its interval is over prompts"
AVERAGED = ("reference_reward", "kl", "perplexity", "distinct_2", "completion_length", "text_loss")
TEXT_LOSS_AFTER = "text_loss_after_"  # a stage before the last one


def summarize_sweep(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per epsilon and varied value: means over seeds; `share`, how much of the non-private gain is kept.

    The interval of a mean over seeds is Student's t; that of a single run is over its prompts, and says so. A share is
    (reward - reward at epsilon 0) / (reward at inf - reward at epsilon 0), where both were run; `bought`, what the
    private data bought over the free row, with `closed_gap` of (private - free) / (non-private - free).
    """
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["epsilon"], run["value"]), []).append(run)
    rows = []
    for (epsilon, value), found in groups.items():
        rewards = [float(r["reward"]) for r in found]
        row: dict[str, Any] = {
            "epsilon": epsilon if epsilon in ("inf", FREE) else float(epsilon),
            "reward_mean": statistics.mean(rewards),
            "reward_ci95": interval(rewards) if len(found) > 1 else found[0]["reward_ci95_prompts"],
            "interval_over": "seeds" if len(found) > 1 else "prompts",
            "seeds": len(found),
        }
        if value is not None:
            row["value"] = value
        for name in AVERAGED:
            values = [float(r[name]) for r in found if r.get(name) is not None]
            if values:
                row[name] = statistics.mean(values)
                row[f"{name}_ci95"] = interval(values)
        accuracies = [float(r[PAIRS]["accuracy"]) for r in found if r.get(PAIRS)]
        if accuracies:
            row["reward_model_accuracy"] = statistics.mean(accuracies)
            row["reward_model_accuracy_ci95"] = interval(accuracies)
        row |= _before_the_last(found)
        if found[0].get("noise_multipliers"):
            row["noise_multipliers"] = found[0]["noise_multipliers"]
        seconds = [float(r["seconds"]) for r in found if r.get("seconds") is not None]
        if seconds:
            row["seconds"] = statistics.mean(seconds)
        rows.append(row)
    _add_shares(rows)
    _add_gaps(rows, list(groups.values()))
    return rows


def _before_the_last(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Mean rewards of what the last stage started from, by its name: `reward_sft`, where that is what came before."""
    earlier = [list(run["before"].items())[-1] for run in runs if run.get("before")]
    means = {}
    for name in ("reward", "reference_reward"):
        values = [float(measured[name]) for _, measured in earlier if measured.get(name) is not None]
        if values:
            means[f"{name}_{earlier[0][0]}"] = statistics.mean(values)
    losses = [float(measured["text_loss"]) for _, measured in earlier if measured.get("text_loss") is not None]
    return means | ({f"{TEXT_LOSS_AFTER}{earlier[0][0]}": statistics.mean(losses)} if losses else {})


def _add_shares(rows: list[dict[str, Any]]) -> None:
    for value in {r.get("value") for r in rows}:
        same = [r for r in rows if r.get("value") == value]
        ends = {r["epsilon"]: r for r in same if r["epsilon"] in (0.0, "inf")}
        measure, _ = _compared(rows)
        if len(ends) < 2 or not all(measure in r for r in same):
            continue
        low, high = ends[0.0][measure], ends["inf"][measure]
        for row in same:
            if row["epsilon"] not in (0.0, "inf", FREE) and high != low:
                row["share"] = (row[measure] - low) / (high - low)


def _add_gaps(rows: list[dict[str, Any]], groups: list[list[dict[str, Any]]]) -> None:
    """To every private row what it bought, where the free one was run with the same value."""
    measure = _compared(rows)[0].removesuffix("_mean")
    means = {}
    for row, found in zip(rows, groups, strict=True):
        values = [float(run[measure]) for run in found if run.get(measure) is not None]
        half = interval(values) if len(values) > 1 else found[0].get(f"{measure}_ci95_prompts")
        if len(values) == len(found) and half is not None:
            means[row["epsilon"], row.get("value")] = {measure: statistics.mean(values), f"{measure}_ci95": half}
    for row in rows:
        value = row.get("value")
        own, free, whole = (means.get((epsilon, value)) for epsilon in (row["epsilon"], FREE, "inf"))
        if row["epsilon"] in (0.0, "inf", FREE) or own is None or free is None:
            continue
        gap = closed_gap(measure, free, own, whole)
        if gap is not None:
            row |= gap.as_dict() | {"bought": gap.sentences()}


def bought_sentences(result: dict[str, Any], *, without_nonprivate: bool = False) -> list[str]:
    """What the private data bought, by epsilon and varied value.

    Args:
        without_nonprivate: leaves out what is computed from runs without privacy.
    """
    said = []
    for row in result["rows"]:
        label = f"epsilon {row['epsilon']:g}" if "bought" in row else ""
        label += f", {result['varied']} {row['value']}" if label and "value" in row else ""
        sentences = row.get("bought", [])
        said += [f"{label}: {sentence}" for sentence in sentences[: 1 if without_nonprivate else None]]
    return said


def _compared(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The measure that runs are compared by, and its interval: a learned reward has another scale in every run."""
    learned = any("reward_model_accuracy" in r for r in rows)
    return ("reference_reward", "reference_reward_ci95") if learned else ("reward_mean", "reward_ci95")


def spent_sentence(entry: dict[str, Any]) -> str:
    """What choosing by the results of a sweep costs, `entry` as `account` gives it."""
    exact, cost = entry["runs_without_privacy"], f"{all_runs(entry)} at delta {entry['delta']:.3g}"
    if entry["demo_data"]:
        meaning = f"had it been private data, choosing by these results would have cost {cost}"
        meaning += ", and no bound at all for the runs without privacy" if exact else ""
    elif exact:
        meaning = f"the private ones together {cost}, but these results show runs without privacy too: do not publish "
        meaning += "them, and what was chosen by them has no guarantee"
    else:
        meaning = f"choosing by these results costs {cost}: quote it with whatever you release"
    runs = f"{entry['runs']} runs on {entry['dataset']!r}, {exact} of them without privacy"
    return f"The ledger has {runs}: {meaning}."


def interval(values: list[float]) -> float:
    """Half-width of the 95% interval of the mean (Student's t); NaN for one value."""
    if len(values) < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def mean(name: str, digits: int) -> str:
        half = row.get(f"{name}_ci95", math.nan)
        mean_of = row["reward_mean"] if name == "reward" else row[name]
        return f"{mean_of:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    epsilon = row["epsilon"] if row["epsilon"] in ("inf", FREE) else f"{row['epsilon']:g}"
    cells = {"epsilon": epsilon}
    if "value" in row:
        cells["value"] = row["value"]
    cells["reward"] = mean("reward", 3) + ("" if row["interval_over"] == "seeds" else "*")
    if "share" in row:
        cells["share"] = f"{row['share']:.2f}"
    if row.get("closed_gap") is not None:
        cells["closed gap"] = f"{row['closed_gap']:.2f} ± {row['closed_gap_ci95']:.2f}"
    elif "bought" in row and "nonprivate" in row:
        cells["closed gap"] = "not defined"
    for name, heading, digits in (
        ("reference_reward", "reference reward", 3),
        ("reward_model_accuracy", "reward model accuracy", 3),
        ("kl", "KL (nats)", 2),
        ("perplexity", "perplexity", 1),
        ("distinct_2", "distinct-2", 3),
        ("text_loss", "text loss", 3),
    ):
        if name in row:
            cells[heading] = mean(name, digits)
    cells |= {after(name): f"{value:.3f}" for name, value in row.items() if name.startswith(TEXT_LOSS_AFTER)}
    sigmas = row.get("noise_multipliers") or {}
    if any(float(s) for s in sigmas.values()):
        cells["sigma"] = ", ".join(f"{stage} {float(sigma):.3f}" for stage, sigma in sigmas.items())
    cells["seeds"] = str(row["seeds"])
    return cells


def after(name: str) -> str:
    """The heading of a loss on texts before the last stage."""
    return f"text loss after {name.removeprefix(TEXT_LOSS_AFTER)}"


def grid(result: dict[str, Any]) -> tuple[list[str], list[dict[str, str]]]:
    """Headings, and the cells of each row by them."""
    rows = [_cells(row) for row in result["rows"]]
    order = (
        "epsilon",
        "value",
        "reward",
        "share",
        "closed gap",
        "reference reward",
        "reward model accuracy",
        "KL (nats)",
        "perplexity",
        "distinct-2",
        *dict.fromkeys(after(name) for row in result["rows"] for name in row if name.startswith(TEXT_LOSS_AFTER)),
        "text loss",
        "sigma",
        "seeds",
    )
    return [name for name in order if any(name in row for row in rows)], rows


def sweep_table(result: dict[str, Any]) -> Table:
    """For the terminal."""
    headings, rows = grid(result)
    # These are in sweep.md and sweep.json; a terminal is narrow.
    headings = [h for h in headings if h != "sigma" and not h.startswith("text loss after")]
    table = Table(title="Mean and 95% interval over seeds, on public prompts", caption=SINGLE)
    for heading in headings:
        name = result["varied"] if heading == "value" else heading
        table.add_column(plain(str(name)), justify="right")
    for row in rows:
        table.add_row(*[plain(row.get(heading, "")) for heading in headings])
    return table


def write_markdown(target: Path, result: dict[str, Any]) -> None:
    """The same table with the command that made it."""
    headings, rows = grid(result)
    names = [code_span(str(result["varied"])) if h == "value" else h for h in headings]
    rows = [row | {"value": code_span(row["value"])} if "value" in row else row for row in rows]
    lines = [
        code_span(result["command"]),
        "",
        "Mean and 95% interval over seeds (Student's t; * one run: its interval is over prompts), on public prompts. "
        "`share` is the part of the non-private gain over the pretrained model that is kept"
        + ("; `closed gap`, (private - free) / (non-private - free)." if "closed gap" in headings else "."),
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(headings)}",
        *[f"| {' | '.join(row.get(h, '') for h in headings)} |" for row in rows],
        "",
        *[f"- {code_span(sentence)}" for sentence in bought_sentences(result)],
        *([""] if bought_sentences(result) else []),
        *[code_span(entry["sentence"]) for entry in result["spent_by_tuning"]],
    ]
    write_text(target, "\n".join(lines) + "\n")


def plot_sweep(result: dict[str, Any], target: Path) -> None:
    """Reward against epsilon with intervals, the pretrained model and the run without privacy as lines; or against the
    varied field's values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    rows = result["rows"]
    measure, interval_of = _compared(rows)
    if not all(measure in row for row in rows):
        measure, interval_of = "reward_mean", "reward_ci95"
    label = {"reward_mean": "reward", "reference_reward": "reference reward"}[measure]

    def half(row: dict[str, Any]) -> float:
        return 0.0 if math.isnan(row[interval_of]) else row[interval_of]

    if result["varied"]:
        labels = [
            figure_text(r["value"] if len({x["epsilon"] for x in rows}) == 1 else f"{r['value']} (ε {r['epsilon']})")
            for r in rows
        ]
        axes.errorbar(labels, [r[measure] for r in rows], [half(r) for r in rows], fmt="o", capsize=4)
        axes.set(xlabel=figure_text(result["varied"]), ylabel=label)
    else:
        middle = sorted((r for r in rows if r["epsilon"] not in (0.0, "inf", FREE)), key=lambda r: r["epsilon"])
        epsilons = [r["epsilon"] for r in middle]
        axes.errorbar(
            epsilons,
            [r[measure] for r in middle],
            [half(r) for r in middle],
            marker="o",
            capsize=4,
            label="private",
        )
        for end, name, style in (
            ("inf", "without privacy", "--"),
            (0.0, "pretrained (epsilon 0)", ":"),
            (FREE, "free", "-."),
        ):
            for row in (r for r in rows if r["epsilon"] == end):
                line = axes.axhline(row[measure], linestyle=style, color="gray", label=name)
                axes.axhspan(row[measure] - half(row), row[measure] + half(row), alpha=0.12, color=line.get_color())
        if epsilons:
            axes.set_xscale("log", base=2)
            axes.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        axes.set(xlabel="epsilon", ylabel=f"{label} (95% interval)")
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
