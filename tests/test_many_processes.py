"""One run in several processes: the same draws lead to the same weights, the noise comes once, and one that ends, ends all."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.run import parse_args
from transformers import TrainerCallback

from dpalign.cli import main
from dpalign.errors import DPAlignError
from dpalign.launched import Place, place
from dpalign.models import AdapterStack
from dpalign.privacy.accountant import SampledGaussian
from dpalign.privacy.entropy import SeededEntropy, SystemEntropy
from dpalign.privacy.gate import Gate, PrivateStep, Sample, Share
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.training.loop import Follower, Stage, dealt, process_of
from dpalign.world import joined
from helpers import call, environment, judged, ledger_rows, reviews, statement, write_jsonl, write_recipe
from reader import ROOT
from test_trainers import sft
from test_trajectories import fix_secret
from tiny import tiny_object

sys.path.append(str(ROOT / "benchmarks"))
forked, together = (getattr(importlib.import_module("forked"), name) for name in ("forked", "together"))

# Its releases are checked in it, and not in one more process for each (conftest.py does the same for this process).
COMMAND = """
import sys
from dpalign.models import plain_logits, verify
verify.in_fresh_process = plain_logits.logits
from dpalign.cli import main
sys.exit(main())
"""
SEEDED = {"micro_batch_size": 8, "insecure_seed": 3, "noise_multiplier": 1.0}
STAGES = {
    "sft": {"max_steps": 3},
    "ppo": {"max_steps": 2, "num_ppo_epochs": 2, "adaptive_kl_target": 0.01, "adaptive_kl_horizon": 16},
}


def recipe_in(folder: Path, **changes) -> Path:
    """Two stages with known draws, whose units are in one order everywhere."""
    folder.mkdir(exist_ok=True)
    fix_secret(folder / "ledger.sqlite", "reviews")
    sections = {name: SEEDED | settings for name, settings in STAGES.items()}
    return write_recipe(folder, target_epsilon=1000, eval_prompts=2, **{**sections, **changes})


def released(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "release" / "adapter_model.safetensors")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "alone"
    assert main(["run", str(recipe_in(folder)), "--json"]) == 0
    return folder


# The same draws, the same weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_draws_lead_to_the_same_release(size, alone, tmp_path):
    folder = tmp_path / "together"
    ended = together(tmp_path, size, "run", recipe_in(folder), "--json")
    assert [e.status for e in ended] == [0] * size, ended
    assert difference(released(folder), released(alone)) < 1e-6
    assert lines(folder) == lines(alone)
    assert ledger_rows(folder) == ledger_rows(alone) == 5
    assert json.loads(ended[0].out)["epsilon"] == json.loads((alone / "run" / "summary.json").read_text())["epsilon"]
    assert all(e.out == e.err == "" for e in ended[1:])  # of the others nobody hears anything
    assert f"{size} processes share the work of stage ppo" in ended[0].err


def test_more_processes_than_units_that_are_drawn(tmp_path, capsys):
    """Of one unit a sample three of four processes have an empty share, and of an empty sample all have."""
    few = {"sft": SEEDED | {"max_steps": 4, "expected_batch_size": 1}, "ppo": None}
    ended = together(tmp_path, 4, "run", recipe_in(tmp_path / "four", **few), "--json")
    assert [e.status for e in ended] == [0] * 4, ended
    assert call(capsys, "run", recipe_in(tmp_path / "one", **few), "--json").status == 0
    assert difference(released(tmp_path / "four"), released(tmp_path / "one")) < 1e-6


def test_a_unit_that_two_processes_add_is_seen(alone, tmp_path):
    def overlap(rank: int) -> None:
        import dpalign.training.loop as loop

        def everything_to_all(samples, examples, ids, size):
            return dealt(samples, examples, ids, 1) * size

        loop.dealt = everything_to_all

    folder = tmp_path / "together"
    ended = together(tmp_path, 2, "run", recipe_in(folder), "--json", before=overlap)
    assert ended[0].status == 0 and difference(released(folder), released(alone)) > 1e-6


def test_a_process_with_coins_of_its_own_is_seen(alone, tmp_path):
    def other_coins(rank: int) -> None:
        if rank == 1:
            of_unit = SeededEntropy.of_unit
            rows = Follower._rows
            Follower._rows = lambda self, work: rows(
                self, type(work)(work.steps, work.examples, [of_unit(c, 1) for c in work.coins], work.places)
            )

    folder = tmp_path / "together"
    ended = together(tmp_path, 2, "run", recipe_in(folder), "--json", before=other_coins)
    assert ended[0].status == 0 and difference(released(folder), released(alone)) > 1e-6


def test_units_are_dealt_out_each_once():
    step = PrivateStep(SampledGaussian(0.5, 1.0, 1), max_grad_norm=1.0, divisor=4.0)
    samples = [Sample(step, [1, 4, 5], SystemEntropy()), Sample(step, [0, 4, 8, 9], SystemEntropy())]
    examples = [[f"example {unit}"] for unit in range(10)]
    ids = [bytes([unit]) for unit in range(10)]  # the even ones fall to the first of two
    one, two = dealt(samples, examples, ids, 2)
    assert (one.examples, one.places) == ([["example 0"], ["example 4"], ["example 8"]], [[1], [0, 1, 2]])
    assert (two.examples, two.places) == ([["example 1"], ["example 5"], ["example 9"]], [[0, 1], [2]])
    nobody = dealt([Sample(step, [], SystemEntropy())], examples, ids, 2)
    assert [(w.examples, w.places) for w in nobody] == [([], [[]])] * 2
    coins = dealt([Sample(step, [3, 4, 7], SeededEntropy(0, "x"))], examples, ids, 2)[1].coins
    known = [SeededEntropy(0, "x").of_unit(unit).uniforms(2).tolist() for unit in (3, 7)]
    assert [own.uniforms(2).tolist() for own in coins] == known and known[0] != known[1]


def test_who_else_is_drawn_moves_no_unit_to_another_process():
    """Devices need not round alike: one unit more must not change who computes another."""
    names = [hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(1000)]
    fixed = {name: process_of(name, 4) for name in names}
    assert all(200 < list(fixed.values()).count(number) < 300 for number in range(4))
    step = PrivateStep(SampledGaussian(0.5, 1.0, 1), max_grad_norm=1.0, divisor=4.0)
    for kept in (names, names[1:]):  # without the first, every place is another one
        everyone = Sample(step, [*range(len(kept))], SystemEntropy())
        for number, work in enumerate(dealt([everyone], [[name] for name in kept], kept, 4)):
            assert all(fixed[name] == number for (name,) in work.examples)


# Noise ---------------------------------------------------------------------------------------------------------------

COUNT, SIGMA = 20_000, 2.0


def released_noise(folder: Path, size: int, by_all: bool = False) -> np.ndarray:
    """What the first of `size` processes releases of a sample of nobody; `by_all`: each adds noise of its own."""

    def body(rank: int) -> int:
        world = joined()
        step = PrivateStep(SampledGaussian(0.5, SIGMA, 1), max_grad_norm=1.0, divisor=1.0)
        sample = Sample(step, [], SystemEntropy()) if world.is_first else Share(step)
        mechanism = sample.mechanism([torch.Size([COUNT])])
        if by_all and rank > 0:
            noise = Sample(step, [], SystemEntropy()).mechanism([torch.Size([COUNT])]).release()[0][0]
            mechanism._sums[0] += (noise / mechanism.grid).round().to(torch.int64)
        mechanism.combine(world.sum)
        if world.is_first:
            np.save(folder / "noise.npy", mechanism.release()[0][0].numpy())
        return 0

    assert [e.status for e in forked(folder, size, body)] == [0] * size
    return np.load(folder / "noise.npy")


def is_noise_once(noise: np.ndarray) -> bool:
    """Within 5 standard errors of the variance."""
    return bool(abs(noise.var() / SIGMA**2 - 1) < 5 * np.sqrt(2 / COUNT))


def test_the_noise_of_four_processes_is_that_of_one(tmp_path):
    """PRIVACY test 17."""
    assert is_noise_once(released_noise(tmp_path, 4))
    assert not is_noise_once(released_noise(tmp_path, 2, by_all=True))


def test_another_process_releases_nothing():
    share = Share(PrivateStep(SampledGaussian(0.5, SIGMA, 1), max_grad_norm=1.0, divisor=1.0))
    with pytest.raises(DPAlignError, match="only a run's first process draws"):
        share.mechanism([torch.Size([3])]).release()


def test_only_the_first_process_draws_journals_and_writes(tmp_path):
    def forbid(rank: int) -> None:
        def never(*arguments, **settings):
            raise AssertionError("another process than the first one")

        if rank > 0:
            Gate.draw = GaussianMechanism.release = sqlite3.connect = never
            SystemEntropy.normals = never

    folder = tmp_path / "together"
    secret = {name: {"insecure_seed": None, "noise_multiplier": None, "micro_batch_size": 8} for name in STAGES}
    ended = together(tmp_path, 2, "run", write_recipe_in(folder, **secret), "--json", before=forbid)
    assert [e.status for e in ended] == [0, 0], ended
    assert statement(folder / "run")["private"] and ledger_rows(folder) == 5


def write_recipe_in(folder: Path, **changes) -> Path:
    folder.mkdir()
    return write_recipe(folder, **changes)


# One that ends, ends all ---------------------------------------------------------------------------------------------

LOST = "another process of this run has ended"


def dies_in(step: int, who: int, how, what: str = "_sum"):
    """Has process `who` do `how` in its `step`-th sum, or whatever else of a stage."""

    def before(rank: int) -> None:
        kind, count = (Stage if rank == 0 else Follower), [0]
        original = getattr(kind, what)

        def dying(self, *arguments):
            count[0] += 1
            if rank == who and count[0] == step:
                how()
            return original(self, *arguments)

        setattr(kind, what, dying)

    return before


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raised() -> None:
    raise ValueError("This dull film is what a record says")


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "private" / "sft").glob("step-*"))


LONG = {"sft": {"max_steps": 8, "save_steps": 2, "micro_batch_size": 8}, "ppo": None}


def test_a_killed_process_stops_all_and_the_run_goes_on_with_fewer(tmp_path, capsys):
    """World size 4, 2 and 1; steps that were drawn and lost stay spent, and the target holds."""
    folder = tmp_path / "run"
    recipe = write_recipe_in(folder, **LONG)
    four = together(tmp_path, 4, "run", recipe, "--json", before=dies_in(4, 2, killed))
    assert [e.status for e in four] == [1, 1, -signal.SIGKILL, 1]
    assert LOST in four[0].err and four[0].err.count("dpalign: ") == 1 and LOST in four[1].err and four[3].err == ""
    assert saved(folder)[-1] == "step-00000003" and ledger_rows(folder) == 4
    two = together(tmp_path, 2, "run", recipe, "--json", before=dies_in(3, 0, killed))
    assert [e.status for e in two] == [-signal.SIGKILL, 1] and LOST in two[1].err
    assert ledger_rows(folder) == 4 + 3
    one = call(capsys, "run", recipe, "--json")
    assert one.json["epsilon"] <= 2 and "steps were lost" in one.err
    assert ledger_rows(folder, attempt=2) >= 1


def test_a_signal_that_a_launcher_repeats_lets_the_run_save(tmp_path):
    """Ctrl-C reaches all processes, and torchrun sends them SIGTERM behind it."""

    def interrupted() -> None:
        save = Stage._save

        def told_again(self, *arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            save(self, *arguments)

        Stage._save = told_again
        os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "run"
    ended = together(tmp_path, 2, "run", write_recipe_in(folder, **LONG), before=dies_in(4, 0, interrupted))
    assert [e.status for e in ended] == [128 + signal.SIGINT, 1]
    assert "ended by SIGINT" in ended[0].err and saved(folder)[-1] == "step-00000003"


def learned_recipe(folder: Path) -> Path:
    """A reward from one query beside a free one, and GRPO in two minibatches against it."""
    folder.mkdir()
    for name, records in (("pairs", judged(40, start=100)), ("prompts", reviews(40))):
        fix_secret(folder / "ledger.sqlite", name)
        write_jsonl(folder / f"{name}.jsonl", records)
    query = {"directions": 4, "own_texts": 40, "max_length": 20, "free": [{"source": "vader"}]}
    grouped = {
        "num_generations": 2,
        "max_steps": 2,
        "num_mini_batches": 2,
        "expected_batch_size": 8,
        "adapter": {"r": 2},
    }
    lengths = {"prompt_max_tokens": 4, "max_prompt_length": 12, "max_completion_length": 6}
    sections = {
        "reward_query": SEEDED | query,
        "grpo": SEEDED | grouped | lengths | {"reward": {"source": "reward_model"}},
    }
    data = {
        f"{stage}_data": {"name": name, "path": str(folder / f"{name}.jsonl"), "unit": "id"}
        for stage, name in (("reward_query", "pairs"), ("grpo", "prompts"))
    }
    return write_recipe(folder, target_epsilon=1000, eval_prompts=1, sft=None, ppo=None, data=None, **sections, **data)


def test_a_learned_reward_reaches_the_other_processes(tmp_path):
    """Trained by all of them, and, when the run goes on, read by the first one."""
    for size in (1, 2):
        recipe = learned_recipe(tmp_path / str(size))
        dies = dies_in(2, size - 1, killed, "_set_up")  # when the stage begins that the reward is for
        assert together(tmp_path, size, "run", recipe, before=dies)[-1].status == -signal.SIGKILL
        ended = together(tmp_path, size, "run", recipe, "--json")
        assert [e.status for e in ended] == [0] * size, ended
        assert "stage reward_query is already done" in ended[0].err
    assert difference(released(tmp_path / "2"), released(tmp_path / "1")) < 1e-6
    assert lines(tmp_path / "2") == lines(tmp_path / "1")


def test_what_a_process_raises_is_one_sentence_without_its_words(tmp_path):
    folder = tmp_path / "run"
    ended = together(tmp_path, 2, "run", write_recipe_in(folder, **LONG), "--json", before=dies_in(2, 1, raised))
    assert [e.status for e in ended] == [1, 1]
    assert "process 1: internal error ValueError" in ended[1].err and "withheld" in ended[1].err
    assert "dull" not in ended[0].err + ended[1].err and ended[0].out == ended[1].out == ""
    assert LOST in ended[0].err and "Traceback" not in ended[0].err + ended[1].err
    assert saved(folder) == ["step-00000001"]


def test_a_refusal_of_the_first_is_said_once(tmp_path):
    ended = together(tmp_path, 3, "run", tmp_path / "nothing.yaml")
    assert [e.status for e in ended] == [1, 1, 1]
    assert ended[0].err.count("\n") == 1 and "there is no recipe" in ended[0].err
    assert all(e.err == e.out == "" for e in ended[1:])


def test_another_base_in_one_process_is_refused(tmp_path):
    def other_weights(rank: int) -> None:
        before = AdapterStack.__init__

        def changed(self, base, tokenizer):
            before(self, base, tokenizer)
            if rank == 1:
                with torch.no_grad():
                    next(iter(base.parameters()))[0, 0] += 1

        AdapterStack.__init__ = changed

    ended = together(tmp_path, 2, "run", write_recipe_in(tmp_path / "run", **LONG), before=other_weights)
    assert [e.status for e in ended] == [1, 1] and ledger_rows(tmp_path / "run") == 0
    assert "1 of 2 processes have other weights than the first one: " in ended[0].err
    assert "other weights than the first one (model." in ended[1].err


# As documents have it -------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "many_devices.md").read_text(encoding="utf-8")


def test_the_page_starts_a_run_with_torchrun():
    (line,) = re.findall(r"^torchrun (.* -m dpalign run recipe.yaml)$", PAGE, re.MULTILINE)
    (several,) = re.findall(r"`torchrun (--nnodes .* -m dpalign run recipe.yaml)`", PAGE)
    for words, nodes in ((line, "1:1"), (several, "2")):
        parsed = parse_args(words.split())
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.module) == (nodes, "8", True)
        assert [parsed.training_script, *parsed.training_script_args] == ["dpalign", "run", "recipe.yaml"]


def test_the_page_starts_a_run_with_accelerate(tmp_path):
    """Which starts the processes as torchrun does."""
    (line,) = re.findall(r"^accelerate launch (.* -m dpalign run recipe.yaml)$", PAGE, re.MULTILINE)
    words = line.replace("--num_processes 8", "--num_processes 2").replace("-m dpalign", str(tmp_path / "command.py"))
    (tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")
    write_recipe(tmp_path, **LONG | {"sft": {"max_steps": 1}, "eval_prompts": 1})
    command = [sys.executable, "-m", "accelerate.commands.launch", *words.split(), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["private"] and "2 processes share" in done.stderr


# Where it is not meant for -----------------------------------------------------------------------------------------


def test_other_commands_run_in_one_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "dpalign plan runs in one process" in call(capsys, "plan", write_recipe(tmp_path)).error
    assert "--compare" in call(capsys, "run", write_recipe(tmp_path), "--compare").error
    assert "--audit tries the run in one process" in call(capsys, "run", write_recipe(tmp_path), "--audit").error
    monkeypatch.setenv("RANK", "1")
    silent = call(capsys, "plan", write_recipe(tmp_path))
    assert (silent.status, silent.out, silent.err) == (1, "", "")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("USE_FSDP", "true", "FSDP: the recipe's model.sharding says"), ("MIXED_PRECISION", "bf16", "model.dtype")],
)
def test_what_accelerate_was_told_and_is_not_done_is_refused(name, value, said, monkeypatch, capsys, tmp_path):
    for variable, number in (("RANK", "0"), ("WORLD_SIZE", "2"), (f"ACCELERATE_{name}", value)):
        monkeypatch.setenv(variable, number)
    assert said in call(capsys, "run", write_recipe(tmp_path)).error
    monkeypatch.setenv("RANK", "1")
    silent = call(capsys, "run", write_recipe(tmp_path))
    assert (silent.status, silent.out, silent.err) == (1, "", "")


def test_places(monkeypatch):
    assert place() == Place(0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 4, 1)
    for rank in ("4", "-1", "first"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(DPAlignError, match="is no place among processes"):
            place()


# From Python ---------------------------------------------------------------------------------------------------------


def test_a_trainer_in_a_script_of_several_processes(tmp_path):
    """Every process gets the summary; callbacks are told in the first one only, and the base stays as it was."""
    base = tiny_object("llama", tmp_path / "base")
    before = {name: p.clone() for name, p in base.named_parameters()}

    def body(rank: int) -> int:
        told = []

        class Watching(TrainerCallback):
            def on_step_end(self, args, state, control, **more):
                told.append(state.global_step)

        trainer = sft(tmp_path / "run", base, callbacks=[Watching()])
        summary = trainer.train()
        assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
        (tmp_path / f"{rank}.json").write_text(json.dumps({"summary": summary, "told": told}))
        return 0

    ended = forked(tmp_path, 2, body)
    assert [e.status for e in ended] == [0, 0], ended
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["summary"] == two["summary"] and one["summary"]["private"]
    assert (one["told"], two["told"]) == ([1, 2], [])
