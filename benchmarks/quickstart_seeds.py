"""The quickstart over several seeds, with and without privacy: mean and 95% interval of every measured number.

    .venv/bin/python benchmarks/quickstart_seeds.py --seeds 3

Each finished run is appended as one JSON line to --output; runs that are there already are skipped, so the same
command goes on after an interruption. The seed moves initial weights; sampling, noise and rollouts come from the
operating system each time. The intervals use Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from scipy.stats import t as student

MEASURED = (
    "reward_pretrained", "reward_sft", "reward_private", "reward_nonprivate", "gain", "gain_nonprivate", "share",
    "kl", "kl_nonprivate", "perplexity_ratio", "distinct_2_ratio", "seconds", "peak_memory_mb", "epsilon",
)  # fmt: skip


def measured(summary: dict) -> dict:
    """The summary with the derived numbers."""
    row = dict(summary)
    row["gain"] = row["reward_private"] - row["reward_sft"]
    row["gain_nonprivate"] = row["reward_nonprivate"] - row["reward_sft"]
    row["share"] = row["gain"] / row["gain_nonprivate"] if row["gain_nonprivate"] else math.nan
    row["perplexity_ratio"] = row["perplexity"] / row["perplexity_sft"]
    row["distinct_2_ratio"] = row["distinct_2"] / row["distinct_2_sft"]
    return {name: row[name] for name in MEASURED}


def interval(values: list[float]) -> float:
    """Half-width of the 95% interval of the mean."""
    if len(values) < 2:
        return float("nan")
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_seeds.jsonl"))
    parser.add_argument("overrides", nargs="*", help="recipe fields after --, such as --ppo.max_steps 8")
    given = parser.parse_args(arguments)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if given.output.exists():
        done = {row["seed"]: row for row in map(json.loads, given.output.read_text().splitlines())}
    for seed in range(given.seeds):
        if seed in done:
            continue
        folder = given.output.parent / f"{given.output.stem}-{seed}"
        command = [sys.executable, "-m", "dpalign", "quickstart", "--compare", "--json", "--output_dir", str(folder)]
        command += ["--sft.seed", str(seed), "--ppo.seed", str(seed), *given.overrides]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = {"seed": seed, **measured(json.loads(finished.stdout))}
        with given.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        done[seed] = row
        print(json.dumps(row), flush=True)
    rows = [done[seed] for seed in range(given.seeds)]
    for name in MEASURED:
        values = [float(row[name]) for row in rows]
        print(f"{name:20s} {statistics.mean(values):9.4f} ± {interval(values):.4f}")


if __name__ == "__main__":
    main()
