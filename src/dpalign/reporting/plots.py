"""Plots of what is private by construction, and of what was measured on public prompts."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ..files import read_lines
from ..printable import figure_text
from .tables import OUTSIDE, labelled

MARKERS = "osD^vP*X"


def read_metrics(path: Path, stage: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one stage, the last attempt of each step, in order of steps."""
    rows = [row for row in read_lines(path) if row.get("stage") == stage and _metrics(row)]
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _metrics(row: dict[str, Any]) -> dict[str, float] | None:
    """Noised ones, or of a stage that draws nothing those of the text that the model has written itself."""
    return row.get("noised_metrics") or row.get("own_text_metrics")


def plot_reward(
    runs: dict[str, Path], target: Path, *, stage: str, half_range: float, count: int, divisor: float
) -> None:
    """The mean reward of each step; where people's prompts were drawn it is noised, in a band of the noise's deviation.

    Args:
        runs: label and metrics.jsonl of each run. stage: the one that samples.
        half_range: half the declared range of the reward; count: number of metrics in the block;
        divisor: expected batch size. The noise on the metric is half_range sqrt(count) sigma_m / divisor.
    """
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    said = "mean reward on prompts that the model wrote itself"
    for label, path in runs.items():
        rows = read_metrics(path, stage)
        if not rows:
            continue
        if rows[0].get("noised_metrics"):
            said = "noised mean reward (band: one standard deviation of its noise)"
        steps = [row["step"] for row in rows]
        values = [found["reward"] for row in rows if (found := _metrics(row))]
        noise = [half_range * math.sqrt(count) * row.get("metrics_noise_multiplier", 0.0) / divisor for row in rows]
        (line,) = axes.plot(steps, values, marker=".", label=figure_text(label))
        low = [v - n for v, n in zip(values, noise, strict=True)]
        high = [v + n for v, n in zip(values, noise, strict=True)]
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    axes.set(xlabel=f"update of stage {stage}", ylabel=said)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def plot_evaluation(
    rows: dict[str, dict[str, Any]], target: Path, *, title: str, outside: Collection[str] = ()
) -> None:
    """Reward against KL, one labelled point per model with bars of its 95% intervals; a second panel for the reference
    reward if it was measured.

    Args:
        rows: evaluations by model.
        outside: columns that no privacy guarantee covers; title and panel say so, and of models of epsilon inf
            the legend.
    """
    panels = {"reward": "reward"}
    if any("reference_reward" in row for row in rows.values()):
        panels["reference_reward"] = "reference reward"
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.8), layout="constrained", squeeze=False
    )
    for axes, (key, label) in zip(grid[0], panels.items(), strict=True):
        for number, (name, row) in enumerate(rows.items()):
            half = {k: _bar(row.get(f"{k}_ci95")) for k in ("kl", key)}
            bar = axes.errorbar(
                row["kl"],
                row[key],
                xerr=half["kl"],
                yerr=half[key],
                fmt=MARKERS[number % len(MARKERS)],
                capsize=3,
                label=figure_text(labelled(name, row)),
            )
            axes.annotate(
                figure_text(name),
                (row["kl"], row[key]),
                textcoords="offset points",
                xytext=(6, 5),
                fontsize=8,
                color=bar[0].get_color(),
            )
        axes.set(xlabel="KL to the base model (nats per completion)", ylabel=f"mean {label} (bars: 95% intervals)")
        if key in outside:
            axes.set_title(f"{label}: {OUTSIDE}", color="firebrick", fontsize=10)
        axes.grid(alpha=0.3)
        axes.margins(0.15)
    grid[0][0].legend(fontsize=8)
    hidden = [label for key, label in panels.items() if key in outside]
    hidden += [name for name, row in rows.items() if row.get("epsilon") == math.inf]
    figure.suptitle(title + (f"\n{OUTSIDE}: {figure_text(', '.join(hidden))}" if hidden else ""), fontsize=11)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _bar(half: float | None) -> float | None:
    return None if half is None or math.isnan(half) else half
