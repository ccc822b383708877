"""What people's judgements add to a reward that needs nobody, at what epsilon: agreement with people, and best of 16.

    .venv/bin/python benchmarks/free_and_private_reward.py --data DATA --output rewards.jsonl --json

DATA holds sets of judged texts as gzipped JSON lines (docs/results/free_and_private_reward.md says whence):
politeness_requests (`text`, `score`), offensiveness_votes (`text`, `inoffensive`), movie_snippets (`text`, `mean`) and
email_rewrites (`original`, and `revised`, which is the better one). Features of SmolLM2-135M-Instruct are computed once
and kept in --cache (minutes on a GPU, an hour or more on two cores); everything after that takes seconds a split.

free: VADER and a contrast (discriminants between what the model writes when it is asked for the one and for the other),
each over its deviation on text that the model writes itself; their mean.
private: one Gaussian query over pairs as units, as the stage reward_query makes it: votes of norm 1 in the leading
directions of several layers and in the two free scores, and a step towards the free mean.
nonprivate: the same without noise. Directions, scales and layers come from self-written text alone.

Noise is seeded: for learning curves only, no guarantee attaches. --output is appended to, and a run goes on from it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpalign.algorithms.reward_query import FEWEST, OF_A_LAYER, PER_UNIT, PRIOR, free_share, whitening
from dpalign.models import smollm2
from dpalign.models.features import LASTS, MEANS
from dpalign.models.precision import faster_dtype
from dpalign.models.sampling import DrawToken
from dpalign.privacy import accountant
from dpalign.rewards.contrast import discriminants, upper_layers
from dpalign.settings.models import ModelConfig

DELTA = 1e-5
SHRINKAGE = 1.0  # the stage's default
OWN_TOKENS, NEW_TOKENS, MOST_TOKENS = 48, 24, 64
STARTS = 4  # words of a text of the judge's, behind which the model writes


@dataclass(frozen=True)
class Task:
    """file and column of people's scores, the gap that makes two texts a pair, what is asked of the model."""

    file: str
    column: str
    gap: float
    wanted: str
    unwanted: str


EDITOR = "request that an editor of an encyclopedia makes to another editor."
TASKS = {
    "polite requests": Task(
        "politeness_requests", "score", 0.5, f"Write one very polite {EDITOR}", f"Write one very rude {EDITOR}"
    ),
    "inoffensive posts": Task(
        "offensiveness_votes", "inoffensive", 0.4, "Write one friendly and respectful social media post.",
        "Write one offensive and insulting social media post.",
    ),
    "movie snippets": Task(
        "movie_snippets", "mean", 1.0, "Write one sentence of a very positive film review.",
        "Write one sentence of a very negative film review.",
    ),
    "e-mails": Task(
        "email_rewrites", "", 0.5, "Write one very polite short e-mail to a colleague.",
        "Write one very rude short e-mail to a colleague.",
    ),
}  # fmt: skip


# The model: once ------------------------------------------------------------------------------------------------------


class Reader:
    """SmolLM2 as a writer, and as a reader of texts."""

    def __init__(self, name: str, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        faster = faster_dtype(ModelConfig(name_or_path=name, is_public=True), device)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, faster)).to(device).eval()
        layers = self.model.config.num_hidden_layers
        self.read = [sorted({max(1, round(depth * layers)) for depth in depths}) for depths in (MEANS, LASTS)]
        self.contrasted = upper_layers(layers)
        self.means = sorted({*self.read[0], *self.contrasted})  # kept: means of these, then last tokens
        self.device, self.at_once = device, 64 if device == "cuda" else 32
        ends = {self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|endoftext|>")}
        self.ends = [token for token in ends if token is not None]
        self.front = next(t for t in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if t is not None)

    def ids(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.front, *tokens]

    def asked(self, text: str) -> list[int]:
        found = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        ids: list[int] = found["input_ids"]
        return ids

    def _batch(self, rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        fill = [[self.ends[0]] * (width - len(row)) for row in rows]
        ids = [f + r if left else r + f for f, r in zip(fill, rows, strict=True)]
        mask = [
            [0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f)
            for f, r in zip(fill, rows, strict=True)
        ]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    @torch.no_grad()
    def write(self, prompts: list[list[int]], tokens: int, seed: int) -> list[str]:
        """What the model writes behind each prompt, at temperature 1."""
        torch.manual_seed(seed)
        texts: list[str] = []
        rows = 4 * self.at_once  # more of them are nearly free: a token waits for the weights
        for start in range(0, len(prompts), rows):
            ids, mask = self._batch(prompts[start : start + rows], left=True)
            found = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, logits_processor=[DrawToken()],
                max_new_tokens=tokens, pad_token_id=self.ends[0], eos_token_id=self.ends,
            )  # fmt: skip
            texts += self.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def features(self, texts: list[str]) -> np.ndarray:
        """`(texts, maps, width)` float32: means over the tokens, and last tokens, in several layers."""
        rows_ids = [self.ids(text)[: MOST_TOKENS + 1] for text in texts]
        order = np.argsort([len(row) for row in rows_ids], kind="stable")  # rows of one length need no padding
        parts = []
        for start in range(0, len(texts), self.at_once):
            ids, mask = self._batch([rows_ids[n] for n in order[start : start + self.at_once]], left=False)
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            inner = mask.clone()
            inner[:, 0] = 0
            share = (inner / inner.sum(1, keepdim=True).clamp(min=1)).unsqueeze(2)
            rows, last = torch.arange(len(ids)), mask.sum(1) - 1
            maps = [(hidden[n].float() * share).sum(1) for n in self.means]
            maps += [hidden[n][rows, last].float() for n in self.read[1]]
            parts.append(torch.stack(maps, 1).cpu().numpy())
        found: np.ndarray = np.concatenate(parts)[np.argsort(order)]
        return found


def shuffled(file: Path) -> list[dict[str, Any]]:
    """The records of a set, always in the same order: the first ones are judged by people, the rest are the judge's."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    np.random.default_rng(7).shuffle(rows)  # type: ignore[arg-type]
    return rows


def judged(file: Path, task: Task, texts: int) -> tuple[list[str], list[float], list[tuple[str, float]], list[str]]:
    """Texts with people's scores, scores, the rest for the judge, and the beginnings of some of the rest."""
    rows = shuffled(file)
    if task.column:
        pairs = [(row["text"], float(row[task.column])) for row in rows]
        used, rest = pairs[:texts], pairs[texts:]
    else:
        half = texts // 2
        used = [(r["original"], 0.0) for r in rows[:half]] + [(r["revised"], 1.0) for r in rows[:half]]
        rest = [(r[side], value) for r in rows[half:] for side, value in (("original", 0.0), ("revised", 1.0))]
    starts = [" ".join(text.split()[:STARTS]) for text, _ in rest if len(text.split()) >= 8]
    return [t for t, _ in used], [s for _, s in used], rest, starts


def collect(name: str, args: argparse.Namespace, reader: list[Reader]) -> dict[str, Any]:
    """Texts and features of a task, from the cache or into it. Features are kept in 8 bits a number."""
    task, place = TASKS[name], args.cache / TASKS[name].file
    used, scores, rest, starts = judged(args.data / f"{task.file}.jsonl.gz", task, args.texts)
    if not place.with_suffix(".npz").exists():
        if not reader:
            reader.append(Reader(args.model or str(smollm2.fetch()), args.device))
        model, half = reader[0], args.own_texts // 4
        own = model.write([[model.front]] * args.own_texts, OWN_TOKENS, 0)
        good = model.write([model.asked(task.wanted)] * half, OWN_TOKENS, 1)
        bad = model.write([model.asked(task.unwanted)] * half, OWN_TOKENS, 2)
        prompts = [starts[number % len(starts)] for number in range(args.prompts)]  # again, where they are too few
        begun = [start for start in prompts for _ in range(args.best_of)]
        done = model.write([model.ids(start) for start in begun], NEW_TOKENS, 3)
        completions = [start + text for start, text in zip(begun, done, strict=True)]
        texts = {"texts": used, "good": good, "bad": bad, "completions": completions, "own": own}
        found = model.features([text for part in texts.values() for text in part])
        scale = np.percentile(np.abs(found), 99.9, axis=0) / 127 + 1e-9
        args.cache.mkdir(parents=True, exist_ok=True)
        place.with_suffix(".json").write_text(json.dumps(texts), encoding="utf-8")
        quantised = np.clip(np.round(found / scale), -127, 127).astype(np.int8)
        found_in = [model.means.index(layer) for layer in model.contrasted]
        read = [model.means.index(layer) for layer in model.read[0]]
        read += range(len(model.means), len(model.means) + len(model.read[1]))
        kept = {"scale": scale.astype(np.float32), "contrasted": found_in, "read": read}
        np.savez_compressed(place.with_suffix(".npz"), f=quantised, **kept)  # type: ignore[arg-type]
    texts = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
    kept = np.load(place.with_suffix(".npz"))
    parts = ["texts", "good", "bad", "completions", "own"]
    ends = np.cumsum([len(texts[part]) for part in parts])[:-1]
    features = dict(zip(parts, np.split(kept["f"] * kept["scale"], ends), strict=True))
    for values in (texts, features):  # a cache may hold more of them
        values["completions"] = values["completions"][: args.prompts * args.best_of]
    if texts["texts"] != used:
        raise SystemExit(f"{place}.json is of other texts: name another --cache.")
    layers = {name: kept[name] for name in ("contrasted", "read")}
    return {"features": features, "texts": texts, "scores": np.array(scores), "rest": rest} | layers


# The free reward, and the axes in which people vote: from self-written text alone ----------------------------------------


def over(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Standardised as the reference is; 0 where that is all alike."""
    spread = reference.std()
    standard: np.ndarray = (values - reference.mean()) / spread if spread else np.zeros(len(values))
    return standard


OWN = ("own", "good", "bad")


def free_scores(features: dict[str, np.ndarray], texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """`(texts, 2)`: VADER and contrast, from the features of the layers that a contrast reads."""
    words = SentimentIntensityAnalyzer()
    vader = {n: np.array([words.polarity_scores(t)["compound"] for t in texts[n]]) for n in features}
    sides = [torch.tensor(features[n]) for n in ("good", "bad", "own")]
    weights = discriminants(*sides)["weights"].numpy()
    contrast = {n: (features[n] * weights).sum((1, 2)) for n in features}
    both = []
    for score in (vader, contrast):
        reference = np.concatenate([score[n] for n in OWN])
        both.append({n: over(reference, score[n]) for n in features})
    return {n: np.stack([score[n] for score in both], 1) for n in features}


def axes(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`(texts, directions)`: in the directions that the query's votes are cast in, the leading one first."""
    own = torch.tensor(np.concatenate([features[n] for n in OWN]))
    most = min(own.shape[1] * min(OF_A_LAYER, own.shape[2]), len(own) - 1)
    directions = whitening(own, most, SHRINKAGE, 1).double().numpy()
    return {n: features[n].reshape(len(features[n]), -1) @ directions.T for n in features}


# The query --------------------------------------------------------------------------------------------------------------


def query(votes: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Sum of `(units, coordinates)` votes of norm 1, plus noise; plus the free mean's prior."""
    norms = np.linalg.norm(votes, axis=1, keepdims=True)
    total: np.ndarray = (votes / np.maximum(norms, 1e-12)).sum(0) + sigma * rng.standard_normal(votes.shape[1])
    total[-2:] += PRIOR * sigma * np.sqrt(votes.shape[1] / 2)  # two free scores
    return total


def disjoint_pairs(scores: np.ndarray, of: np.ndarray, gap: float, rng: np.random.Generator) -> np.ndarray:
    """`(pairs, 2)`, the better text first; no text is in two."""
    pool, found = list(rng.permutation(of)), []
    for _ in range(20):
        rng.shuffle(pool)
        left = pool[len(pool) // 2 * 2 :]
        for a, b in zip(pool[::2], pool[1::2], strict=False):
            if abs(scores[a] - scores[b]) >= gap:
                found.append((a, b) if scores[a] > scores[b] else (b, a))
            else:
                left += [a, b]
        pool = left
    return np.array(found)


def agreement(rewards: np.ndarray, scores: np.ndarray, of: np.ndarray, gap: float, seed: int) -> float:
    """Share of random pairs with a gap that are ordered as people have them; equal ones count half."""
    rng = np.random.default_rng(seed)
    a, b = rng.choice(of, 6000), rng.choice(of, 6000)
    far = np.abs(scores[a] - scores[b]) >= gap
    same = np.sign(rewards[a] - rewards[b])[far] * np.sign(scores[a] - scores[b])[far]
    return float(((same > 0) + 0.5 * (same == 0)).mean())


def judge(rest: Sequence[tuple[str, float]], texts: list[str]) -> np.ndarray:
    """Scores of texts by a ridge on TF-IDF words and word pairs, learned on texts that nothing else reads."""

    def grams(text: str) -> list[str]:
        words = re.findall(r"[a-z']+|[?!.,:]", text.lower())
        return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]

    documents = [grams(text) for text, _ in rest]
    frequency: dict[str, int] = {}
    for document in documents:
        for gram in set(document):
            frequency[gram] = frequency.get(gram, 0) + 1
    known = {gram: i for i, gram in enumerate(g for g, n in frequency.items() if n > 1)}
    weight = {gram: np.log(len(documents) / frequency[gram]) for gram in known}

    def matrix(documents: list[list[str]]) -> Any:
        place, columns, values = [], [], []
        for number, document in enumerate(documents):
            for gram in sorted(set(document) & known.keys()):
                place.append(number)
                columns.append(known[gram])
                values.append((1 + np.log(document.count(gram))) * weight[gram])
        found = sparse.csr_matrix((values, (place, columns)), shape=(len(documents), len(known)))
        norms = np.sqrt(np.asarray(found.multiply(found).sum(1)).ravel()) + 1e-9
        return sparse.diags(1 / norms) @ found

    seen, target = matrix(documents), np.array([score for _, score in rest])
    kernel = (seen @ seen.T).toarray() + np.eye(len(target))
    learned = seen.T @ np.linalg.solve(kernel, target - target.mean())
    return np.asarray(matrix([grams(text) for text in texts]) @ learned)


# One split --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Set:
    """A task, ready for splits. gains: the judge's standardised scores of completions, `(prompts, best_of)`."""

    free: dict[str, np.ndarray]
    axes: dict[str, np.ndarray]
    scores: np.ndarray
    gap: float
    judged: np.ndarray
    written: list[str]  # completions, without the people's words that they begin with

    def chosen(self, rewards: np.ndarray) -> np.ndarray:
        """`(prompts,)`: the place of the best completion by a reward."""
        best: np.ndarray = rewards.reshape(self.judged.shape).argmax(1)
        return best

    def gain(self, rewards: np.ndarray) -> np.ndarray:
        """`(prompts,)`: the judge's score of the best completion by a reward."""
        best = self.chosen(rewards)
        return self.judged[np.arange(len(best)), best]


def prepare(name: str, args: argparse.Namespace, reader: list[Reader]) -> Set:
    found = collect(name, args, reader)
    by_judge = judge(found["rest"], found["texts"]["completions"])
    standard = (by_judge - by_judge.mean()) / max(1e-9, by_judge.std())
    contrasted, read = (
        {name: maps[:, found[which]] for name, maps in found["features"].items()} for which in ("contrasted", "read")
    )
    free = free_scores(contrasted, found["texts"])
    written = [" ".join(text.split()[STARTS:]) for text in found["texts"]["completions"]]
    return Set(free, axes(read), found["scores"], TASKS[name].gap, standard.reshape(-1, args.best_of), written)


def joined_coordinates(data: Set, units: int, sigma: float) -> dict[str, np.ndarray]:
    """Texts in all that a vote is cast in: as many directions as the stage has, and the two free scores."""
    count = data.axes["own"].shape[1]
    if sigma:
        count = min(count, max(FEWEST, int(PER_UNIT * units / sigma)))
    share = free_share(units, sigma) / 2  # of each of the two
    return {n: np.concatenate([data.axes[n][:, :count], share * data.free[n]], 1) for n in ("texts", "completions")}


def show(data: Set, count: int, epsilon: float) -> None:
    """What the free mean and the query (first split and draw) choose for the first prompts, as a Markdown table."""
    rng = np.random.default_rng(100)
    order = rng.permutation(len(data.scores))
    pairs = disjoint_pairs(data.scores, order[: len(order) * 4 // 5], data.gap, rng)
    sigma = accountant.noise_multiplier(epsilon, DELTA, sampling_rate=1.0, steps=1)
    joined = joined_coordinates(data, len(pairs), sigma)
    votes = joined["texts"][pairs[:, 0]] - joined["texts"][pairs[:, 1]]
    weights = query(votes, sigma, np.random.default_rng([0, 0]))
    chosen = [data.chosen(rewards) for rewards in (data.free["completions"].sum(1), joined["completions"] @ weights)]
    print("| free | judge | private | judge |\n|---|---|---|---|")
    for prompt in range(count):
        cells = []
        for place in (int(best[prompt]) for best in chosen):
            text = data.written[prompt * data.judged.shape[1] + place]
            cells += [f"... {text}".replace("|", "/"), f"{data.judged[prompt, place]:+.2f}"]
        print(f"| {' | '.join(cells)} |")


FREE = {"vader": [1, 0], "contrast": [0, 1], "free": [1, 1]}


def split(data: Set, seed: int, most: int, epsilon: float, draws: int) -> dict[str, Any]:
    """Four fifths of the texts become pairs, agreement is measured on the rest; means over draws of the noise."""
    rng = np.random.default_rng(100 + seed)
    order = rng.permutation(len(data.scores))
    cut = len(order) * 4 // 5
    pairs, held = disjoint_pairs(data.scores, order[:cut], data.gap, rng)[:most], order[cut:]
    sigma = accountant.noise_multiplier(epsilon, DELTA, sampling_rate=1.0, steps=1)
    row: dict[str, Any] = {"pairs": len(pairs), "sigma": sigma, "prompts": len(data.judged)}
    for name, weights in FREE.items():
        row[name] = agreement(data.free["texts"] @ weights, data.scores, held, data.gap, seed)
    for name, noise, times in (("private", sigma, draws), ("nonprivate", 0.0, 1)):
        joined = joined_coordinates(data, len(pairs), noise)
        right, gains = [], []
        for draw in range(times):
            votes = joined["texts"][pairs[:, 0]] - joined["texts"][pairs[:, 1]]
            weights = query(votes, noise, np.random.default_rng([seed, draw]))
            right.append(agreement(joined["texts"] @ weights, data.scores, held, data.gap, seed))
            gains.append(data.gain(joined["completions"] @ weights))
        row[name], found = float(np.mean(right)), np.mean(gains, 0)
        row[f"best_{name}"] = found.round(2).tolist() if name == "private" else float(found.mean())
    return row


def free_choices(data: Set) -> dict[str, list[float]]:
    """The judge's score of the best completion of each prompt by what is free: the same for every split."""
    return {n: data.gain(data.free["completions"] @ weights).round(2).tolist() for n, weights in FREE.items()}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task, number of pairs and epsilon: means over splits, 95% intervals of differences."""
    found = []
    choices = {row["task"]: row["free_choices"] for row in rows if "free_choices" in row}
    rows = [row for row in rows if "free_choices" not in row]
    for key in dict.fromkeys((row["task"], row["most"], row["epsilon"]) for row in rows):
        these = [row for row in rows if (row["task"], row["most"], row["epsilon"]) == key]

        def mean(name: str, these: list[dict[str, Any]] = these) -> float:
            return round(float(np.mean([row[name] for row in these])), 4)

        def interval(values: np.ndarray) -> float:
            return (
                round(float(1.96 * values.std(ddof=1) / np.sqrt(len(values))), 4) if len(values) > 1 else float("nan")
            )

        free = {name: np.array(values) for name, values in choices[key[0]].items()}
        best = max(free.values(), key=np.mean)
        private = np.mean([r["best_private"] for r in these], 0)  # for each prompt
        over_best = private - best
        found.append(
            {
                "task": key[0],
                "pairs": round(mean("pairs")),
                "prompts": these[0]["prompts"],
                "epsilon": key[2],
                **{n: mean(n) for n in ("vader", "contrast", "free", "private", "nonprivate")},
                "ci95": interval(np.array([row["private"] - row["free"] for row in these])),
                "best_of_16_free": round(float(free["free"].mean()), 4),
                "best_of_16_private": round(float(private.mean()), 4),
                "best_of_16_nonprivate": mean("best_nonprivate"),
                "best_of_16_best_free": round(float(best.mean()), 4),
                "best_of_16_over_best_free": round(float(over_best.mean()), 4),
                "best_of_16_ci95": interval(over_best),
                "splits": len(these),
            }
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked of the model, and how much."""
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one for each finished run")
    parser.add_argument("--cache", type=Path, default=Path("runs/free_and_private_reward"))
    parser.add_argument("--texts", type=int, default=2300, help="with people's scores, for pairs and for measuring")
    parser.add_argument("--own_texts", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=768, help="whose best of --best_of the judge scores")
    parser.add_argument("--best_of", type=int, default=16)
    parser.add_argument("--model", help="a chat model's folder or name; default SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draws", type=int, default=4, help="of the noise, in each split")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.5, 1.0])
    parser.add_argument("--pairs", nargs="+", type=int, default=[100, 100_000], help="at most so many")
    parser.add_argument("--splits", type=int, default=8)
    parser.add_argument("--show", type=int, help="only show what is chosen for so many prompts, at the last epsilon")
    args = parser.parse_args(argv)
    if args.show:
        for task in args.tasks:
            show(prepare(task, args, []), args.show, args.epsilons[-1])
        return
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["task"], row["most"], row["epsilon"], row["split"]) for row in rows if "split" in row}
    cells = [(most, epsilon, s) for most in args.pairs for epsilon in args.epsilons for s in range(args.splits)]
    reader: list[Reader] = []
    for task in args.tasks:
        wanted = [cell for cell in cells if (task, *cell) not in done]
        if not wanted:
            continue
        data = prepare(task, args, reader)

        def keep(row: dict[str, Any]) -> None:
            rows.append(row)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

        if not any(row["task"] == task for row in rows):
            keep({"task": task, "free_choices": free_choices(data)})
        for most, epsilon, seed in wanted:
            row = {"task": task, "most": most, "epsilon": epsilon, "split": seed}
            keep(row | split(data, seed, most, epsilon, args.draws))
    found = table(rows)
    for row in found:
        print(
            f"{row['task']:17} {row['pairs']:5} pairs, epsilon {row['epsilon']:3}: free {row['free']:.3f}, private "
            f"{row['private']:.3f} (+-{row['ci95']:.3f} over free), without noise {row['nonprivate']:.3f}; best of "
            f"{args.best_of}: free {row['best_of_16_free']:.2f}, private {row['best_of_16_private']:.2f} "
            f"({row['best_of_16_over_best_free']:+.3f} +-{row['best_of_16_ci95']:.3f} over the best free one)"
        )
    if args.json:
        print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
