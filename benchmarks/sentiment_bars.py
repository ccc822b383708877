"""What a sweep of the sentiment quickstart says of its bars: share of the non-private gain kept, as the paper counts and at equal KL.

    dpalign sweep recipes/quickstart_sentiment.yaml --epsilons 0 free 1 2:1 4 8:1 inf --seeds 3 --at inf ppo.beta=0.042 \
        --at 1 ppo.beta=0.04 --output_dir runs/sentiment
    python benchmarks/sentiment_bars.py runs/sentiment/runs.jsonl

DP-RLOO beside DP-PPO, at equal privacy, units, steps and rollouts:

    dpalign sweep recipes/quickstart_sentiment_rloo.yaml --epsilons 4 1 --seeds 1 --at 1 rloo.beta=0.04 --output_dir runs/rloo
    python benchmarks/sentiment_bars.py runs/sentiment/runs.jsonl --beside runs/rloo/runs.jsonl

`share`: gain over the pretrained model divided by that of the runs at inf of the first file. It favours whoever drifted further below
the common KL limit. `share at equal KL`: the same of gain / sqrt(KL), for the best reward at a KL grows about as its square root
(Gao et al. 2022, arXiv 2210.10760). Every run's own number is printed too: its spread over runs shows how well that holds.
Intervals are 95% bootstrap: seeds are drawn with replacement, and each run gets the sampling error of its prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

DRAWS = 20_000


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rewards(runs: list[dict], generator: np.random.Generator | None = None) -> np.ndarray:
    """`(draws, runs)` rewards of runs drawn with replacement; without a generator, `(1, runs)` the runs themselves."""
    value = np.array([r["reward"] for r in runs])[None]
    if generator is None:
        return value
    error = np.array([r["reward_ci95_prompts"] / 1.96 for r in runs])
    return value + error * generator.standard_normal((DRAWS, len(runs)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="runs.jsonl of the sweep")
    parser.add_argument(
        "--beside", type=Path, nargs="*", default=[], help="runs.jsonl of other sweeps, to print beside it"
    )
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    given = parser.parse_args(arguments)
    first = read(given.runs)
    base = [r for r in first if r["epsilon"] == "0"]

    def gain(runs: list[dict], per_nat: bool, generator: np.random.Generator | None = None) -> np.ndarray:
        """Mean gain over the pretrained model, or of gain / sqrt(KL); `(draws,)`."""
        found = rewards(runs, generator) - rewards(base, generator).mean(1, keepdims=True)
        if per_nat:
            found = found / np.sqrt([r["kl"] for r in runs])
        if generator is None:
            return found.mean(1)
        picked = generator.integers(len(runs), size=found.shape)
        return np.take_along_axis(found, picked, 1).mean(1)

    without = [r for r in first if r["epsilon"] == "inf"]
    result = {}
    for epsilon in sorted({r["epsilon"] for r in first} - {"0"}, key=lambda e: 0.0 if e == "free" else float(e)):
        runs = [r for r in first if r["epsilon"] == epsilon]
        row = {"seeds": len(runs), "gain": float(gain(runs, False)[0]), "kl": float(np.mean([r["kl"] for r in runs]))}
        row["gain_per_root_nat"] = float(gain(runs, True)[0])
        for name, per_nat in (("share", False), ("share_at_equal_kl", True)):
            generator = np.random.default_rng(0)
            ratio = gain(runs, per_nat, generator) / gain(without, per_nat, generator)
            row[name] = float(gain(runs, per_nat)[0] / gain(without, per_nat)[0])
            row[f"{name}_interval"] = [float(x) for x in np.quantile(ratio, [0.025, 0.975])]
        result[epsilon] = row
        print(f"epsilon {epsilon}: " + json.dumps(row))
    each = [
        {
            "recipe": Path(r["recipe"]).stem, "overrides": r["overrides"], "epsilon": r["epsilon"], "seed": r["seed"],
            "reward": r["reward"], "kl": r["kl"], "gain_per_root_nat": float(gain([r], True)[0]), "seconds": r["seconds"],
        }
        for path in (given.runs, *given.beside)
        for r in read(path)
        if r["epsilon"] != "0"
    ]  # fmt: skip
    for row in each:
        print(json.dumps(row))
    if given.output:
        given.output.write_text(json.dumps({"rows": result, "runs": each}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
