"""Reward models on people's judgements of arguments (UKPConvArg1): which of two arguments convinces more?

    .venv/bin/python benchmarks/ukp_convincingness.py --data ukpconvarg1_full.jsonl.gz

Trains one DP reward model for each privacy unit and epsilon. Units: `pair`, one pair of arguments with the better one
by the crowd's gold label; and `annotator`, one person with at most --max-votes of that person's votes (ties count
half). A pair is the weaker promise: about 1,000 arguments make 12,792 pairs, so one argument is in many units.
Compares with a logistic regression on the difference of log word counts, trained without privacy on the same records,
and with "the longer argument wins".

A quarter of the 32 topics is held out as a whole (those whose names have the smallest SHA-256), so no test argument
was seen in training; the test pairs, those with a gold label, count as public. An annotator may have voted in both.
Two 95% intervals: over pairs as if they were independent, and over the topics' accuracies (Student's t), which is the
honest one, for few arguments make many pairs.

Each finished run is appended as one JSON line to --output; runs that are there already are skipped, and an unfinished
one goes on where it was. All of it is public research data playing private. The settings were not tuned on the test
topics: they are those of the preference quickstart, with lengths and steps that take about 4 minutes a run on 2 quiet
cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits sleeps instead of spinning

import argparse
import gzip
import hashlib
import json
import math
import re
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.stats import t as student

from dpalign.algorithms import RewardModelConfig
from dpalign.data import DataConfig
from dpalign.data.load import Record
from dpalign.evaluation import evaluate_pairs
from dpalign.evaluation.preferences import agreement
from dpalign.files import dumps
from dpalign.models import AdapterConfig, ModelConfig, RewardModel
from dpalign.recipe import Recipe
from dpalign.run import run_recipe

UNITS = ("pair", "annotator")
HELD_OUT = 0.25
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the logistic regression


# Data ----------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Record]:
    """Pairs with topic, arg1, arg2, votes and gold, as in the file."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def held_out(topics: set[str]) -> set[str]:
    """A quarter of the topics, by the hash of their names."""
    by_hash = sorted(topics, key=lambda topic: hashlib.sha256(topic.encode()).digest())
    return set(by_hash[: round(HELD_OUT * len(topics))])


def gold_pairs(rows: list[Record]) -> list[Record]:
    """The pairs that have a better argument; `chosen` is that one."""
    pairs = []
    for row in rows:
        if row["gold"] in ("a1", "a2"):
            better, worse = ("arg1", "arg2") if row["gold"] == "a1" else ("arg2", "arg1")
            pairs.append({"topic": row["topic"], "chosen": row[better], "rejected": row[worse], "preference": 1.0})
    return pairs


def votes(rows: list[Record]) -> list[Record]:
    """Every vote with its annotator in `unit`; 0.5 for a tie."""
    preference = {"a1": 1.0, "equal": 0.5, "a2": 0.0}
    return [
        {
            "topic": row["topic"], "unit": annotator, "chosen": row["arg1"], "rejected": row["arg2"],
            "preference": preference[vote],
        }
        for row in rows
        for annotator, vote in row["votes"]
    ]  # fmt: skip


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(difference: np.ndarray | torch.Tensor, pairs: list[Record]) -> dict[str, float]:
    """Agreement of the score differences chosen - rejected `(pairs,)`, and its interval over topics."""
    difference = torch.as_tensor(difference)
    result = agreement(difference, torch.ones(len(pairs))).as_dict()
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    topics = sorted({pair["topic"] for pair in pairs})
    means = [float(right[[i for i, pair in enumerate(pairs) if pair["topic"] == t]].mean()) for t in topics]
    return result | {
        "accuracy_of_topics": statistics.mean(means),
        "accuracy_of_topics_ci95": float(student.ppf(0.975, len(means) - 1))
        * statistics.stdev(means)
        / len(means) ** 0.5,
    }


def measure_model(folder: Path, pairs: list[Record]) -> dict[str, float]:
    """Of a released reward model. Every argument is scored once: few arguments make many pairs."""
    model = RewardModel.load(ModelConfig(name_or_path=str(folder)))
    arguments = sorted({text for pair in pairs for text in (pair["chosen"], pair["rejected"])})
    score = dict(zip(arguments, model.score(arguments).tolist(), strict=True))
    difference = torch.tensor([score[pair["chosen"]] - score[pair["rejected"]] for pair in pairs])
    some = pairs[:: max(1, len(pairs) // 64)]  # the same numbers as dpalign's own evaluation gives
    assert math.isclose(
        evaluate_pairs(model, some).margin,
        statistics.mean(score[pair["chosen"]] - score[pair["rejected"]] for pair in some),
        rel_tol=1e-3, abs_tol=1e-5,
    )  # fmt: skip
    return measure(difference, pairs)


# Baselines -----------------------------------------------------------------------------------------------------------


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z']+|[0-9]+|[^\sa-z0-9]", text.lower()))


def count_differences(pairs: list[Record], vocabulary: dict[str, int]) -> csr_matrix:
    """`(pairs, words)` log-counts of `chosen` minus those of `rejected`."""
    rows, columns, values = [], [], []
    for i, pair in enumerate(pairs):
        for text, sign in ((pair["chosen"], 1.0), (pair["rejected"], -1.0)):
            for word, count in words(text).items():
                if word in vocabulary:
                    rows.append(i)
                    columns.append(vocabulary[word])
                    values.append(sign * math.log1p(count))
    return csr_matrix((values, (rows, columns)), shape=(len(pairs), len(vocabulary)))


def logistic_regression(x: csr_matrix, preference: np.ndarray, penalty: float) -> np.ndarray:
    """Weights `(words,)`; no intercept, because swapping two arguments swaps the answer."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ weights
        value = np.logaddexp(0, z) - preference * z
        slope = 1 / (1 + np.exp(-z)) - preference
        return value.sum() + penalty / 2 * weights @ weights, x.T @ slope + penalty * weights

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x


def bag_of_words(train: list[Record], test: list[Record]) -> tuple[np.ndarray, float]:
    """Score differences of the test pairs, and the penalty that did best on a quarter of the training topics."""

    def fit(records: list[Record], others: list[Record], penalty: float) -> np.ndarray:
        texts = {text for r in records for text in (r["chosen"], r["rejected"])}
        counts = Counter(word for text in texts for word in words(text))
        known = {word: i for i, word in enumerate(sorted(word for word, c in counts.items() if c > 1))}
        preference = np.array([r["preference"] for r in records])
        weights = logistic_regression(count_differences(records, known), preference, penalty)
        return count_differences(others, known) @ weights

    kept = held_out({r["topic"] for r in train})
    inner = [r for r in train if r["topic"] not in kept]
    check = [r for r in train if r["topic"] in kept and r["preference"] != 0.5]
    sign = np.array([1.0 if r["preference"] > 0.5 else -1.0 for r in check])
    best = max(PENALTIES, key=lambda penalty: float((fit(inner, check, penalty) * sign > 0).mean()))
    return fit(train, test, best), best


def longer_wins(pairs: list[Record]) -> np.ndarray:
    return np.array([float(len(pair["chosen"]) - len(pair["rejected"])) for pair in pairs])


# Runs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What identifies a run; a line of the output with equal settings is not run again."""

    unit: str
    epsilon: float
    model: str
    seed: int
    expected_batch_size: int
    max_steps: int
    max_length: int
    max_records_per_unit: int
    learning_rate: float
    rank: int

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.unit}-eps{self.epsilon:g}-seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def train(settings: Settings, records: list[Record], test: list[Record], folder: Path, args: argparse.Namespace):
    """One run, and what the output keeps of it."""
    started = time.monotonic()
    by_annotator = settings.unit == "annotator"
    recipe = Recipe(
        output_dir=str(folder / settings.key),
        ledger=str(folder / "ledger.sqlite"),
        model=ModelConfig(name_or_path=settings.model, is_public=True),
        target_epsilon=settings.epsilon,
        num_threads=args.threads,
        device=args.device,
        reward_model_data=DataConfig(
            name=f"ukpconvarg1-{settings.unit}s", unit="unit" if by_annotator else None,
            max_records_per_unit=settings.max_records_per_unit, is_demo=True,
        ),
        reward_model=RewardModelConfig(
            expected_batch_size=settings.expected_batch_size, max_steps=settings.max_steps, seed=settings.seed,
            micro_batch_size=8 if by_annotator else 32, max_length=settings.max_length, prepend_bos=True,
            pooling="mean", clipping_gamma=2.0,
            learning_rate=settings.learning_rate, lr_scheduler_type="linear", adam_beta2=0.99,
            adapter=AdapterConfig(r=settings.rank),
        ),
    )  # fmt: skip
    summary = run_recipe(recipe, records={"reward_model": records}).to_json()
    (stage,) = summary["stages"]
    (mechanism,) = stage["mechanisms"]
    return asdict(settings) | {
        "key": settings.key,
        "units": stage["units"],
        "records": len(records),
        "q": mechanism["sampling_rate"],
        "sigma": mechanism["noise_multiplier"],
        "epsilon_spent": summary["epsilon"],
        "delta": summary["delta"],
        **measure_model(Path(summary["reward_model_release"]), test),
        "seconds": round(time.monotonic() - started, 1),
    }


def settings_of(unit: str, epsilon: float, seed: int, args: argparse.Namespace) -> Settings:
    by_annotator = unit == "annotator"
    return Settings(
        unit=unit, epsilon=epsilon, model=args.model, seed=seed,
        expected_batch_size=args.annotator_batch_size if by_annotator else args.pair_batch_size,
        max_steps=args.annotator_steps if by_annotator else args.pair_steps,
        max_length=args.max_length, max_records_per_unit=args.max_votes if by_annotator else 1,
        learning_rate=args.learning_rate_inf if math.isinf(epsilon) else args.learning_rate, rank=args.rank,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="ukpconvarg1_full.jsonl(.gz)")
    parser.add_argument("--output", type=Path, default=Path("runs/ukp_convincingness.jsonl"))
    parser.add_argument("--model", default="tiny-review-lm", help="folder of a public causal LM")
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[4.0, 8.0, math.inf])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pair-batch-size", type=int, default=256)
    parser.add_argument("--pair-steps", type=int, default=20)
    parser.add_argument("--annotator-batch-size", type=int, default=128)
    parser.add_argument("--annotator-steps", type=int, default=12)
    parser.add_argument("--max-votes", type=int, default=8, help="votes of one annotator that count")
    parser.add_argument("--max-length", type=int, default=96, help="tokens; of a longer argument the last ones")
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--learning-rate-inf", type=float, default=3e-2, help="of the runs without privacy")
    parser.add_argument("--rank", type=int, default=0, help="of an adapter beside the head")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="two small steps, to see that it works; own output file")
    args = parser.parse_args(arguments)
    if args.quick:
        args.output = args.output.with_stem(f"{args.output.stem}_quick")
        args.pair_batch_size, args.pair_steps = 64, 2
        args.annotator_batch_size, args.annotator_steps, args.max_votes = 16, 2, 2
        args.max_length, args.epsilons = 48, args.epsilons[:1]
    torch.set_num_threads(args.threads)

    rows = read(args.data)
    topics = held_out({row["topic"] for row in rows})
    training = [row for row in rows if row["topic"] not in topics]
    test = gold_pairs([row for row in rows if row["topic"] in topics])
    records = {"pair": gold_pairs(training), "annotator": votes(training)}
    seen = {text for row in training for text in (row["arg1"], row["arg2"])}
    assert not seen & {text for pair in test for text in (pair["chosen"], pair["rejected"])}
    print(
        f"{len(records['pair'])} pairs with a better argument, {len(records['annotator'])} votes of "
        f"{len({r['unit'] for r in records['annotator']})} annotators; {len(test)} test pairs of {len(topics)} topics"
    )

    table: list[dict[str, Any]] = [{"key": "longer wins", **measure(longer_wins(test), test)}]
    for unit in args.units:
        difference, penalty = bag_of_words(records[unit], test)
        table.append({"key": f"bag of words, {unit}s", "penalty": penalty, **measure(difference, test)})
    for row in table:
        print(line(row), flush=True)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if args.output.exists():
        done = {row["key"]: row for row in map(json.loads, args.output.read_text().splitlines()) if "unit" in row}
    folder = args.output.with_suffix("")
    for seed in range(args.seeds):
        for unit in args.units:
            for epsilon in args.epsilons:
                settings = settings_of(unit, epsilon, seed, args)
                if settings.key not in done:
                    done[settings.key] = train(settings, records[unit], test, folder, args)
                    with args.output.open("a") as file:
                        file.write(dumps(done[settings.key], indent=None) + "\n")
                table.append(done[settings.key])
                print(line(table[-1]), flush=True)
    print(f"\n{'run':32}{'units':>7}{'q':>8}{'sigma':>8}{'accuracy':>19}{'over topics':>17}{'seconds':>9}")
    for row in table:
        print(line(row))


def line(row: dict[str, Any]) -> str:
    name = row["key"] if "unit" not in row else row["key"].rpartition("-")[0]
    budget = f"{row['units']:7g}{row['q']:8.4f}{row['sigma']:8.3f}" if "unit" in row else " " * 23
    accuracy = f"{row['accuracy']:10.3f} ± {row['accuracy_ci95']:.3f}"
    topics = f"{row['accuracy_of_topics']:8.3f} ± {row['accuracy_of_topics_ci95']:.3f}"
    return f"{name:32}{budget}   {accuracy} {topics}{row.get('seconds', ''):>9}"


if __name__ == "__main__":
    main()
