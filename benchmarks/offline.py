"""Offline alignment beside best-of-n sampling and RLOO: reward and KL on public prompts, with and without private data.

    .venv/bin/python benchmarks/offline.py --output runs/offline.jsonl

The embedded model, prompts that it writes itself, the public reward VADER; every stage samples as many completions and has,
but for the arm that says otherwise, the same adapter and optimiser. Reward, KL and perplexity are on public beginnings of movie snippets, one completion each; of
best-of-n the KL is its bound log n - (n-1)/n. The arms named `private` take their prompts from 9,605 snippets that play private, at epsilon 4; of
the one named `judge`, SmolLM2's answer to a question is the reward, and VADER measures what that does. A finished run is appended to --output as one JSON line and is not run again, so
the same command goes on after an interruption. It prints the table of docs/results/offline.md; for the runs beside it, without
a run of its own:

    .venv/bin/python benchmarks/offline.py --arms --output docs/results/offline.runs.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from dpalign.algorithms.completions import SamplingConfig
from dpalign.cli.generate import best_of
from dpalign.data.load import read_records
from dpalign.evaluation import public_prompts
from dpalign.models import ModelConfig, Policy, smollm2
from dpalign.models.generation import answers, padded
from dpalign.parsing import recipe_from
from dpalign.rewards import RewardConfig, load_reward
from dpalign.run import run_recipe

PUBLIC = "demo:movie-snippets/public"
LENGTHS = {"prepend_bos": True, "prompt_max_tokens": 5, "max_prompt_length": 6, "max_completion_length": 16}
STAGE = LENGTHS | {
    "prompts": "self_written", "micro_batch_size": 64, "learning_rate": 8e-3, "lr_scheduler_type": "linear",
    "adam_beta2": 0.99, "adapter": {"r": 1, "lora_alpha": 4, "freeze_a": True, "init_a": "synthetic_gradient"},
}  # fmt: skip
WORDS = {
    "method": "conditional", "num_generations": 4, "good": "A wonderful", "bad": "A terrible", "max_prompt_length": 10,
}  # fmt: skip
PRIVATE = {"prompts": "private", "num_generations": 4, "expected_batch_size": 512}
JUDGED = {"source": "judge", "is_public": True, "questions": ["Does the author like the film?"]}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # stage, and what it has beside STAGE
    "filtered, best of 4": ("offline", {"method": "filtered", "num_generations": 4}),
    "filtered, best of 16": ("offline", {"method": "filtered", "num_generations": 16}),
    "weighted, 16 at 0.2": ("offline", {"method": "weighted", "num_generations": 16, "reward_temperature": 0.2}),
    "conditional, 4": ("offline", WORDS),
    "conditional, 4, rank 8": ("offline", WORDS | {"learning_rate": 5e-3, "adapter": {"r": 8}}),
    "conditional, 4, rank 8, 30 updates": (
        "offline",
        WORDS | {"learning_rate": 1e-2, "max_steps": 30, "adapter": {"r": 8}},
    ),
    "filtered, best of 4, judge": ("offline", {"method": "filtered", "num_generations": 4, "reward": JUDGED}),
    "filtered, best of 4, private": ("offline", PRIVATE | {"method": "filtered"}),
    "weighted, 4 at 0.2, private": ("offline", PRIVATE | {"method": "weighted", "reward_temperature": 0.2}),
    "conditional, 4, rank 8, private": (
        "offline",
        PRIVATE | WORDS | {"learning_rate": 5e-3, "adapter": {"r": 8}},
    ),
    "rloo, beta 0.2": ("rloo", {"beta": 0.2, "num_generations": 4}),
    "rloo, beta 0.1": ("rloo", {"beta": 0.1, "num_generations": 4}),
}
SAMPLED = {"best of 4": 4, "best of 16": 16}


def trained(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """What one stage has made of the model, and what it was before."""
    name, own = ARMS[arm]
    prompts = max(1, given.completions // own["num_generations"])
    private, reward = own.get("prompts") == "private", own.get("reward")
    section = STAGE | {"expected_batch_size": prompts, "max_steps": given.steps} | own
    if "init_a" in section["adapter"]:
        section["adapter"] = section["adapter"] | {"init_rows": given.init_rows}
    if private:
        section["expected_batch_size"] = min(section["expected_batch_size"], given.most_sampled)
    if reward is not None:
        section["reward"] = reward | {"source": f"judge:{given.judge or smollm2.fetch()}"}
    folder = given.output.with_suffix("") / "".join(c if c.isalnum() else "_" for c in arm)
    folder.mkdir(parents=True, exist_ok=True)
    recipe: dict[str, Any] = {
        "output_dir": str(folder / "run"), "ledger": str(folder / "ledger.sqlite"), "target_epsilon": 4 if private else math.inf,
        "model": {"name_or_path": given.model, "is_public": True}, "eval_prompts": given.prompts, name: section,
        "data": {"eval_path": PUBLIC, "eval_is_public": True}, "reference_reward": {"source": "vader"},
    }  # fmt: skip
    if private:
        recipe["data"] |= {"name": "demo-movie-snippets", "path": "demo:movie-snippets/private", "is_demo": True}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe).replace("Infinity", '"inf"'), encoding="utf-8")  # JSON is YAML
    measured = run_recipe(recipe_from("run", [str(path)])).to_json()["evaluation"]
    return {"start": by_vader(measured["pretrained"]), "measured": by_vader(measured[name])}


def by_vader(row: dict[str, Any]) -> dict[str, Any]:
    """With VADER's score for the reward, whatever the policy has learned from; `learned_from` is that."""
    learned_from = {"learned_from": row["reward"], "learned_from_ci95": row["reward_ci95"]}
    return row | learned_from | {"reward": row["reference_reward"], "reward_ci95": row["reference_reward_ci95"]}


def chosen(count: int, given: argparse.Namespace) -> dict[str, Any]:
    """The best of `count` samples for each public prompt."""
    policy, reward = Policy.load(ModelConfig(name_or_path=given.model)), load_reward(RewardConfig())
    config = SamplingConfig(**LENGTHS)
    prompts = public_prompts(policy, read_records(PUBLIC), config, given.prompts).prompts
    many = [prompt for prompt in prompts for _ in range(count)]
    torch.manual_seed(0)
    texts = answers(policy, many, policy.sample(*padded(policy, many), config.max_completion_length))
    rows = best_of(count, [{} for _ in many], reward([prompt.text for prompt in many], texts))
    scores = torch.tensor([row["score"] for row in rows])
    half = 1.96 * float(scores.std()) / math.sqrt(len(scores))
    return {
        "measured": {"reward": float(scores.mean()), "reward_ci95": half, "kl": math.log(count) - (count - 1) / count}
    }


def run(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    found = chosen(SAMPLED[arm], given) if arm in SAMPLED else trained(arm, given)
    size: dict[str, Any] = {"prompts": given.prompts}
    if arm in ARMS:
        size |= {"steps": ARMS[arm][1].get("max_steps", given.steps), "completions": given.completions}
    return {"arm": arm, **size, **found, "seconds": round(time.monotonic() - began, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for what all began with, then one for each arm."""

    def line(name: str, row: dict[str, Any], seconds: object = "") -> str:
        kl = f"{row['kl']:.2f} ± {row['kl_ci95']:.2f}" if "kl_ci95" in row else f"at most {row['kl']:.2f}"
        more = f"{row['perplexity']:.1f} | {row['distinct_2']:.3f}" if "perplexity" in row else " | "
        return f"| {name} | {row['reward']:.3f} ± {row['reward_ci95']:.3f} | {kl} | {more} | {seconds} |"

    start = next((row["start"] for row in rows if "start" in row), None)
    lines = ["| | reward | KL (nats) | perplexity | distinct-2 | seconds |", "|---|---|---|---|---|---|"]
    lines += [line("the model as it comes", start | {"kl_ci95": 0.0})] if start else []
    lines += [line(row["arm"], row["measured"], row["seconds"]) for row in rows]
    for row in rows:
        if "reward" in ARMS.get(row["arm"], ("", {}))[1]:
            said = (f"{row[k]['learned_from']:.3f} ± {row[k]['learned_from_ci95']:.3f}" for k in ("start", "measured"))
            lines += ["", f"{row['arm']}: its own reward went from {' to '.join(said)}."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=[*SAMPLED, *ARMS], default=[*SAMPLED, *ARMS])
    parser.add_argument("--completions", type=int, default=256, help="that an update samples")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=500, help="public ones to measure on")
    parser.add_argument("--init_rows", type=int, default=512)
    parser.add_argument("--model", default="tiny-review-lm")
    parser.add_argument("--judge", help="folder of the model behind the arm `judge`; default: SmolLM2")
    parser.add_argument("--most_sampled", type=int, default=100_000, help="private prompts of an update")
    parser.add_argument("--output", type=Path, default=Path("runs/offline.jsonl"))
    given = parser.parse_args(arguments)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    lines = given.output.read_text(encoding="utf-8").splitlines() if given.output.exists() else []
    rows = [json.loads(line) for line in lines]
    for arm in given.arms:
        if not any(row["arm"] == arm for row in rows):
            rows.append(run(arm, given))
            with open(given.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
