"""A million records: what a run costs before its first draw, what a draw of many units costs, and a row of the ledger.

    python benchmarks/large_data.py --json

Records: `dpalign run` of a recipe with DP-SFT on a JSONL file of self-written texts of 12 words, each its own unit, in a
process of its own that ends where the ledger's first row is to be written. Its CPU seconds (`cpu_seconds_to_first_draw`,
of all threads, imports and the model's loading too) and its largest resident size (`peak_mb`).

Draws: the median time of a Poisson sample of `--sample` of `--units` units, and the most memory that one holds.

Ledger: `ledger_ratio` is the median over pairs of the time that an intent takes until it is durable / the time of a plain
write of the same bytes to a file beside it with `os.fsync`; the two alternate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dpalign.cli import main as dpalign
from dpalign.files import write_json
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.ledger import Intent, Ledger
from dpalign.privacy.sampling import poisson_sample

WORDS = ["the", "a", "film", "play", "novel", "series", "concert", "album", "story", "ending", "script", "actor", "scene", "music", "was", "is", "seemed", "felt", "looked", "became", "dull", "bright", "strange", "quiet", "brave", "silly", "lovely", "clumsy", "honest", "greedy", "slow", "quick", "very", "rather", "never", "always", "quite", "truly", "and", "but", "yet", "because", "though", "while", "then", "again", "today", "once"]


class FirstDrawError(BaseException):
    """Nothing of the command's is to catch it."""


def write_records(path: Path, count: int, words: int) -> None:
    """Texts of so many words, no two alike."""
    coins = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join([*coins.choices(WORDS, k=words - 1), f"n{number}"])
            file.write(json.dumps({"text": text}) + "\n")


def write_recipe(folder: Path, model: str) -> Path:
    recipe: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "ledger": str(folder / "ledger.sqlite"),
        "target_epsilon": 4.0,
        "num_threads": 1,
        "model": {"name_or_path": model, "is_public": True},
        "data": {"name": "written", "path": str(folder / "records.jsonl")},
        "sft": {"expected_batch_size": 256, "max_steps": 1, "max_length": 32},
    }
    path = folder / "recipe.yaml"
    write_json(path, recipe)
    return path


def to_first_draw(recipe: str) -> dict[str, float]:
    """CPU seconds and peak memory of this process when the command is about to draw."""
    found: dict[str, float] = {}
    write = Ledger.write

    def seen(ledger: Ledger, intents: list[Intent]) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found.update(cpu_seconds=time.process_time(), peak_mb=peak / (1024**2 if sys.platform == "darwin" else 1024))
        raise FirstDrawError

    Ledger.write = seen  # type: ignore[method-assign]
    try:
        status = dpalign(["run", recipe])
    except FirstDrawError:
        return found
    finally:
        Ledger.write = write  # type: ignore[method-assign]
    raise SystemExit(f"dpalign run ended with status {status} before it drew.")


def run_to_first_draw(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    write_records(folder / "records.jsonl", args.records, args.words)
    command = [sys.executable, __file__, "--child", str(write_recipe(folder, args.model))]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def draws(args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of a draw, and MB that one holds at most."""
    entropy = SystemEntropy()

    def draw() -> object:
        return poisson_sample(args.units, args.sample / args.units, entropy)

    times = [seconds(draw) for _ in range(args.repeats)]
    tracemalloc.start()
    draw()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return 1e3 * statistics.median(times), peak / 1024**2


def intent(step: int) -> Intent:
    return Intent(
        dataset="written", run="benchmark-0123abcd", stage="sft", step=step, attempt=0, split="0123456789abcdef", low=0.0,
        high=1.0, sampling_rate=0.000256, noise_multiplier=0.8, metrics_noise_multiplier=8.0, passes=1, max_grad_norm=1.0,
        unit="record", units=1e6, fingerprint="0" * 64, config_hash="0" * 16, private=True,
    )  # fmt: skip


def ledger_rows(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Median of intent / plain write, and milliseconds of an intent."""
    ledger = Ledger(folder / "measured.sqlite")
    plain = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def written(row: Intent) -> None:
        os.write(plain, json.dumps(dataclasses.asdict(row)).encode())
        os.fsync(plain)

    pairs = []
    for step in range(args.repeats + 1):
        row = intent(step)
        works = [partial(ledger.write, [row]), partial(written, row)]
        times = [seconds(work) for work in (works if step % 2 else reversed(works))]
        pairs.append(times if step % 2 else times[::-1])
    os.close(plain)
    ledger.close()
    pairs = pairs[1:]  # the first one opens the files
    return statistics.median(a / b for a, b in pairs), 1e3 * statistics.median(a for a, _ in pairs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=12, help="of a record")
    parser.add_argument("--model", default="tiny-review-lm")
    parser.add_argument("--units", type=int, default=100_000_000, help="that a sample is drawn of")
    parser.add_argument("--sample", type=int, default=4096, help="units that are expected in it")
    parser.add_argument("--repeats", type=int, default=101, help="draws, and rows of the ledger")
    parser.add_argument("--folder", help="where the records and the ledger are written; default: a temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(to_first_draw(args.child)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        run = run_to_first_draw(args, Path(name))
        draw_ms, draw_mb = draws(args)
        ratio, intent_ms = ledger_rows(args, Path(name))
    found = {
        "records": args.records,
        "cpu_seconds_to_first_draw": round(run["cpu_seconds"], 2),
        "peak_mb": round(run["peak_mb"], 1),
        "draw_ms": round(draw_ms, 3),
        "draw_peak_mb": round(draw_mb, 3),
        "ledger_ratio": round(ratio, 3),
        "intent_ms": round(intent_ms, 3),
    }
    if not args.json:
        print(f"{args.records:,} records of {args.words} words: {found['cpu_seconds_to_first_draw']} CPU seconds and "
              f"{found['peak_mb']:,.0f} MB to the first draw")  # fmt: skip
        print(f"{args.sample:,} of {args.units:,} units: {draw_ms:.2f} ms and {draw_mb:.2f} MB a draw")
        print(f"an intent: {intent_ms:.2f} ms, {ratio:.2f} times a plain durable write")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
