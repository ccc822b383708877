"""A private reward from one query, and what DPO, RLOO and GRPO make of it without spending anything more.

    .venv/bin/python benchmarks/own_pairs.py --output runs/own_pairs.jsonl

The embedded model; people's pairs of movie snippets (demo data) become a reward by `reward_query` at epsilon 1. Then every
arm is trained against that one release on prompts that the model writes itself, with as many completions an update, the
same steps, adapter and optimiser: `dpo` on its own pairs (best against worst of n), `rloo`, `grpo`. So each policy has the
reward's guarantee and no more. Reward (on the reward model's scale: deviations of self-written text), KL and perplexity
are on public beginnings of snippets, one completion each; so is VADER's opinion, which nothing was trained against. A
finished run is appended to --output as one JSON line and is not run again, so the same command goes on after an
interruption. It prints the table of docs/results/own_pairs.md; for the runs beside it, without a run of its own:

    .venv/bin/python benchmarks/own_pairs.py --seeds 0 --output docs/results/own_pairs.runs.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from dpalign.parsing import recipe_from
from dpalign.run import run_recipe

DATA = "demo:movie-preferences"
STAGE = {
    "prompts": "self_written", "prepend_bos": True, "prompt_max_tokens": 5, "max_prompt_length": 6,
    "max_completion_length": 16, "micro_batch_size": 16, "lr_scheduler_type": "linear", "adam_beta2": 0.99,
    "adapter": {"r": 4, "lora_alpha": 8},
}  # fmt: skip
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo, best and worst of 4, beta 0.1": ("dpo", {"num_generations": 4, "beta": 0.1}),
    "dpo, best and worst of 4, beta 0.5": ("dpo", {"num_generations": 4, "beta": 0.5}),
    "rloo, beta 0.2": ("rloo", {"num_generations": 4, "beta": 0.2}),
    "grpo, beta 0.1": ("grpo", {"num_generations": 4, "beta": 0.1}),
}


def run(sections: dict[str, Any], folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The summary of a recipe of these sections; one that is done is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "output_dir": str(folder / "run"), "ledger": str(given.folder / "ledger.sqlite"), "eval_prompts": given.prompts,
        "model": {"name_or_path": given.model, "is_public": True, "dtype": "float32"}, "target_delta": 1e-5, "target_epsilon": given.epsilon,
        "units_disjoint": "declared", **sections,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return run_recipe(recipe_from("run", [str(path)])).to_json()


def reward_of(seed: int, given: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The release of one private query, and what was spent and measured."""
    pairs = {"name": "demo-movie-pairs", "path": f"{DATA}/pairs", "is_demo": True}
    pairs |= {"eval_path": f"{DATA}/public_pairs", "eval_is_public": True}
    query = {"max_length": 40, "prepend_bos": True, "seed": seed}
    query |= {"own_texts": given.own_texts, "directions": given.directions}
    folder = given.folder / f"reward_{seed}"
    found = run({"reward_query": query, "reward_query_data": pairs}, folder, given)
    return folder / "run" / "reward_model", found


def trained(arm: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """What one arm has made of the model, and what it was before."""
    began = time.monotonic()
    release, query = reward_of(seed, given)
    name, own = ARMS[arm]
    section = STAGE | own | {"max_steps": given.steps, "learning_rate": given.learning_rate, "seed": seed}
    section |= {"expected_batch_size": max(1, given.completions // own["num_generations"])}
    section |= {"reward": {"source": f"reward_model:{release}"}}
    shown = {"eval_path": f"{DATA}/public_prompts", "eval_is_public": True, "is_demo": True}
    folder = given.folder / f"{''.join(c if c.isalnum() else '_' for c in arm)}_{seed}"
    done = run({name: section, "data": shown, "reference_reward": {"source": "vader"}}, folder, given)
    sizes = {"prompts": given.prompts, "steps": given.steps, "completions": given.completions}
    return {
        "arm": arm, "seed": seed, "epsilon": done["epsilon"], "drawn_by": [s["stage"] for s in done["stages"]], **sizes,
        "accuracy": query["reward_query"]["accuracy"], "start": done["evaluation"]["pretrained"],
        "measured": done["evaluation"][name], "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for what all began with, then one for each run."""

    def line(name: str, row: dict[str, Any], before: float, seconds: object) -> str:
        reward, vader = (f"{row[of]:.3f} ± {row[f'{of}_ci95']:.3f}" for of in ("reward", "reference_reward"))
        per_root_nat = f"{(row['reward'] - before) / math.sqrt(row['kl']):.2f}" if row["kl"] > 0 else ""
        cells = (name, reward, f"{row['kl']:.2f}", per_root_nat, vader, f"{row['perplexity']:.1f}", seconds)
        return f"| {' | '.join(map(str, cells))} |"

    lines = ["| | reward | KL (nats) | gain per root nat | VADER | perplexity | seconds |", "|---" * 7 + "|"]
    start = rows[0]["start"]
    lines.append(line("the model as it comes", start, start["reward"], ""))
    several = len({row["seed"] for row in rows}) > 1
    for row in rows:
        name = f"{row['arm']}, seed {row['seed']}" if several else row["arm"]
        lines.append(line(name, row["measured"], row["start"]["reward"], row["seconds"]))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epsilon", type=float, default=1.0, help="of the reward's one query")
    parser.add_argument("--completions", type=int, default=256, help="that an update samples")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--prompts", type=int, default=300, help="public ones to measure on")
    parser.add_argument("--own_texts", type=int, default=512, help="that show the reward its directions")
    parser.add_argument("--directions", type=int, help="of the reward; default: as many as its units and noise allow")
    parser.add_argument("--model", default="tiny-review-lm")
    parser.add_argument("--output", type=Path, default=Path("runs/own_pairs.jsonl"))
    given = parser.parse_args(arguments)
    given.folder = given.output.with_suffix("")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    lines = given.output.read_text(encoding="utf-8").splitlines() if given.output.exists() else []
    rows = [json.loads(line) for line in lines]
    for seed in given.seeds:
        for arm in given.arms:
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                rows.append(trained(arm, seed, given))
                with open(given.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
