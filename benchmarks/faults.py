"""Kills and faults through the real command: what a run has spent is never less than what it drew, and it goes on.

    .venv/bin/python benchmarks/faults.py --output docs/results/faults.runs.jsonl --summary docs/results/faults.json

Each trial runs a small recipe of some stages in processes forked from this one (a random model of one layer, and the release
is checked in the run's own process, so that the time is that of the command), kills it with SIGKILL, half of the resumed ones again, and lets the same command end it. Where: at each point
of POINTS in turn, before or after a call of it that is chosen by chance among those that an undisturbed run makes; every
second trial at a moment that is chosen by chance. Draws are counted apart from the ledger: whoever draws a Poisson sample first
appends a line to a file. From these lines dp-accounting computes epsilon again. A trial must end with: status 0
without any repair, a summary whose epsilon is at least that one, a ledger with a row for every line, and a release that may leave.
A stage of one draw has nothing left when that one is lost: such a run must say so, and draw nothing more (`refused`).

Then the faults that are no kills, each once for each set of stages: a full disk, SIGTERM, SIGHUP, a clock that goes back, an older
checkpoint put back, an older ledger put back, and a second process in the same run. A finished trial is one JSON
line; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from forked import Ended, forked
from models import gpt2, word_tokenizer

import dpalign.files
import dpalign.privacy.gate
import dpalign.privacy.ledger
import dpalign.release
import dpalign.run
import dpalign.training.checkpoint
import dpalign.training.loop
from dpalign import boundary
from dpalign.cli import main as command
from dpalign.models import plain_logits, verify
from dpalign.privacy.mechanism import GaussianMechanism

DELTA, VOCABULARY = 1e-5, 64
POINTS: dict[str, tuple[Any, str]] = {
    "the ledger's row": (dpalign.privacy.ledger.Ledger, "write"),
    "the draw": (dpalign.privacy.gate, "poisson_sample"),
    "rows": (dpalign.training.loop, "rows_of_units"),
    "a micro-batch": (GaussianMechanism, "add"),
    "the noise": (GaussianMechanism, "release"),
    "a checkpoint": (dpalign.training.loop, "save_checkpoint"),
    "a line of the log": (dpalign.training.loop, "append_line"),
    "a folder's exchange": (dpalign.files, "_exchange"),
    "a folder's rename": (os, "rename"),
    "a file's replacement": (os, "replace"),
    "fsync": (os, "fsync"),
    "the release": (dpalign.run, "write_release"),
    "the report": (dpalign.run, "write_report"),
}  # fmt: skip
ONE_DRAW = "reward_query"  # this set of stages spends all that it has at once
REWARD = {"source": "faults:sevens", "is_public": True, "low": 0, "high": 1}
SIZES = {"expected_batch_size": 12, "max_steps": 3, "micro_batch_size": 8, "save_steps": 1}
SAMPLES = SIZES | {"max_prompt_length": 4, "max_completion_length": 4, "reward": REWARD}
TEXTS = SIZES | {"max_length": 8}
STAGES: dict[str, dict[str, Any]] = {
    "sft, ppo, parallel": {"split": {"sft": 0.5, "ppo": 0.5}, "sft": TEXTS, "ppo": SAMPLES | {"num_ppo_epochs": 2}},
    "sft, rloo, sequential": {"sft": TEXTS, "rloo": SAMPLES | {"num_generations": 2}},
    "reward_model, ppo on own prompts": {
        "reward_model": TEXTS, "ppo": SAMPLES | {"prompts": "self_written", "prompt_max_tokens": 3, "reward": {"source": "reward_model"}},
    },
    "dpo": {"dpo": TEXTS},
    "grpo, persons": {"grpo": SAMPLES | {"num_generations": 2}},
    "offline, measurement": {"offline": SAMPLES | {"num_generations": 2}, "measurement": {}},
    "reward_query": {"reward_query": {"max_length": 8, "own_texts": 24, "directions": 3, "micro_batch_size": 8}},
}  # fmt: skip
FAULTS = ("full disk", "SIGTERM", "SIGHUP", "clock back", "older checkpoint", "older ledger", "second process")


def sevens(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [text.count("7") / (1 + len(text)) for text in completions]


# What runs ------------------------------------------------------------------------------------------------------------


@functools.cache
def model() -> str:
    folder = tempfile.mkdtemp(prefix="dpalign-faults-")
    gpt2(VOCABULARY, layers=1, hidden=16, heads=2, positions=32).save_pretrained(folder)
    word_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, stages: str) -> Path:
    sections, chance = STAGES[stages], random.Random(0)
    texts = [" ".join(f"w{chance.randrange(1, VOCABULARY)}" for _ in range(6)) for _ in range(60)]
    pairs = bool({"reward_model", "dpo", "reward_query"} & {*sections})
    rows: list[dict[str, str]] = [{"text": text, "person": f"p{number // 3}"} for number, text in enumerate(texts)]
    if pairs:
        rows = [{"prompt": a[:8].rsplit(" ", 1)[0], "chosen": a, "rejected": b} for a, b in zip(texts[:30], texts[30:], strict=True)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data: dict[str, Any] = {"name": "people", "path": str(folder / "data.jsonl")}
    if "persons" in stages:
        data |= {"unit": "person", "max_records_per_unit": 3}
    recipe = {
        "output_dir": str(folder / "run"), "ledger": str(folder / "ledger.sqlite"), "num_threads": 1, "target_delta": DELTA,
        "model": {"name_or_path": model(), "is_public": True}, "data": data, "target_epsilon": 8.0, **sections,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(folder: Path, size: int, before: Callable[[int], None] = lambda rank: None) -> list[Ended]:
    """The command, in so many processes; each draw leaves a line first."""

    def body(rank: int) -> int:
        if size == 1:
            os.environ["WORLD_SIZE"] = "1"
        verify.in_fresh_process = plain_logits.logits  # five seconds of imports, for a check that writes nothing
        count_draws(folder)
        before(rank)
        return command(["run", str(folder / "recipe.yaml"), "--json"])

    return forked(folder, size, body)


def count_draws(folder: Path) -> None:
    """Whoever draws a sample appends a line first: what it is a sample of, and the noise that will be added to its sum."""
    gate, now = dpalign.privacy.gate, []
    draw, sample = gate.Gate.draw, gate.poisson_sample

    def drawing(self: Any, steps: Any, first: int, attempt: int) -> Any:
        now[:] = [(self.stage, self.part.low, self.part.high, step.mechanism) for step in steps]
        return draw(self, steps, first, attempt)

    def sampling(*arguments: Any) -> Any:
        stage, low, high, ran = now.pop(0)
        noise = (ran.noise_multiplier, ran.passes, ran.metrics_noise_multiplier)
        line = json.dumps([stage, low, high, ran.sampling_rate, *map(str, noise)]) + "\n"
        handle = os.open(folder / "draws", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, line.encode())
        os.close(handle)
        return sample(*arguments)

    gate.Gate.draw, gate.poisson_sample = drawing, sampling


# Kills ----------------------------------------------------------------------------------------------------------------


def at_point(point: str, number: int, after: bool, rank: int) -> Callable[[int], None]:
    """Kills process `rank` in the `number`th call of a point, before or after it."""

    def before(own: int) -> None:
        owner, name = POINTS[point]
        original, calls = getattr(owner, name), [0]

        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            dies = calls[0] == number and own == rank
            if dies and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)

    return before


def counted(file: Path) -> Callable[[int], None]:
    """Writes down in the end how often the first process has called each point, and for how long it has run."""

    def before(rank: int) -> None:
        if rank:
            return
        calls, began = dict.fromkeys(POINTS, 0), time.monotonic()
        for point, (owner, name) in POINTS.items():
            original = getattr(owner, name)

            def call(*arguments: Any, point: str = point, original: Any = original, **options: Any) -> Any:
                calls[point] += 1
                file.write_text(json.dumps(calls | {"seconds": time.monotonic() - began}), encoding="utf-8")
                return original(*arguments, **options)

            setattr(owner, name, call)

    return before


def at_moment(seconds: float, rank: int, number: int = signal.SIGKILL) -> Callable[[int], None]:
    def before(own: int) -> None:
        if own == rank:
            timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), number))
            timer.daemon = True
            timer.start()

    return before


@functools.cache
def calls_of(stages: str, size: int) -> dict[str, float]:
    """Of an undisturbed run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(folder, stages)
        ended = run(folder, size, counted(folder / "calls"))
        assert [process.status for process in ended] == [0] * size, ended
        found: dict[str, float] = json.loads((folder / "calls").read_text(encoding="utf-8"))
        assert judged(folder)["right"], judged(folder)
        return found


def killed(stages: str, size: int, trial: int) -> dict[str, Any]:
    """A run that is killed, perhaps twice, and then ends."""
    chance, calls = random.Random(f"{stages}/{size}/{trial}"), calls_of(stages, size)

    def somewhere() -> tuple[str, Callable[[int], None]]:
        rank = chance.randrange(size)
        usable = [point for point in POINTS if calls[point]]
        if trial % 2:
            seconds = chance.uniform(0, calls["seconds"])
            return f"after {seconds:.2f} s, process {rank}", at_moment(seconds, rank)
        point = usable[trial // 2 % len(usable)]
        number, after = chance.randint(1, int(calls[point])), chance.random() < 0.5
        rank = 0 if point in ("the ledger's row", "the draw", "the noise") else rank
        return f"{'after' if after else 'before'} {point} {number}, process {rank}", at_point(point, number, after, rank)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(folder, stages)
        where, statuses = [], []
        for _ in range(1 + (chance.random() < 0.5)):
            said, before = somewhere()
            where.append(said)
            statuses.append([process.status for process in run(folder, size, before)])
        drawn = draws(folder)
        last = run(folder, chance.choice([1, size]))
        found = judged(folder, last)
        if stages == ONE_DRAW and "have spent the budget" in last[0].err:
            found = {"right": draws(folder) == drawn <= ledger_rows(folder), "refused": True, "said": last[0].err[-200:]}
        return {"where": where, "statuses": statuses} | found


def draws(folder: Path) -> int:
    """As counted apart from the ledger."""
    file = folder / "draws"
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0


def ledger_rows(folder: Path) -> int:
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        return int(database.execute("SELECT count(*) FROM intents").fetchone()[0])


def judged(folder: Path, last: list[Ended] = ()) -> dict[str, Any]:  # type: ignore[assignment]
    """What a run that has ended says of itself, beside what was counted apart from it."""
    statuses, finished = [process.status for process in last], folder / "run" / "summary.json"
    lines = (folder / "draws").read_text(encoding="utf-8").splitlines() if (folder / "draws").exists() else []
    drawn = [json.loads(line) for line in lines]
    if not finished.is_file() or any(statuses):
        return {"right": False, "ended": statuses, "said": [process.err[-300:] for process in last]}
    summary = json.loads(finished.read_text(encoding="utf-8"))
    epsilon, apart = float(summary["epsilon"]), epsilon_of(drawn)
    releases = [place for place in (folder / "run" / "release", folder / "run" / "reward_model") if place.exists()]
    found = [sentence for release in releases for sentence in boundary.found_in(release)]
    right = epsilon >= apart - 1e-6 and ledger_rows(folder) >= len(drawn) and bool(releases) and not found
    return {"right": right, "epsilon": epsilon, "counted": apart, "draws": len(drawn), "rows": ledger_rows(folder), "found": found}


def epsilon_of(drawn: list[list[Any]]) -> float:
    """Of draws, by dp-accounting alone; of the units that most of them could have met."""
    edges = sorted({edge for _, low, high, *_ in drawn for edge in (low, high)})
    found = [0.0]
    for low, high in itertools.pairwise(edges):
        accountant = PLDAccountant()
        met = Counter(tuple(noise) for _, start, end, *noise in drawn if start <= low and high <= end)
        for (rate, sigma, passes, metrics), count in met.items():
            joint = GaussianDpEvent((int(passes) / float(sigma) ** 2 + 1 / float(metrics) ** 2) ** -0.5)
            accountant.compose(SelfComposedDpEvent(joint if rate == 1 else PoissonSampledDpEvent(rate, joint), count))
        found.append(accountant.get_epsilon(DELTA))
    return max(found)


# Other faults ---------------------------------------------------------------------------------------------------------


def fault(stages: str, name: str) -> dict[str, Any]:
    """One of FAULTS; the run must go on afterwards, or be refused with a sentence where it must not."""
    calls = calls_of(stages, 1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_recipe(folder, stages)
        if name == "full disk":
            refused = [run(folder, 1, functools.partial(full_disk, most)) for most in (6_000, 60_000)]
            said = [process.err.strip() for (process,) in refused]
            clean = all(process.status in (0, 1) for (process,) in refused) and "Traceback" not in "".join(said)
            statuses = [process.status for (process,) in refused]
            return {"statuses": statuses, "said": [text[-200:] for text in said]} | _and(clean, judged(folder, run(folder, 1)))
        if name in ("SIGTERM", "SIGHUP"):
            ended = run(folder, 1, at_moment(calls["seconds"] / 2, 0, getattr(signal, name)))
            clean = ended[0].status in (0, 128 + getattr(signal, name)) and "Traceback" not in ended[0].err
            return {"status": ended[0].status} | _and(clean, judged(folder, run(folder, 1)))
        if name == "clock back":
            run(folder, 1, at_moment(calls["seconds"] / 2, 0))

            def back(rank: int) -> None:
                now = time.time
                time.time = lambda: now() - 40_000_000

            return judged(folder, run(folder, 1, back))
        if name == "second process":
            stopped = at_point("the noise", 1, True, 0)

            def stops(rank: int) -> None:
                stopped(rank)
                kill = os.kill
                os.kill = lambda process, number: _second(folder, kill)

            first = run(folder, 1, stops)
            said = (folder / "second").read_text(encoding="utf-8")
            return {"said": said[-200:]} | _and("another process" in said or "uses" in said, judged(folder, first))
        # A copy of the folder, or of the ledger, from the middle of the run, is put back when it has gone on.
        run(folder, 1, at_point("the noise", max(1, int(calls["the noise"]) // 2), True, 0))
        kept = folder / "kept"
        kept.mkdir()
        if name == "older checkpoint":
            shutil.copytree(folder / "run", kept / "run")
        else:
            shutil.copy(folder / "ledger.sqlite", kept / "ledger.sqlite")
        ended = run(folder, 1)
        assert ended[0].status == 0, ended
        if name == "older checkpoint":
            shutil.rmtree(folder / "run")
            shutil.copytree(kept / "run", folder / "run")
            drawn = (folder / "draws").read_text(encoding="utf-8")
            again = run(folder, 1)
            if again[0].status == 1:  # nothing is left to spend on what was thrown away
                same = drawn == (folder / "draws").read_text(encoding="utf-8")
                return {"right": same and "have spent the budget" in again[0].err, "said": again[0].err[-200:]}
            return judged(folder, again)
        shutil.copy(kept / "ledger.sqlite", folder / "ledger.sqlite")
        summary = folder / "run" / "summary.json"
        before = json.loads(summary.read_text(encoding="utf-8"))["epsilon"]
        again = run(folder, 1)
        same = json.loads(summary.read_text(encoding="utf-8"))["epsilon"] >= before
        return {"right": again[0].status != 0 or same, "status": again[0].status, "said": again[0].err[-200:]}


def full_disk(most: int, rank: int) -> None:
    """No file may grow beyond so many bytes: the kernel refuses, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def _second(folder: Path, kill: Callable[[int, int], None]) -> None:
    """In place of a kill: the same command in another process, while this one is in the run."""
    child = os.fork()
    if child == 0:
        handle = os.open(folder / "second", os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        status = command(["run", str(folder / "recipe.yaml"), "--json"])
        sys.stderr.flush()
        os._exit(int(status or 0))
    os.waitpid(child, 0)


def _and(right: bool, found: dict[str, Any]) -> dict[str, Any]:
    return found | {"right": right and found["right"]}


# Together -------------------------------------------------------------------------------------------------------------


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kills, faults = [row for row in rows if "trial" in row], [row for row in rows if "fault" in row]
    below = [row for row in kills if row.get("epsilon", math.inf) < row.get("counted", 0.0) - 1e-6]
    return {
        "kills": sum(status == -signal.SIGKILL for row in kills for run in row["statuses"] for status in run),
        "runs": len(kills),
        "in_two_processes": sum(row["processes"] == 2 for row in kills),
        "right": sum(row["right"] for row in kills),
        "refused": sum(row.get("refused", False) for row in kills),
        "epsilon_below_count": len(below),
        "draws": sum(row.get("draws", 0) for row in kills),
        "largest_gap": max((row["epsilon"] - row["counted"] for row in kills if "counted" in row), default=None),
        "faults": {name: [sum(r["right"] for r in faults if r["fault"] == name), sum(r["fault"] == name for r in faults)] for name in FAULTS},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="that are killed, for each set of stages; every fifth in two processes")
    parser.add_argument("--stages", nargs="+", default=[*STAGES], choices=[*STAGES])
    parser.add_argument("--faults", nargs="*", default=[*FAULTS], choices=[*FAULTS])
    parser.add_argument("--output", type=Path, default=Path("runs/faults.jsonl"))
    parser.add_argument("--summary", type=Path, help="file for the last line")
    given = parser.parse_args(arguments)
    sys.path.append(str(Path(__file__).parent))  # the reward's module
    given.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in given.output.read_text(encoding="utf-8").splitlines()] if given.output.exists() else []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        with given.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not row["right"]:
            print("WRONG", json.dumps(row), flush=True)

    for stages in given.stages:
        for trial in range(given.runs):
            size = 2 if trial % 5 == 4 else 1
            if not any(row.get("trial") == trial and row["stages"] == stages for row in rows):
                keep({"stages": stages, "trial": trial, "processes": size} | killed(stages, size, trial))
        for name in given.faults:
            if not any(row.get("fault") == name and row["stages"] == stages for row in rows):
                keep({"stages": stages, "fault": name} | fault(stages, name))
    found = summed(rows)
    if given.summary:
        given.summary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
