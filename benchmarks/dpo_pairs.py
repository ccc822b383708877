"""DP-DPO on the movie-snippet pairs of the preferences quickstart: how often its implicit reward agrees with people.

    .venv/bin/python benchmarks/dpo_pairs.py --epsilons 4 inf --seeds 3 --at inf dpo.learning_rate=1e-2

Each run is `dpalign run recipes/quickstart_dpo.yaml` with an epsilon, a seed and overrides; a finished one is appended to
--output as one JSON line and is not run again, so the same command goes on after an interruption. Accuracy is on the 500
public pairs, which no run has read. It prints one line for each epsilon and set of overrides: the mean over seeds, its standard error, and the ratio to the best
set without privacy. A set of one seed that was picked as the best of many flatters itself: --least leaves such sets out.
The runs of docs/results/dpo_pairs.runs.jsonl, without a run of its own:

    .venv/bin/python benchmarks/dpo_pairs.py --seeds 0 --least 8 --output docs/results/dpo_pairs.runs.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart_dpo.yaml"


def run(epsilon: str, seed: int, overrides: list[str], folder: Path) -> dict:
    """One run in a process of its own."""
    name = "-".join(["".join(c if c.isalnum() or c in ".-" else "_" for c in o) for o in overrides])
    output = folder / f"epsilon-{epsilon}-seed-{seed}{'-' * bool(name)}{name}"
    words = [word for o in overrides for word in (f"--{o.split('=')[0]}", o.split("=", 1)[1])]
    command = [sys.executable, "-m", "dpalign", "run", str(RECIPE), "--json", "--target_epsilon", epsilon]
    command += ["--dpo.seed", str(seed), "--output_dir", str(output), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout)
    return {
        "epsilon": epsilon,
        "seed": seed,
        "overrides": overrides,
        **summary["dpo"],
        "noise_multiplier": summary["stages"][0]["mechanisms"][0]["noise_multiplier"],
        "spent": summary["epsilon"],
        "seconds": summary.get("seconds"),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilons", nargs="+", default=["4", "inf"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--all", nargs="*", default=[], metavar="FIELD=VALUE", help="overrides of every run")
    parser.add_argument("--at", nargs="+", action="append", default=[], metavar=("EPSILON", "FIELD=VALUE"))
    parser.add_argument(
        "--least", type=int, default=1, help="only sets of at least so many seeds are compared and printed"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/dpo_pairs.jsonl"))
    given = parser.parse_args(arguments)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    lines = given.output.read_text().splitlines() if given.output.exists() else []
    rows = [json.loads(line) for line in lines]
    only = {epsilon: fields for epsilon, *fields in given.at}
    for seed in range(given.seeds):
        for epsilon in given.epsilons:
            asked = {"epsilon": epsilon, "seed": seed, "overrides": [*given.all, *only.get(epsilon, [])]}
            if not any(asked.items() <= row.items() for row in rows):
                rows.append(run(epsilon, seed, asked["overrides"], given.output.with_suffix("")))
                with open(given.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    sets: dict[tuple, list[dict]] = {}
    for row in rows:
        sets.setdefault((row["epsilon"], tuple(row["overrides"])), []).append(row)
    full = {key: found for key, found in sets.items() if len(found) >= given.least}
    means = {key: statistics.mean(r["accuracy"] for r in found) for key, found in full.items()}
    best = max((mean for (epsilon, _), mean in means.items() if epsilon == "inf"), default=float("nan"))
    for (epsilon, overrides), found in sorted(full.items(), key=lambda item: (item[0][0], -means[item[0]])):
        accuracies = [r["accuracy"] for r in found]
        mean = means[epsilon, overrides]
        error = statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else float("nan")
        print(
            f"epsilon {epsilon} {' '.join(overrides)}: accuracy {mean:.4f}, standard error {error:.4f} over "
            f"{len(found)} seeds, {mean / best:.3f} of the best without privacy"
        )


if __name__ == "__main__":
    main()
