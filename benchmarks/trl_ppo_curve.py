"""The reward curve of `dpalign.trl`'s PPO, without privacy, against TRL 0.11.4's: the same script, another import.

    make bench-setup && OMP_NUM_THREADS=1 python benchmarks/trl_ppo_curve.py --output docs/results/trl_ppo_curve.runs.jsonl

`trl_ppo_script.py` is the script: tiny-review-lm with LoRA, the first tokens of 1,000 public movie snippets as prompts,
VADER's score of the completion as reward, TRL's defaults but for the options below. TRL runs it in `.venv-trl`, in a
child process; both sides alternate update by update (A B, B A, ...), and the idle one is blocked on a pipe. Each seed
that is done is appended to --output as one line of JSON; seeds that are there already are not run again.

A curve is compared by two numbers: its mean, which tells how fast it learns, and the mean of its last updates.
`within_noise` is whether, for both, the difference between the sides is inside the 95% interval (Welch's t over
seeds) around 0. `time_ratio` is the median over pairs of updates of ours / TRL's, without each seed's first; `cpu_ratio` is that of the
processor's time, which other work on the machine changes less.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits sleeps instead of spinning

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trl_ppo_script
from scipy.stats import t as student

import dpalign.trl
from dpalign.data.demo import demo_file
from dpalign.models import embedded

TRL_PYTHON = Path(__file__).resolve().parent.parent / ".venv-trl" / "bin" / "python"
PROMPTS = "demo:movie-snippets/public"
SIDES = ("ours", "trl")


class TRL:
    """The child process: one seed after the other."""

    def __init__(self, python: Path, folder: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [str(python), trl_ppo_script.__file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)},
        )

    def updates(self, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        line = json.dumps(settings)
        while True:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if not answer:
                sys.exit("the TRL worker stopped: see above why.")
            yield json.loads(answer)
            line = ""

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def old_folder(model: str, folder: Path) -> str:
    """A copy of a model for transformers of TRL's time, too: they know the tokenizer's class by its older name."""
    shutil.copytree(embedded.resolve(model), folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(folder)


def one_seed(trl: TRL, folder: str, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Both curves, update by update in turn: `{side}_reward`, `{side}_kl`, `{side}_seconds`, `{side}_cpu_seconds`."""
    running = {"ours": trl_ppo_script.updates(dpalign.trl, folder, settings), "trl": trl.updates(settings)}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(settings["updates"]):
        for side in SIDES if number % 2 else SIDES[::-1]:
            found[side].append(next(running[side]))
        ours, theirs = found["ours"][-1], found["trl"][-1]
        assert (ours["tokens"], ours["first_row"]) == (theirs["tokens"], theirs["first_row"])
    return {
        f"{side}_{name}": [round(update[name], 4) for update in found[side]]
        for side in SIDES
        for name in ("reward", "kl", "seconds", "cpu_seconds")
    }


def compared(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Means and deviations over seeds; `interval` is half of the 95% interval of the difference (Welch's t)."""
    shares = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    difference, error = statistics.mean(ours) - statistics.mean(theirs), sum(shares) ** 0.5
    freedom = sum(shares) ** 2 / sum(share**2 / (len(ours) - 1) for share in shares)
    interval = float(student.ppf(0.975, freedom)) * error
    numbers = {
        "ours": statistics.mean(ours),
        "trl": statistics.mean(theirs),
        "ours_deviation": statistics.stdev(ours),
        "trl_deviation": statistics.stdev(theirs),
        "difference": difference,
        "interval": interval,
    }
    return {k: round(v, 4) for k, v in numbers.items()} | {"within_noise": abs(difference) <= interval}


def summary(rows: list[dict[str, Any]], last: int) -> dict[str, Any]:
    """What the last line says: `curve` and `final` as `compared`, and the time of an update."""
    found: dict[str, Any] = {"seeds": len(rows), "updates": len(rows[0]["ours_reward"])}
    for name, part in {"curve": slice(None), "final": slice(-last, None)}.items():
        means = ([statistics.mean(row[f"{side}_reward"][part]) for row in rows] for side in SIDES)
        found[name] = compared(*means)
    found["within_noise"] = found["curve"]["within_noise"] and found["final"]["within_noise"]
    for name, measured in {"time": "seconds", "cpu": "cpu_seconds"}.items():
        ours, theirs = ([s for row in rows for s in row[f"{side}_{measured}"][1:]] for side in SIDES)
        found[f"{name}_ratio"] = round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)
        found |= {f"ours_{measured}": round(statistics.median(ours), 3)}
        found |= {f"trl_{measured}": round(statistics.median(theirs), 3)}
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean reward and KL of each update over the seeds, with the deviation between seeds."""
    print(f"{'update':>6} {'reward ours':>16} {'TRL':>16} {'KL ours':>9} {'TRL':>9}")
    for update in range(len(rows[0]["ours_reward"])):
        cells = []
        for side in SIDES:
            values = [row[f"{side}_reward"][update] for row in rows]
            cells.append(f"{statistics.mean(values):7.3f} ± {statistics.stdev(values):.3f}")
        cells += [f"{statistics.mean(row[f'{side}_kl'][update] for row in rows):9.2f}" for side in SIDES]
        print(f"{update + 1:6d} {cells[0]:>16} {cells[1]:>16} {cells[2]} {cells[3]}")


def read_rows(file: Path, seeds: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs that are done. Stops where they had other settings."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [row for row in map(json.loads, lines) if row["seed"] < seeds]
    for row in rows:
        if row["settings"] != settings:
            sys.exit(f"{file} holds runs with other settings, {row['settings']}: choose another --output.")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--seeds", type=int, default=4, help="at least 2")
    parser.add_argument("--output", type=Path, default=Path("runs/trl_ppo_curve.jsonl"), help="of the runs")
    parser.add_argument("--trl-python", type=Path, default=TRL_PYTHON, help="of an environment with TRL 0.11.4")
    parser.add_argument("--model", default=embedded.TINY_REVIEW_LM)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--last", type=int, default=5, help="updates that the final reward is the mean of")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--mini_batch_size", type=int, default=8)
    parser.add_argument("--ppo_epochs", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--init_kl_coef", type=float, default=0.05)
    parser.add_argument("--prompt_tokens", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    settings = vars(parser.parse_args(arguments))
    quiet, seeds, output = (settings.pop(name) for name in ("json", "seeds", "output"))
    python, model, last = (settings.pop(name) for name in ("trl_python", "model", "last"))
    rows = read_rows(output, seeds, settings)
    done = {row["seed"] for row in rows}
    if len(done) < seeds:
        if not python.exists():
            sys.exit(f"{python} is missing: run make bench-setup.")
        prompts = [json.loads(line)["text"] for line in demo_file(PROMPTS).read_text(encoding="utf-8").splitlines()]
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = old_folder(model, Path(scratch) / "model")
            trl = TRL(python, folder, settings["threads"])
            with patch.dict(os.environ, {"DPALIGN_LEDGER": f"{scratch}/ledger.sqlite"}):
                for seed in sorted(set(range(seeds)) - done):
                    curves = one_seed(trl, folder, settings | {"seed": seed, "prompts": prompts})
                    rows.append({"seed": seed, "settings": settings, **curves})
                    with output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
            trl.close()
    if not quiet:
        print_table(rows)
    print(json.dumps(summary(rows, last)))


if __name__ == "__main__":
    main()
