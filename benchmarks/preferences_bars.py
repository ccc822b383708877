"""What a sweep of the preferences quickstart says of the bars: accuracy of the DP reward model and share of the gain kept.

    dpalign reward_model recipes/quickstart_preferences.yaml --target_epsilon inf --output_dir runs/reference --reward_model.seed 7 \
        --reward_model.adapter.r 4 --reward_model.learning_rate 1e-2
    dpalign sweep recipes/quickstart_preferences.yaml --epsilons 0 free 1 4 inf --seeds 3 --output_dir runs/preferences \
        --reference_reward.source reward_model:runs/reference/reward_model
    python benchmarks/preferences_bars.py runs/preferences/runs.jsonl

The first command trains a reference reward model without privacy on the same pairs, of another kind than the recipe's (LoRA,
another seed), so that no policy has been trained against it. Gains are over each run's own SFT model, under that reference.
Intervals are 95% bootstrap: seeds are drawn with replacement, and each mean gets the sampling error of its prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

DRAWS = 20_000


def gains(rows: list[dict], generator: np.random.Generator | None = None) -> np.ndarray:
    """Mean gain over SFT under the reference reward; with a generator, `(draws,)` bootstrap means."""
    value = np.array([r["reference_reward"] - r["before"]["sft"]["reference_reward"] for r in rows])
    if generator is None:
        return value.mean()
    error = np.array([r["before"]["sft"]["reference_reward_ci95"] * 2**0.5 / 1.96 for r in rows])
    picked = generator.integers(len(rows), size=(DRAWS, len(rows)))
    return (value[picked] + error[picked] * generator.standard_normal(picked.shape)).mean(1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    given = parser.parse_args(arguments)
    rows = [json.loads(line) for line in given.runs.read_text(encoding="utf-8").splitlines()]
    by_epsilon = {e: [r for r in rows if r["epsilon"] == e] for e in {r["epsilon"] for r in rows} - {"0", "free"}}  # those have no SFT model
    without = by_epsilon["inf"]
    accuracy = {e: float(np.mean([r["reward_model"]["accuracy"] for r in v])) for e, v in by_epsilon.items()}
    result = {}
    for epsilon, found in sorted(by_epsilon.items(), key=lambda item: float(item[0])):
        generator = np.random.default_rng(0)
        gain, share = gains(found, generator), gains(found, generator) / gains(without, generator)
        kl, kl_without = np.mean([r["kl"] for r in found]), np.mean([r["kl"] for r in without])
        result[epsilon] = {
            "seeds": len(found),
            "gain_over_sft": float(gains(found)),
            "gain_interval": [float(x) for x in np.quantile(gain, [0.025, 0.975])],
            "share_of_nonprivate_gain": float(gains(found) / gains(without)),
            "share_interval": [float(x) for x in np.quantile(share, [0.025, 0.975])],
            "reward_model_accuracy": accuracy[epsilon],
            "accuracy_ratio": accuracy[epsilon] / accuracy["inf"],
            "kl": float(kl),
            "kl_ratio": float(kl / kl_without),
            "seconds": float(np.mean([r["seconds"] for r in found])),
        }
        print(f"epsilon {epsilon}: " + json.dumps(result[epsilon]))
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
