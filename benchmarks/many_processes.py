"""One run in several processes against the same run in one: the same weights, the noise once, and a process that dies.

    python benchmarks/many_processes.py --json

Each run is `dpalign run` of SFT and PPO (two passes over each sample) on self-made texts, in processes that are forked
here with the environment that `torchrun` gives them; they talk through gloo.

differences: largest difference of the released adapters from those of one process, with the same known draws and noise.
sharded: the same where the processes hold the base together, by sharding and processes; `held`: bytes of its large weights
    that the first process holds between computations, over all of them, and `largest`: that it held at once while a stage
    trained (SFT, where no completions are sampled).
noise: variance of what is released of samples of nobody, with secret noise, over that of one Gaussian; by processes.
killed: a run in four processes, one of which is killed (SIGKILL) inside a step; it goes on in two, and again in one. How
    each process ended, the draws that were lost, and epsilon, which counts them, beside its target.
seconds: of each run with known draws; processes that share cores are no faster.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from forked import together
from safetensors.torch import load_file

from dpalign.models.sharded import Shards
from dpalign.privacy import gate
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.training.loop import Follower, Stage

WORDS = ["dull", "bright", "strange", "quiet", "brave", "silly", "lovely", "clumsy", "honest", "greedy"]
TARGET = 4.0
STAGE = {"expected_batch_size": 16, "micro_batch_size": 8, "prepend_bos": True, "adapter": {"r": 2}}


def write_recipe(folder: Path, given: argparse.Namespace, target: float, sharding: str = "none", **stage: Any) -> Path:
    """A recipe of two stages beside its data and a ledger whose secret, and so the order of units, is known."""
    folder.mkdir(parents=True)
    texts = [f"This {WORDS[i % 10]} film was {WORDS[i // 10 % 10]} on evening {i:04}." for i in range(given.units)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    Ledger(folder / "ledger.sqlite").close()
    database = sqlite3.connect(folder / "ledger.sqlite")
    database.execute("INSERT INTO datasets (name, secret) VALUES (?, ?)", ("texts", bytes(range(32))))
    database.commit()
    database.close()
    section = STAGE | {"max_steps": given.steps} | stage
    lengths = {"prompt_max_tokens": 4, "max_prompt_length": 5, "max_completion_length": 8}
    recipe = {
        "output_dir": str(folder / "run"),
        "ledger": str(folder / "ledger.sqlite"),
        "model": {"name_or_path": given.model, "is_public": True, "sharding": sharding},
        "data": {"name": "texts", "path": str(folder / "data.jsonl")},
        "target_epsilon": target,
        "num_threads": 1,
        "sft": section | {"max_length": 16},
        "ppo": section | lengths | {"num_ppo_epochs": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(folder: Path, recipe: Path, size: int, before: Callable[[int], None] = lambda rank: None) -> list[Any]:
    return together(folder, size, "run", recipe, "--json", before=before)


def finished(folder: Path, recipe: Path, size: int, before: Callable[[int], None] = lambda rank: None) -> float:
    """Seconds that a run took to its end."""
    started = time.perf_counter()
    ended = run(folder, recipe, size, before)
    assert [process.status for process in ended] == [0] * size, ended
    return time.perf_counter() - started


def differences(folder: Path, given: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Of the released adapters from those of one process, and seconds, by processes."""
    seconds, weights = {}, {}
    for size in [1, *given.processes]:
        recipe = write_recipe(folder / str(size), given, 1000.0, insecure_seed=7, noise_multiplier=1.0)
        seconds[str(size)] = round(finished(folder, recipe, size), 2)
        weights[size] = load_file(folder / str(size) / "run" / "release" / "adapter_model.safetensors")
    found = {
        str(size): max(float((weights[size][name] - alone).abs().max()) for name, alone in weights[1].items())
        for size in given.processes
    }
    return found, seconds


def sharded(folder: Path, given: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Differences from one process, and what the first of several holds, by sharding and processes."""
    found: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in given.shardings}
    for kind in given.shardings:
        alone: dict[str, torch.Tensor] = {}
        for size in [1, *given.processes]:
            place = folder / f"{kind}-{size}"
            recipe = write_recipe(place, given, 1000.0, kind, insecure_seed=7, noise_multiplier=1.0)
            seconds = finished(place, recipe, size, weighing(place / "held.json"))
            weights = load_file(place / "run" / "release" / "adapter_model.safetensors")
            if size == 1:
                alone = weights
            else:
                moved = max(float((weights[name] - tensor).abs().max()) for name, tensor in alone.items())
                held = json.loads((place / "held.json").read_text(encoding="utf-8"))
                found[kind][str(size)] = {"difference": moved, **held, "seconds": round(seconds, 2)}
    return found


def weighing(file: Path) -> Callable[[int], None]:
    """Has the first process write down which share of the base's large weights it holds, and held at most."""

    def before(rank: int) -> None:
        if rank > 0:
            return
        block, start, most = Shards._block, Stage._start_alike, [0]

        def seen(self: Shards, number: int) -> Any:
            whole = block(self, number)
            most[0] = max(most[0], sum(gathered.numel() for gathered in self._gathered.values()))
            return whole

        def begun(self: Stage) -> None:
            start(self)
            shards = self.model.shards
            if self.algorithm.name == "sft":
                most[0] = 0
            elif shards.total:
                largest = (shards.kept + most[0]) / shards.total
                found = {"held": round(shards.kept / shards.total, 4), "largest": round(largest, 4)}
                file.write_text(json.dumps(found), encoding="utf-8")

        Shards._block, Stage._start_alike = seen, begun

    return before


def noise(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Variance of all that the first process releases of samples of nobody, over that of the noise, by processes."""
    found = {}
    for size in given.processes:
        place = folder / f"noise-{size}"
        recipe = write_recipe(place, given, 8.0)

        def nobody(rank: int, place: Path = place) -> None:
            gate.poisson_sample = lambda *arguments: np.zeros(0, dtype=np.int64)
            release = GaussianMechanism.release

            def kept(self: GaussianMechanism) -> Any:
                gradients, metrics = release(self)
                scale = self.divisor / (self.noise_multiplier * self.max_grad_norm) if self.noise_multiplier else 0.0
                if scale:
                    flat = torch.cat([g.flatten() for g in gradients]).double() * scale
                    with open(place / "noise", "ab") as file:
                        file.write(flat.numpy().tobytes())
                return gradients, metrics

            GaussianMechanism.release = kept

        finished(folder, recipe, size, nobody)
        released = np.fromfile(place / "noise")
        found[str(size)] = round(float(np.square(released).mean()), 4)
    return found


def killed(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A run that loses a process of four in its third sum, and one of two in its second; one process ends it."""
    recipe = write_recipe(folder / "killed", given, TARGET, save_steps=1)

    def dies_in(number: int) -> Callable[[int], None]:
        def before(rank: int) -> None:
            original, count = Follower._sum, [0]

            def dying(self: Follower, *arguments: Any) -> Any:
                count[0] += 1
                if rank == 1 and count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(self, *arguments)

            Follower._sum = dying

        return before

    statuses = [[process.status for process in run(folder, recipe, size, dies_in(n))] for size, n in ((4, 3), (2, 2))]
    last = run(folder, recipe, 1)
    assert last[0].status == 0, last
    summary = json.loads(last[0].out)
    database = sqlite3.connect(folder / "killed" / "ledger.sqlite")
    drawn, steps = database.execute("SELECT count(*), count(DISTINCT stage || step) FROM intents").fetchone()
    database.close()
    return {
        "statuses": statuses,
        "drawn": drawn,
        "lost": drawn - steps,
        "epsilon": summary["epsilon"],
        "target": TARGET,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shardings", nargs="+", choices=["training", "full"], default=["training", "full"])
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="of each stage")
    parser.add_argument("--model", default="tiny-review-lm", help="a public model")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        moved, seconds = differences(folder, given)
        found = {"differences": moved, "seconds": seconds, "sharded": sharded(folder, given)}
        found |= {"noise": noise(folder, given), "killed": killed(folder, given)}
    if not given.json:
        for size, difference in moved.items():
            for kind in given.shardings:
                print(f"{size} processes, sharding {kind}: {found['sharded'][kind][size]}")
            print(f"{size} processes: largest difference {difference:.1e}, noise variance x {found['noise'][size]}")
        print(f"killed: {found['killed']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
