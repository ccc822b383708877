"""Plots of what is private by construction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def read_metrics(path: Path, stage: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one stage, the last attempt of each step, in order of steps."""
    if not path.exists():
        return []
    by_step = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["stage"] == stage and row["noised_metrics"]:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]


def plot_noised_reward(runs: dict[str, Path], target: Path, *, half_range: float, count: int, divisor: float) -> None:
    """The noised mean reward of each step, with the standard deviation of its noise as a band.

    Args:
        runs: label and metrics.jsonl of each run.
        half_range: half the declared range of the reward; count: number of metrics in the block;
        divisor: expected batch size. The noise on the metric is half_range sqrt(count) sigma_m / divisor.
    """
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, path in runs.items():
        rows = read_metrics(path, "ppo")
        if not rows:
            continue
        steps = [row["step"] for row in rows]
        values = [row["noised_metrics"]["reward"] for row in rows]
        noise = [half_range * math.sqrt(count) * row["metrics_noise_multiplier"] / divisor for row in rows]
        (line,) = axes.plot(steps, values, marker=".", label=label)
        low = [v - n for v, n in zip(values, noise, strict=True)]
        high = [v + n for v, n in zip(values, noise, strict=True)]
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    axes.set(xlabel="PPO update", ylabel="noised mean reward (band: one standard deviation of its noise)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
