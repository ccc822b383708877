"""What an update of DP-PPO costs, as a sum of FLOPs, bytes, launches and random numbers; checked, and scaled on paper.

    .venv/bin/python benchmarks/scaling.py --measured docs/results/profile_h200.jsonl docs/results/profile_h200_first.jsonl

Each part of an iteration (benchmarks/profile_iteration.py) is a sum of a few quantities that follow from shapes alone, and
each quantity has one price in seconds, which non-negative least squares of relative errors finds from measured lines (one card,
bfloat16, library runs). First table: every line's parts as prices found on the *other* models predict them, over what was
measured. Second: a model that was not measured, on machines that were not, by the prices of all lines; a price per FLOP
or byte is divided by the ratio of the cards, one per launch or random number is the host's and stays. While completions are
written, weights and keys are read at an assumed share of the data sheet's bytes/s; an engine launches nothing from Python, the plain
loop does. Nothing in the second table was run. --json ends with one line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Shape:
    """A decoder. key_values: width of the keys of a layer. outputs: of each adapted matrix of a layer; inputs are `width`."""

    parameters: float
    layers: int
    width: int
    vocabulary: int
    key_values: int
    outputs: tuple[int, ...]
    tied: bool = True

    @property
    def head(self) -> float:
        return float(self.width * self.vocabulary)

    @property
    def body(self) -> float:
        """Parameters that every token meets."""
        return self.parameters - self.head * (1 if self.tied else 2)

    def adapter(self, rank: int) -> float:
        return float(self.layers * rank * sum(self.width + out for out in self.outputs))


SHAPES = {
    "gpt2": Shape(124.4e6, 12, 768, 50257, 768, (2304,)),
    "gpt2-medium": Shape(354.8e6, 24, 1024, 50257, 1024, (3072,)),
    "gpt2-large": Shape(774.0e6, 36, 1280, 50257, 1280, (3840,)),
    "smollm2": Shape(134.5e6, 30, 576, 49152, 192, (576, 192)),
    "7B": Shape(7.24e9, 32, 4096, 32000, 1024, (4096, 1024), tied=False),  # Mistral's
}
WIDE = (4096, 1024, 1024, 4096, 14336, 14336, 14336)  # all linear layers of the 7B model; the last one's is its input


@dataclass(frozen=True)
class Work:
    """An update: rows of prompt and completion tokens, so many at once on a device, and weights of the adapter."""

    shape: Shape
    rows: float
    prompt: int
    completion: int
    at_once: int
    sampled_at_once: int
    adapter: float
    tensors: int

    @property
    def passes(self) -> int:
        return math.ceil(self.rows / self.at_once)

    @property
    def samplings(self) -> int:
        return math.ceil(self.rows / self.sampled_at_once)

    @property
    def tokens(self) -> float:
        return self.rows * (self.prompt + self.completion)

    @property
    def learned(self) -> float:
        return self.rows * self.completion


@dataclass(frozen=True)
class Card:
    """FLOP/s (dense bfloat16) and bytes/s of one device, from its data sheet."""

    flops: float
    bytes: float


H200, H100 = Card(989e12, 4.8e12), Card(989e12, 3.35e12)
# Name of a quantity -> which ratio of cards its price follows: the host's prices follow none.
PRICED = {"PFLOP": "flops", "GB of activations": "bytes", "GB of logits": "bytes", "launches": "", "numbers": "", "weights of rows": "bytes"}


def forward(work: Work) -> dict[str, float]:
    """Of one pass: products, what the layers write and read between them, and logits of the completions in float32."""
    shape = work.shape
    return {
        "PFLOP": 2 * (shape.body * work.tokens + shape.head * work.learned) / 1e15,
        "GB of activations": 2 * work.tokens * shape.layers * shape.width / 1e9,
        "GB of logits": 4 * work.learned * shape.vocabulary / 1e9,
        "launches": float(work.passes * shape.layers),
    }


def generation(work: Work) -> dict[str, float]:
    """One launch for each layer, token and batch: the library generates with the plain loop of transformers."""
    return {"PFLOP": forward(work)["PFLOP"], "launches": float(work.samplings * work.completion * work.shape.layers)}


def clip(work: Work) -> dict[str, float]:
    return {"launches": float(work.passes * work.tensors), "weights of rows": 4 * work.rows * work.adapter / 1e9}


PARTS: dict[str, Callable[[Work], dict[str, float]]] = {
    "generation": generation, "reference": forward, "forward": forward, "backward": forward, "clip": clip,
    "noise": lambda work: {"numbers": work.adapter / 1e6},
}  # fmt: skip


def work_of(line: Mapping[str, Any]) -> Work:
    shape = SHAPES[line["model"]]
    size, completion = line["micro_batch_size_used"], line["completion_tokens"]
    at_once = 2 * size if line["algorithm"] == "rloo" else size  # a micro-batch counts prompts, and there each has two
    if line["algorithm"] == "sft":  # every token is learned
        completion += line["prompt_tokens"]
    prompt = 0 if line["algorithm"] == "sft" else line["prompt_tokens"]
    tensors = shape.layers * len(shape.outputs) * 2
    return Work(shape, line["prompts"], prompt, completion, at_once, size, shape.adapter(4), tensors)


# Prices ---------------------------------------------------------------------------------------------------------------


def prices(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of a unit of each quantity of each part."""
    found = {}
    for part, quantities in PARTS.items():
        known = [line for line in lines if line["seconds"].get(part)]
        names = [*quantities(work_of(known[0]))]
        asked = np.array([[quantities(work_of(line))[name] for name in names] for line in known])
        seconds = np.array([line["seconds"][part] for line in known])
        scale = asked.max(0)
        solved, _ = nnls(asked / scale / seconds[:, None], np.ones(len(known)))
        found[part] = dict(zip(names, (solved / scale).tolist(), strict=True))
    return found


def seconds_of(part: str, work: Work, found: Mapping[str, Mapping[str, float]], card: Card = H200) -> float:
    """What a part takes by prices that were found on an H200."""
    total = 0.0
    for name, amount in PARTS[part](work).items():
        by = PRICED[name]
        total += amount * found[part][name] * (getattr(H200, by) / getattr(card, by) if by else 1.0)
    return total


def checked(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Predicted over measured of every part of every line, by the prices of the other models' lines."""
    rows = []
    for line in lines:
        others = prices([other for other in lines if other["model"] != line["model"]])
        parts = {part: seconds_of(part, work_of(line), others) for part in PARTS if line["seconds"].get(part)}
        ratio = {part: seconds / line["seconds"][part] for part, seconds in parts.items()}
        both = sum(parts.values()) / sum(line["seconds"][part] for part in parts)
        key = {name: line[name] for name in ("model", "algorithm", "prompts", "completion_tokens")}
        rows.append(key | {"ratio": ratio | {"together": both}})
    return rows


# On paper -------------------------------------------------------------------------------------------------------------

BUS = {8: 450e9, 64: 50e9}  # bytes/s of one device to the others: inside a node, and between nodes
READ = 0.6  # of the memory's bytes/s, with which weights and keys are read while completions are written


def scaled(found: Mapping[str, Mapping[str, float]], devices: int, rank: int, wide: bool, engine: bool) -> dict[str, Any]:
    """One update of the 7B model on `devices` H100s: 4,096 prompts of 256 tokens, 256 new ones each."""
    shape = replace(SHAPES["7B"], outputs=WIDE if wide else SHAPES["7B"].outputs)
    adapter, tensors = shape.adapter(rank), shape.layers * len(shape.outputs) * 2
    work = Work(shape, 4096 / devices, 256, 256, 16, min(512, 4096 // devices), adapter, tensors)
    parts = {part: seconds_of(part, work, found, H100) for part in ("reference", "forward", "backward", "clip", "noise")}
    parts["backward"] += parts["forward"]  # activations are computed again
    read = work.samplings * work.completion * (2 * shape.parameters + work.sampled_at_once * keys(work, 0.5))
    prompts = parts["forward"] * work.prompt / (work.prompt + work.completion)
    parts["generation"] = read / (READ * H100.bytes) + prompts
    if not engine:
        parts["generation"] += generation(work)["launches"] * found["generation"]["launches"]
    parts["sum over devices"] = 2 * (devices - 1) / devices * 8 * adapter / BUS[devices]
    total = sum(parts.values())
    row: dict[str, Any] = {"devices": devices, "adapter": adapter, "generator": "engine" if engine else "plain"}
    row |= {"hours for 10M prompts": total * 1e7 / 4096 / 3600}
    return row | {"seconds": parts | {"update": total}, "gigabytes": {n: b / 1e9 for n, b in held(work).items()}}


def keys(work: Work, filled: float = 1.0) -> float:
    """Bytes of one row's keys and values in bfloat16, when so much of its completion is written."""
    return 4 * work.shape.layers * work.shape.key_values * (work.prompt + filled * work.completion)


def held(work: Work) -> dict[str, float]:
    """Bytes on one device; layers' activations are computed again in the backward pass, one layer at a time."""
    shape, tokens = work.shape, work.at_once * (work.prompt + work.completion)
    return {
        "base": 2 * shape.parameters,
        "adapter, gradient, Adam": 16 * work.adapter,
        "gradients of units": 4 * work.at_once * work.adapter,
        "inputs of layers": 2 * tokens * shape.layers * shape.width,
        "logits": 8 * work.at_once * work.completion * shape.vocabulary,
        "keys while sampling": work.sampled_at_once * keys(work),
    }


def table(rows: Sequence[Mapping[str, Any]], key: str, about: Sequence[str], digits: int) -> str:
    names = [*rows[0][key]]
    names += [name for row in rows for name in row[key] if name not in names]
    names = list(dict.fromkeys(names))
    lines = ["| " + " | ".join([*about, *names]) + " |", "|" + "---|" * (len(about) + len(names))]
    for row in rows:
        cells = [f"{row[name]:,.3g}" if isinstance(row[name], float) else str(row[name]) for name in about]
        cells += [f"{row[key][name]:.{digits}f}" if name in row[key] else "" for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", nargs="+", type=Path, required=True, help="lines of profile_iteration.py")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    lines = [json.loads(line) for file in given.measured for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["variant"] == "private" and line["dtype"] == "bfloat16" and "H200" in line["card"]]
    ratios, found = checked(lines), prices(lines)
    print("Predicted over measured, by the prices of the other models\n")
    print(table(ratios, "ratio", ["model", "algorithm", "prompts", "completion_tokens"], 2))
    spread = np.abs(np.log([row["ratio"]["together"] for row in ratios]))
    print(f"\nall parts together: off by a factor of {math.exp(np.median(spread)):.2f} in the median, {math.exp(spread.max()):.2f} at most\n")
    print("7B parameters on H100s, seconds of an update (on paper)\n")
    cases = [(8, 4, False, False), (8, 4, False, True), (8, 16, True, True), (64, 4, False, True), (64, 16, True, True)]
    rows = [scaled(found, *case) for case in cases]
    print(table(rows, "seconds", ["devices", "adapter", "generator", "hours for 10M prompts"], 2))
    print("\nGigabytes on each of them, 16 rows at once\n")
    print(table([rows[0], rows[2]], "gigabytes", ["adapter"], 2))
    if given.json:
        print(json.dumps({"checked": ratios, "prices": found, "scaled": rows}))


if __name__ == "__main__":
    main()
