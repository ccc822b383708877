"""What private data buys: free, private and non-private side by side, on tasks where people's judgement matters.

    .venv/bin/python benchmarks/what_privacy_buys.py --data DATA --output buys.jsonl --json

DATA holds the sets of free_and_private_reward.py, and sms (`person`, `text`): docs/results/free_and_private_reward.md
says whence the former, the NUS SMS Corpus (Chen and Kan 2013) is `kite1988/nus-sms-corpus`.

Rewards: agreement with people on texts that nothing else read, as free_and_private_reward.py measures it (SmolLM2's
features are computed once, and kept in --cache); the unit is a pair, or a person with all that they judged: the mean
of their pairs' votes, scaled to norm 1. The policy that follows from a reward is best of 16, in standard deviations of
a judge that has learned from texts that nothing else saw; what is free is there the best of the free rewards in
hindsight. Messages: SFT of the embedded model by the command, with a
ledger of its own; what is free is that model as it came, and the measure is minus the loss on other people's messages,
in nats per token. What is not private is the same run for both units: who does not protect has no unit.

A task is admitted if non-private is above free by more than three intervals; the others are named. In the simulated
queries noise is seeded and carries no guarantee. --output is appended to, and a run goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import free_and_private_reward as judged
import numpy as np

from dpalign.data.names import same_text
from dpalign.parsing import recipe_from
from dpalign.privacy import accountant
from dpalign.run import run_recipe

MESSAGES = "text messages"
APART = {"polite requests": 3.0, "inoffensive posts": 1.0}  # of one person's votes, for a pair
PERSONS = {*APART, "e-mails"}
MOST_PAIRS = 50  # of a person
INTERVALS = 3
NONPRIVATE = "nonprivate"
ALONG = {"freeze_a": True, "init_a": "activations"}
# Of SFT on messages, by unit: expected sample, steps, learning rate, adapter; looked for on another split (seed 50), as
# docs/results/what_privacy_buys.md says. Who does not protect has no unit.
SFT: dict[str, tuple[int, int, float, dict[str, Any]]] = {
    "record": (512, 48, 2e-2, {"r": 4}),
    "person": (128, 8, 4e-2, {"r": 1, **ALONG}),
    NONPRIVATE: (512, 48, 2e-2, {"r": 4}),
}


# Rewards --------------------------------------------------------------------------------------------------------------


def judgements(name: str, args: argparse.Namespace, of: set[int], rng: np.random.Generator) -> list[np.ndarray]:
    """For each person `(pairs, 2)` texts, the better one first, among the texts `of`."""
    rows = judged.shuffled(args.data / f"{judged.TASKS[name].file}.jsonl.gz")
    people: dict[str, list[tuple[int, float]]] = {}
    if name == "e-mails":  # whoever revised an e-mail holds the result for the better one
        half = args.texts // 2
        found: dict[str, list[tuple[int, int]]] = {}
        for place, row in enumerate(rows[:half]):
            if row["person"] and {place, half + place} <= of:
                found.setdefault(row["person"], []).append((half + place, place))
        return [np.array(pairs) for pairs in found.values()]
    for place, row in enumerate(rows[: args.texts]):
        if place in of:
            for person, vote in row["votes"]:
                value = -float(vote) if name == "inoffensive posts" else float(vote)  # 1 is offensive
                people.setdefault(person, []).append((place, value))
    found_pairs = []
    for votes in people.values():
        pairs = [(a, b) for a, high in votes for b, low in votes if high - low >= APART[name]]
        if pairs:
            found_pairs.append(np.array(pairs)[rng.permutation(len(pairs))[:MOST_PAIRS]])
    return found_pairs


def reward_runs(
    name: str, unit: str, args: argparse.Namespace, wanted: list[int], reader: list[judged.Reader]
) -> Iterator[dict[str, Any]]:
    """One row for each split and epsilon of a task whose people judge texts."""
    data = judged.prepare(name, args, reader)
    for seed in wanted:
        rng = np.random.default_rng(100 + seed)
        order = rng.permutation(len(data.scores))
        cut = len(order) * 4 // 5
        held = order[cut:]
        if unit == "person":
            people = judgements(name, args, {*order[:cut].tolist()}, rng)
        else:
            people = [pair[None] for pair in judged.disjoint_pairs(data.scores, order[:cut], data.gap, rng)]

        def measured(weights: np.ndarray, joined: dict[str, np.ndarray], seed: int = seed, held: np.ndarray = held):
            right = judged.agreement(joined["texts"] @ weights, data.scores, held, data.gap, seed)
            return right, float(data.gain(joined["completions"] @ weights).mean())

        def asked(sigma: float, draw: int, seed: int = seed, people: list[np.ndarray] = people):
            joined = judged.joined_coordinates(data, len(people), sigma)
            texts = joined["texts"]
            votes = np.stack([(texts[pairs[:, 0]] - texts[pairs[:, 1]]).mean(0) for pairs in people])
            return measured(judged.query(votes, sigma, np.random.default_rng([seed, draw])), joined)

        free, _ = measured(np.ones(2), data.free)
        best_free = max(float(np.mean(gains)) for gains in judged.free_choices(data).values())  # in hindsight
        nonprivate, best_nonprivate = asked(0.0, 0)
        for epsilon in args.epsilons:
            sigma = accountant.noise_multiplier(epsilon, judged.DELTA, sampling_rate=1.0, steps=1)
            found = np.array([asked(sigma, draw) for draw in range(args.draws)]).mean(0)
            row = {"task": name, "unit": unit, "epsilon": epsilon, "seed": seed, "units": len(people), "sigma": sigma}
            row |= {"free": free, "private": float(found[0]), "nonprivate": nonprivate}
            yield row | {
                "policy_free": best_free, "policy_private": float(found[1]), "policy_nonprivate": best_nonprivate
            }  # fmt: skip


# Messages -------------------------------------------------------------------------------------------------------------


def message_runs(
    unit: str, args: argparse.Namespace, wanted: list[int], done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """SFT on four fifths of the people, measured on messages of the rest; what `done` knows is not run again."""
    for seed in wanted:
        seen = [row for row in done if row["task"] == MESSAGES and row["seed"] == seed]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            own = write_messages(folder, seed, args)
            if seen:
                base, nonprivate = -seen[0]["free"], -seen[0]["nonprivate"]
            else:
                base, nonprivate = message_losses(folder, NONPRIVATE, math.inf, seed, args)
            for epsilon in args.epsilons:
                if (unit, epsilon) in [(row["unit"], row["epsilon"]) for row in seen]:
                    continue
                row = {"task": MESSAGES, "unit": unit, "epsilon": epsilon, "seed": seed}
                row["units"] = len({r["person"] for r in own}) if unit == "person" else len(own)
                private = message_losses(folder, unit, epsilon, seed, args)[1]
                yield row | {"free": -base, "private": -private, "nonprivate": -nonprivate}


def write_messages(folder: Path, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Those of four fifths of the people, which are returned, in private.jsonl, and some of the others' in public.jsonl."""
    rows = judged.shuffled(args.data / "sms.jsonl.gz")
    rng = np.random.default_rng(seed)
    people = rng.permutation(sorted({row["person"] for row in rows}))
    public = {*people[: max(1, len(people) // 5)]}
    shown = [row for row in rows if row["person"] in public][: args.measured]
    known = {same_text(row["text"]) for row in shown}  # "ok", say: nobody's secret, and refused by a run
    own = [row for row in rows if row["person"] not in public and same_text(row["text"]) not in known]
    for file, kept in (("private.jsonl", own), ("public.jsonl", shown)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return own


def message_losses(folder: Path, kind: str, epsilon: float, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Nats per token of other people's messages: before SFT and after."""
    batch, steps, rate, adapter = SFT[kind]
    adapter = adapter | {"init_rows": min(512, args.most_sampled)}
    settings: dict[str, Any] = {
        "model.name_or_path": args.base, "model.is_public": "true",
        "output_dir": folder / f"run-{kind}-{epsilon}", "ledger": folder / "ledger.sqlite", "target_epsilon": epsilon,
        "target_delta": judged.DELTA, "data.name": "messages", "data.path": folder / "private.jsonl",
        "data.eval_path": folder / "public.jsonl", "data.eval_is_public": "true", "eval_prompts": args.measured,
        "sft.expected_batch_size": min(batch, args.most_sampled), "sft.max_steps": min(steps, args.most_steps),
        "sft.learning_rate": rate, "sft.max_length": 24, "sft.seed": seed, "sft.adapter": json.dumps(adapter),
        "sft.prepend_bos": "true", "sft.micro_batch_size": 64, "sft.lr_scheduler_type": "linear",
    }  # fmt: skip
    if kind == "person":
        settings |= {"data.unit": "person", "data.max_records_per_unit": args.of_a_person}
    recipe = recipe_from("sft", [part for name, value in settings.items() for part in (f"--{name}", str(value))])
    evaluation = run_recipe(recipe).to_json()["evaluation"]
    return evaluation["pretrained"]["text_loss"], evaluation["sft"]["text_loss"]


# Together -------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task, unit and epsilon: means over seeds, and the closed gap with its 95% interval.

    A policy's row has `policy: best of 16`, and the judge's standard deviations for a measure.
    """
    found = []
    for key in dict.fromkeys((row["task"], row["unit"], row["epsilon"]) for row in rows):
        these = [row for row in rows if (row["task"], row["unit"], row["epsilon"]) == key]
        for prefix in ("", "policy_"):
            if f"{prefix}free" not in these[0]:
                continue
            values = {n: np.array([row[f"{prefix}{n}"] for row in these]) for n in ("free", "private", "nonprivate")}
            mean = {n: round(float(value.mean()), 4) for n, value in values.items()}
            whole, bought = values["nonprivate"] - values["free"], values["private"] - values["free"]
            admitted = len(these) > 1 and float(whole.mean()) > INTERVALS * interval(whole)
            gap = float(bought.mean() / whole.mean()) if admitted else None
            found.append(
                {
                    "task": key[0], "unit": key[1], "epsilon": key[2],
                    **({"policy": "best of 16"} if prefix else {}), **mean, "admitted": admitted,
                    "closed_gap": None if gap is None else round(gap, 4),
                    # The seeds' own ratio: the delta method on differences that share a split.
                    "ci95": None if gap is None else round(interval(bought - gap * whole) / float(whole.mean()), 4),
                    "units": round(float(np.mean([row["units"] for row in these]))), "seeds": len(these),
                }
            )  # fmt: skip
    return found


def interval(values: np.ndarray) -> float:
    """Half-width, 95%, of a mean over seeds."""
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    judged.add_arguments(parser)
    tasks = [*judged.TASKS, MESSAGES]
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks)
    parser.add_argument("--units", nargs="+", default=["record", "person"], choices=["record", "person"])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", default="tiny-review-lm", help="model of SFT on messages")
    parser.add_argument("--measured", type=int, default=1000, help="other people's messages")
    parser.add_argument("--of_a_person", type=int, default=8, help="messages of a person in SFT")
    parser.add_argument("--most_sampled", type=int, default=100_000, help="units of an SFT step")
    parser.add_argument("--most_steps", type=int, default=100_000, help="of SFT")
    args = parser.parse_args(argv)
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    reader: list[judged.Reader] = []
    for task, unit in [(task, unit) for task in args.tasks for unit in args.units]:
        if unit == "person" and task not in {*PERSONS, MESSAGES}:
            continue  # nobody says who judged
        done = [(row["seed"], row["epsilon"]) for row in rows if (row["task"], row["unit"]) == (task, unit)]
        wanted = [seed for seed in range(args.seeds) if not {(seed, e) for e in args.epsilons} <= {*done}]
        if not wanted:
            continue
        runs = (
            message_runs(unit, args, wanted, rows)
            if task == MESSAGES
            else reward_runs(task, unit, args, wanted, reader)
        )
        for row in runs:
            if (row["seed"], row["epsilon"]) not in done:
                rows.append(row)
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    found = table(rows)
    for row in found:
        kind = row.get("policy", "SFT" if row["task"] == MESSAGES else "reward")
        gap = "not admitted" if row["closed_gap"] is None else f"closed {row['closed_gap']:.2f} +-{row['ci95']:.2f}"
        print(
            f"{row['task']:17} {row['unit']:6} {kind:10} epsilon {row['epsilon']:3}, "
            f"{row['units']:6} units: free {row['free']:.3f}, private {row['private']:.3f}, non-private "
            f"{row['nonprivate']:.3f}; {gap}"
        )
    if args.json:
        print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
