"""SFT with few people: which weights to train, when noise is most of what is added.

    .venv/bin/python benchmarks/sft_directions.py --data DATA --output directions.jsonl --json

DATA holds `sms.jsonl.gz` (what_privacy_buys.py says whence it comes). SFT of the embedded model on text messages with a
person as the unit, by the command, on another split of the people for each seed; the gain is what the loss on other
people's messages falls by, in nats per token. The arms differ in the adapter alone.

random, rank 4   peft's default: query and value projections, A and B trained
random, rank 1   the same with a quarter of the weights
activations      rank 1, A frozen along what the layers read of the model's own text (`init_a: activations`), B trained

--output is appended to, and a run goes on from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import what_privacy_buys as bought

PERSON = bought.SFT["person"]
ARMS: dict[str, tuple[float, dict[str, Any]]] = {
    "random, rank 4": (4e-2, {"r": 4}),
    "random, rank 1": (4e-2, {"r": 1}),
    "activations": PERSON[2:],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sms.jsonl.gz")
    parser.add_argument("--output", type=Path, required=True, help="one JSON a run; what is there is not run again")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[50, 51, 52], help="splits of the people")
    parser.add_argument("--base", default="tiny-review-lm")
    parser.add_argument("--measured", type=int, default=1000, help="other people's messages")
    parser.add_argument("--of_a_person", type=int, default=8, help="messages of a person in SFT")
    parser.add_argument("--most_sampled", type=int, default=100_000, help="people of a step")
    parser.add_argument("--most_steps", type=int, default=100_000)
    args = parser.parse_args(argv)
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    for seed in args.seeds:
        for arm in args.arms:
            if (arm, seed, args.epsilon) in {(row["arm"], row["seed"], row["epsilon"]) for row in rows}:
                continue
            rows.append({"arm": arm, "seed": seed, "epsilon": args.epsilon, "gain": gain(arm, seed, args)})
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    found = []
    for arm in args.arms:
        gains = [row["gain"] for row in rows if (row["arm"], row["epsilon"]) == (arm, args.epsilon)]
        half = 1.96 * statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        found.append(
            {"arm": arm, "epsilon": args.epsilon, "gain": round(statistics.mean(gains), 3), "seeds": len(gains)}
        )
        print(
            f"{arm:15} epsilon {args.epsilon:g}: gain {found[-1]['gain']:.3f} +-{half:.3f} nats per token, {len(gains)} seeds"
        )
    if args.json:
        print(json.dumps({"rows": found}))


def gain(arm: str, seed: int, args: argparse.Namespace) -> float:
    """Nats per token that the loss on other people's messages falls by."""
    rate, adapter = ARMS[arm]
    bought.SFT["person"] = (*PERSON[:2], rate, adapter)
    with tempfile.TemporaryDirectory() as name:
        bought.write_messages(Path(name), seed, args)
        before, after = bought.message_losses(Path(name), "person", args.epsilon, seed, args)
    return before - after


if __name__ == "__main__":
    main()
