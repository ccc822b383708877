"""Every benchmark runs, at its smallest size: a few records and random models; nothing is fetched."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import math
import shlex
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import t as student

from chats import model_folder
from dpalign.errors import DPAlignError
from dpalign.privacy import gate
from dpalign.privacy.mechanism import GaussianMechanism
from reader import ROOT, at_home, run_here, small_model, write_gzip

BENCHMARKS = ROOT / "benchmarks"
RESULTS = ROOT / "docs" / "results"


# What stands in for what is not here ---------------------------------------------------------------------------------


def fixed_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The children's peaks, which need processes of their own: 200 KiB for the private one and 100 for the other."""
    highest = iter([500, 700, 700, 800])
    module = importlib.import_module("private_step")
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(module.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=next(highest)))


def fixed_peaks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for all: 200 KiB for the private one, 100 without privacy, 150 for our own without it, 400 for Opacus."""
    highest = iter([500, 700, 700, 800, 600, 750, 500, 900])
    monkeypatch.setattr(subprocess, "run", run_here)
    module = importlib.import_module("private_step")
    monkeypatch.setattr(module.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=next(highest)))


def known_peaks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The children's peaks: 500 KiB when an update begins, and so many more of each, in the order in which they run."""
    more = iter([more for update in (100, 16, 80, 30, 12, 20) for more in (1, update, update)])
    module = importlib.import_module("memory_flat")
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(module, "forked", module.peak)
    monkeypatch.setattr(module, "resident", lambda: 500)
    monkeypatch.setattr(module, "highest", lambda: 500 + next(more))


TRL = '''
"""The few calls of TRL 0.11.4 that the worker makes."""
from dataclasses import dataclass
import torch
from peft import get_peft_model

class AutoModelForCausalLMWithValueHead:
    @staticmethod
    def from_pretrained(model, peft_config):
        return get_peft_model(model, peft_config)

@dataclass
class PPOConfig:
    batch_size: int
    mini_batch_size: int
    gradient_accumulation_steps: int
    ppo_epochs: int
    init_kl_coef: float
    adap_kl_ctrl: bool

class PPOTrainer:
    def __init__(self, config, model, tokenizer):
        assert config.mini_batch_size * config.gradient_accumulation_steps == config.batch_size
        self.model = model

    def generate(self, prompts, batch_size, return_prompt, **options):
        assert len(prompts) == batch_size and not return_prompt
        return [self.model.generate(input_ids=p[None], attention_mask=torch.ones_like(p[None]), **options)[0, len(p):] for p in prompts]

    def step(self, prompts, responses, scores):
        assert len(prompts) == len(responses) == len(scores)
        return {"time/ppo/forward_pass": 0.25, "time/ppo/optimize_step": 0.5}
'''


NEW_TRL = '''
"""The few calls of the newest TRL that the worker makes."""
from types import SimpleNamespace as RLOOConfig
import torch

class RLOOTrainer:
    def __init__(self, model, reward_funcs, args, train_dataset, processing_class, peft_config, callbacks):
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == len(train_dataset) * args.num_generations
        self.__dict__.update(locals())

    def train(self):
        width, control = self.args.max_completion_length, RLOOConfig()
        prompts = torch.tensor(self.processing_class(list(self.train_dataset["prompt"])).input_ids)
        while True:
            self.callbacks[0].on_step_begin(self.args, None, control)
            rows = prompts.repeat_interleave(self.args.num_generations, 0)
            ids = self.model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=width, do_sample=True, **self.args.generation_kwargs
            )[:, prompts.shape[1]:].tolist()
            scores = self.reward_funcs(completions=self.processing_class.batch_decode(ids), completion_ids=ids, prompts=None)
            assert len(scores) == len(rows)
            self.callbacks[0].on_step_end(self.args, None, control)
'''


def small_new_trl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "trl.py").write_text(NEW_TRL, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


def small_trl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `trl` for the worker's process."""
    (folder / "trl.py").write_text(TRL, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


class Piped:
    """The script's process, with `dpalign.trl` for `trl`, in this one: a line in, a line out."""

    def __init__(self, command: list[str], **options: object) -> None:
        script, dpalign_trl = (importlib.import_module(name) for name in ("trl_ppo_script", "dpalign.trl"))
        self.lines: list[str] = []
        self.answers = script.answers(dpalign_trl, command[-1], iter(self.lines.pop, None))
        self.stdin = self.stdout = self
        self.write, self.flush, self.close, self.wait = self.lines.append, *[lambda: None] * 3

    def readline(self) -> str:
        return next(self.answers)


def same_trl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo(folder, monkeypatch)
    monkeypatch.setattr(subprocess, "Popen", Piped)


def argued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight topics of four pairs, each judged by five people; and a small model."""
    small_model(folder / "small")
    rows = [
        {
            "topic": f"topic {t}",
            "arg1": f"Topic {t} is right, argument {i}, for {'a very good ' * (i % 3)}reason.",
            "arg2": f"Topic {t} is wrong, because {i} of us said so.",
            "votes": [[f"person {(t + i + k) % 9}", ("a1", "a2", "equal")[(i + k) % 3]] for k in range(5)],
            "gold": ("a1", "a2", "a1", "equal")[i],
        }
        for t, i in itertools.product(range(8), range(4))
    ]
    write_gzip(folder / "ukpconvarg1_full.jsonl.gz", rows)


def emails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty e-mails of ten people, and a small chat model."""
    monkeypatch.setenv("DPALIGN_LEDGER", str(folder / "ledger.sqlite"))
    model_folder(folder / "chatty", "smol", positions=448, width=40)
    rows = [{"original": f"Send {i}.", "revised": f"Please send {i}.", "person": f"p{i % 10}"} for i in range(40)]
    write_gzip(folder / "email_rewrites.jsonl.gz", rows)


def judged_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty requests whose score grows with how often they say please; and a small chat model."""
    model_folder(folder / "chatty", "smol", width=24)
    rows = [{"text": f"{'please ' * (i % 5)}mend this old page number {i} for us", "score": i % 5} for i in range(60)]
    write_gzip(folder / "politeness_requests.jsonl.gz", rows)


def check_directions(out: str, folder: Path) -> None:
    """Every arm on every split, and each arm's mean."""
    runs = [json.loads(line) for line in (folder / "directions.jsonl").read_text().splitlines()]
    assert [(run["arm"], run["seed"]) for run in runs] == [
        (arm, seed) for seed in (1, 2) for arm in ("random, rank 4", "random, rank 1", "activations")
    ]
    for row in last_json(out)["rows"]:
        gains = [run["gain"] for run in runs if run["arm"] == row["arm"]]
        assert row["gain"] == pytest.approx(sum(gains) / 2, abs=1e-3) and row["seeds"] == 2
        assert f"{row['arm']:15} epsilon 4: gain {row['gain']:.3f}" in out


def check_directions_again(out: str, folder: Path) -> None:
    """The published table, from the published runs."""
    lines = [line for line in out.splitlines() if " nats per token, " in line]
    assert len(lines) == 3
    assert "\n".join(lines) in (BENCHMARKS.parent / "docs" / "utility.md").read_text(encoding="utf-8")


def judging_people(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same requests with what five people say of each; and messages of ten people."""
    judged_texts(folder, monkeypatch)
    with gzip.open(folder / "politeness_requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        row["votes"] = [[f"w{(number + k) % 8}", 5.0 * row["score"] + k % 2] for k in range(5)]
    write_gzip(folder / "politeness_requests.jsonl.gz", rows)
    write_gzip(folder / "sms.jsonl.gz", [{"person": f"p{i % 10}", "text": f"w{i % 9} w7 w{i}"} for i in range(80)])
    at_home(folder, monkeypatch)
    small_model(folder / "small")


def demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_home(folder, monkeypatch)
    small_model(folder / "small")
    monkeypatch.setattr(subprocess, "run", run_here)


# What each must print ------------------------------------------------------------------------------------------------


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def one_line(out: str) -> dict:
    (line,) = out.splitlines()
    return json.loads(line)


def check_private_step(out: str, folder: Path) -> None:
    found = one_line(out)
    assert set(found) == {"time_ratio", "memory_ratio"} and found["time_ratio"] > 0 and found["memory_ratio"] == 2


def check_full_finetuning(out: str, folder: Path) -> None:
    found = one_line(out)
    times = ["time_ratio", "time_ratio_own", "time_ratio_opacus", "sum_ratio", "time_over_opacus", "noise_seconds"]
    assert set(found) == {"trained", "memory_ratio", "memory_ratio_opacus", "memory_over_opacus", *times}
    assert found["trained"] == 12 * 32 * 32 and min(found.values()) > 0
    assert (found["memory_ratio"], found["memory_ratio_opacus"], found["memory_over_opacus"]) == (2, 4, 0.5)


def check_memory_flat(out: str, folder: Path) -> None:
    """A row of four tokens has 8 KiB of logits of 512 words."""
    assert one_line(out) == {"peak_6_over_3": 1.25, "peak_2_rows_over_1": 1.5, "logits_overhead": 0.5}


def check_ppo_iteration(out: str, folder: Path) -> None:
    found = one_line(out)
    assert set(found) == {"ratio", "ours_s", "trl_s"} and min(found.values()) > 0


def check_trl_curve(out: str, folder: Path) -> None:
    found, row = last_json(out), json.loads((folder / "curve.jsonl").read_text().splitlines()[0])
    assert (found["seeds"], found["updates"], row["seed"]) == (2, 2, 0) and min(
        found["time_ratio"], found["cpu_ratio"]
    ) > 0
    assert [len(row[f"{side}_reward"]) for side in ("ours", "trl")] == [2, 2]
    assert row["ours_kl"][0] == row["trl_kl"][0] == 0 < max(row["ours_kl"][1], row["trl_kl"][1])
    assert type(found["within_noise"]) is bool and found["curve"]["ours"] != found["curve"]["trl"]


def check_trl_curve_table(out: str, folder: Path) -> None:
    """The published table, computed again from the published runs."""
    assert f"```\n{out}```\n" in (RESULTS / "trl_ppo_curve.md").read_text(encoding="utf-8") and out.count("\n") == 22


def check_ppo_scale(out: str, folder: Path) -> None:
    found = last_json(out)
    assert found["size"] == "tiny" and found["prompts"] == 3
    assert min(found[f"{phase}_s"] for phase in ("generate", "reference", "train")) >= 0 < found["iteration_s"]


def check_float_attack(out: str, folder: Path) -> None:
    found = one_line(out)
    assert found["before_right"] == found["trials"] == 4 and found["before_impossible"] > 400
    assert {v for k, v in found.items() if k.startswith("ours_impossible")} == {0}


def check_sentiment_bars(out: str, folder: Path) -> None:
    """The shares that docs/results has: computed again from the same rows."""
    published = json.loads((RESULTS / "quickstart_sentiment.bars.json").read_text(encoding="utf-8"))["rows"]
    lines = [line.split(": ", 1) for line in out.splitlines() if line.startswith("epsilon ")]
    assert {name.removeprefix("epsilon "): json.loads(row) for name, row in lines} == published


def check_preferences_bars(out: str, folder: Path) -> None:
    published = json.loads((RESULTS / "quickstart_preferences.bars.json").read_text(encoding="utf-8"))
    lines = [line.split(": ", 1) for line in out.splitlines()]
    assert {name.removeprefix("epsilon "): json.loads(row) for name, row in lines} == published


def check_beside(out: str, folder: Path) -> None:
    check_sentiment_bars(out, folder)
    assert "quickstart_sentiment_rloo" in out


def check_reward_head(out: str, folder: Path) -> None:
    title, *rows = out.splitlines()
    assert title.startswith("epsilon") and len(rows) == 3 * 4
    assert all(0 <= float(row.split()[-2]) <= 1 and math.isfinite(float(row.split()[-1])) for row in rows)


def check_quickstart_seeds(out: str, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "seeds.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0] and rows[0]["epsilon"] <= 4 and rows[0]["seconds"] > 0
    assert rows[0]["gain"] == rows[0]["reward_private"] - rows[0]["reward_sft"]


def check_dpo_pairs(out: str, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [(row["epsilon"], row["overrides"][4:]) for row in rows] == [("4", []), ("inf", ["dpo.learning_rate=1e-2"])]
    assert rows[0]["spent"] <= 4 and rows[0]["noise_multiplier"] > 0 == rows[1]["noise_multiplier"]
    assert out.count(" of the best without privacy") == 2


def check_dpo_table(out: str, folder: Path) -> None:
    """The published table, computed again from the published runs."""
    assert f"```\n{out}```\n" in (RESULTS / "dpo_pairs.md").read_text(encoding="utf-8") and out.count("\n") == 5


def check_offline(out: str, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "runs" / "offline.jsonl").read_text().splitlines()]
    private, judged = "conditional, 4, rank 8, private", "filtered, best of 4, judge"
    assert [row["arm"] for row in rows] == ["best of 4", "filtered, best of 4", private, judged, "rloo, beta 0.2"]
    # Every arm starts from the same model, and VADER measures them all.
    assert len({row["start"]["reward"] for row in rows[1:]}) == 1
    assert (folder / "runs" / "offline" / "conditional__4__rank_8__private" / "ledger.sqlite").is_file()
    assert rows[0]["measured"]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert all(row["measured"]["prompts"] == row["start"]["prompts"] == 4 and row["seconds"] > 0 for row in rows[1:])
    start = [line for line in out.splitlines() if line.startswith("| the model as it comes")]
    assert len(start) == 1 and "| 0.00 ± 0.00 |" in start[0] and out.count("\n") == 10
    assert out.splitlines()[-1].startswith(f"{judged}: its own reward went from "), "by what it has learned from, too"


def check_offline_table(out: str, folder: Path) -> None:
    """The published table, computed again from the published runs."""
    assert out in (RESULTS / "offline.md").read_text(encoding="utf-8") and out.count("\n") > 8


def test_published_mutants_add_up():
    """Each that survived has its reason, and the order's first ones are all there."""
    found = json.loads((RESULTS / "mutants.json").read_text(encoding="utf-8"))
    killed = Counter()
    for line in (RESULTS / "mutants.runs.jsonl").read_text(encoding="utf-8").splitlines():
        killed[json.loads(line)["mutant"]] |= json.loads(line)["killed"]
    assert found["total"] == found["killed"] + len(found["survivors"]) <= len(killed) < found["population"]
    assert all(survivor["reason"] for survivor in found["survivors"]) and found["share"] == round(
        found["killed"] / found["total"], 4
    )
    assert not any(killed[survivor["mutant"]] for survivor in found["survivors"])


def check_mutants(out: str, folder: Path) -> None:
    """An optimiser that leaves out its average dies; one that had survived would need a reason."""
    (row,) = [json.loads(line) for line in (folder / "mutants.jsonl").read_text().splitlines()]
    assert row["before"].startswith('state["exp_avg"].lerp_') and row["after"] == "pass"
    assert row["killed"] and row["by"].startswith("tests/test_optimizer.py::") and not row["timed_out"]
    found = json.loads((folder / "mutants.json").read_text())
    assert (
        json.loads(out.splitlines()[-1]) == found and found["killed"] == found["total"] == 1 < 40 < found["population"]
    )
    (folder / "mutants.jsonl").write_text(json.dumps(row | {"killed": False}) + "\n")
    again = [
        "--files",
        "training/optimizer.py",
        "--output",
        "mutants.jsonl",
        "--reached",
        "tests.jsonl",
        "--reasons",
        "why.json",
    ]
    with pytest.raises(SystemExit, match="no reason is given for 1"):
        importlib.import_module("mutants").main([*again, "--runs", "0"])
    (folder / "why.json").write_text(json.dumps({row["mutant"]: "a test"}))
    importlib.import_module("mutants").main([*again, "--runs", "0"])


def check_faults(out: str, folder: Path) -> None:
    """A run that was killed when it wrote to the ledger."""
    rows = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    assert [row["trial"] for row in rows] == [0]
    assert all(row["right"] and row["epsilon"] >= row["counted"] - 1e-6 for row in rows)
    assert "the ledger's row" in rows[0]["where"][0] and rows[0]["statuses"][0] == [-9]
    found = json.loads((folder / "faults.json").read_text())
    assert found["runs"] == found["right"] == 1 and found["kills"] >= 1
    # What is published is the sum of its rows.
    lines = (folder / "docs/results/faults.runs.jsonl").read_text().splitlines()
    published = json.loads((folder / "docs/results/faults.json").read_text())
    assert importlib.import_module("faults").summed([json.loads(line) for line in lines]) == published
    assert published["right"] == published["runs"] >= 200 and published["epsilon_below_count"] == 0
    assert all(right == runs == 7 for right, runs in published["faults"].values())
    # Draws that the ledger did not have would be found.
    faults = importlib.import_module("faults")
    draw = ["dpo", 0.0, 1.0, 0.4, "2.0", 1, "20.0"]
    assert faults.epsilon_of([draw] * 4) > faults.epsilon_of([draw] * 3) > 0
    halves = [["sft", 0.0, 0.5, *draw[3:]], ["ppo", 0.5, 1.0, *draw[3:]]]
    assert faults.epsilon_of(halves) == faults.epsilon_of(halves[:1])


def check_scaling(out: str, folder: Path) -> None:
    """The published tables, computed again; and two figures by hand."""
    assert out.strip() in (RESULTS.parent / "scaling.md").read_text(encoding="utf-8")
    scaling = importlib.import_module("scaling")
    # Three tokens meet the body, and the output layer one of them; one launch a layer and a token that is written.
    shape = scaling.Shape(1000.0, 2, 10, 20, 10, (10,))
    work = scaling.Work(shape, 1, 2, 1, 1, 1, shape.adapter(3), 4)
    assert shape.adapter(3) == 2 * 3 * (10 + 10)
    assert scaling.forward(work)["PFLOP"] * 1e15 == pytest.approx(2 * (3 * (1000 - 200) + 200))
    assert scaling.generation(work)["launches"] == 2 and scaling.held(work)["gradients of units"] == 4 * 120


def check_ukp(out: str, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "ukp.jsonl").read_text().splitlines()]
    assert [row["unit"] for row in rows] == ["pair", "annotator"] and rows[0]["units"] == 18 and rows[1]["units"] == 9
    assert all(0 <= row["accuracy"] <= 1 and row["epsilon_spent"] <= 4 and row["sigma"] > 0 for row in rows)
    assert "18 pairs with a better argument, 120 votes of 9 annotators; 6 test pairs of 2 topics" in out


def check_chat_emails(out: str, folder: Path) -> None:
    """Every stage was run under the one epsilon, and nobody's e-mail is a prompt of the policy's."""
    found = last_json(out)
    assert found["epsilon"] <= 4 and set(found["evaluation"]) == {"pretrained", "sft", "rloo"}
    assert found == json.loads((folder / "runs.jsonl").read_text())
    data = folder / "runs" / "chat_emails-data"
    asked = {name: (data / f"{name}.jsonl").read_text().splitlines() for name in ("private", "prompts", "public")}
    assert [len(rows) for rows in asked.values()] == [29, 5, 6]
    assert len({json.dumps(json.loads(row)["prompt"]) for rows in asked.values() for row in rows}) == 40


def check_rewards(out: str, folder: Path) -> None:
    (row,) = last_json(out)["rows"]
    assert row["task"] == "polite requests" and row["epsilon"] == 1 and row["splits"] == 2 and row["pairs"] <= 16
    assert all(0 <= row[name] <= 1 for name in ("free", "private", "nonprivate")) and row["nonprivate"] > 0.6
    assert len((folder / "rewards.jsonl").read_text().splitlines()) == 3  # with what is free, once


def check_choices(out: str, folder: Path) -> None:
    """Two prompts, each with what is chosen for free and by the query."""
    head, _, *rows = out.strip().splitlines()
    assert head == "| free | judge | private | judge |" and len(rows) == 2
    assert all(row.count(" | ") == 3 and row.startswith("| ... ") for row in rows)


def check_rewards_again(out: str, folder: Path) -> None:
    """The published rows, computed again from the published runs; no text of anybody's is in them."""
    published = json.loads((RESULTS / "free_and_private_reward.json").read_text(encoding="utf-8"))
    assert last_json(out) == published and len(published["rows"]) == 16


def check_bought_again(out: str, folder: Path) -> None:
    """The same, of what privacy buys: four tasks, two kinds of units for three of them; and text messages at two epsilons."""
    published = json.loads((RESULTS / "what_privacy_buys.json").read_text(encoding="utf-8"))
    assert last_json(out) == published and len(published["rows"]) == 7 * 2 * 5 + 4
    lines = [line for line in out.splitlines() if " units: free " in line]
    assert "\n".join(lines) in (RESULTS / "what_privacy_buys.md").read_text(encoding="utf-8")


def check_own_pairs(out: str, folder: Path) -> None:
    """Every policy has the reward's epsilon, and nothing but the reward has drawn."""
    rows = [json.loads(line) for line in (folder / "runs" / "own_pairs.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["dpo, best and worst of 4, beta 0.5", "rloo, beta 0.2", "grpo, beta 0.1"]
    assert all(row["drawn_by"] == ["reward_query"] and 0.99 < row["epsilon"] <= 1 for row in rows)
    assert all(row["start"] == rows[0]["start"] and row["start"]["kl"] == 0 for row in rows)
    assert out.count("\n| ") == 1 + len(rows) and "| grpo, beta 0.1 | " in out
    ledger = sqlite3.connect(folder / "runs" / "own_pairs" / "ledger.sqlite")
    assert ledger.execute("SELECT stage, count(*) FROM intents GROUP BY stage").fetchall() == [("reward_query", 1)]
    ledger.close()


def check_own_pairs_table(out: str, folder: Path) -> None:
    assert out.strip() in (RESULTS / "own_pairs.md").read_text(encoding="utf-8")


def check_dtypes(out: str, folder: Path) -> None:
    (row,) = last_json(out)["rows"]
    speeds = {name: row[f"tokens_per_second_{name}"] for name in ("float32", "bfloat16", "auto")}
    assert all(speed > 0 for speed in speeds.values()) and speeds["auto"] == speeds[row["auto"]]
    assert row["share"] == pytest.approx(speeds["auto"] / max(speeds.values()), rel=0.05)  # speeds have one decimal


def check_bought(out: str, folder: Path) -> None:
    """Rows of two tasks and units, and of the policy that follows from a reward; the closed gap where it is one."""
    rows = last_json(out)["rows"]
    assert [(row["task"], row["unit"], row.get("policy")) for row in rows] == [
        ("polite requests", "record", None), ("polite requests", "record", "best of 16"),
        ("polite requests", "person", None), ("polite requests", "person", "best of 16"),
        ("text messages", "record", None), ("text messages", "person", None),
    ]  # fmt: skip
    for row in rows:
        assert row["seeds"] == 2 and row["epsilon"] == 8 and (row["closed_gap"] is not None) == row["admitted"]
        if row["admitted"]:
            gap = (row["private"] - row["free"]) / (row["nonprivate"] - row["free"])
            assert row["closed_gap"] == pytest.approx(gap, abs=2e-3)
    asked = {row["unit"]: row["units"] for row in rows if row["task"] == "polite requests"}
    assert asked["person"] == 8 < asked["record"]  # eight judges
    assert [row["units"] for row in rows[4:]] == [64, 8]
    assert rows[4]["nonprivate"] > rows[4]["free"]  # SFT learns, without noise
    runs = [json.loads(line) for line in (folder / "buys.jsonl").read_text().splitlines()]
    assert len(runs) == 8 and not any("text" in run for run in runs)


def check_shown(out: str, folder: Path) -> None:
    assert "gpt2-medium" in out


def check_profile(out: str, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "FILE").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["private", "nonprivate", "plain"]


def check_audit(out: str, folder: Path) -> None:
    """One honest run that all layers pass, and a fault that the first of them finds."""
    found = json.loads(out)
    assert found["honest"]["runs"] == 1 and found["honest"]["exceeded"] == found["honest"]["rejected"] == 0
    assert {name: fault["found"] for name, fault in found["faults"].items()} == {"noise_halved": 1}
    assert found["faults"]["noise_halved"]["by"] == {"step": 1}
    honest, fault = [json.loads(line) for line in (folder / "runs" / "audit.jsonl").read_text().splitlines()]
    assert 3.9 < honest["claim"] <= 4 and "run: noise" in fault["rejected"]  # the first run is asked about everywhere


def check_audit_again(out: str, folder: Path) -> None:
    """The published summary, computed again from the published rows, and what it must say."""
    published = json.loads((RESULTS / "audit.json").read_text(encoding="utf-8"))
    assert json.loads(out) == published and len(published["faults"]) == 10
    honest = published["honest"]
    assert honest["runs"] == 100 and honest["exceeded"] == 0 and honest["bounds"]["Gaussian sum"]["mean"] >= 3.2
    assert all(fault["runs"] == 100 and fault["found"] >= 95 for fault in published["faults"].values())


def check_many_processes(out: str, folder: Path) -> None:
    """The release of one process, its noise, and a run that loses two of its processes and ends within its target."""
    found = one_line(out)
    assert set(found["sharded"]) == {"training", "full"}
    for sizes in found["sharded"].values():
        assert sizes["2"]["difference"] <= 1e-6 and 0.5 <= sizes["2"]["held"] < 0.51 < sizes["2"]["largest"]
    assert found["differences"]["2"] <= 1e-6 and found["noise"]["2"] == pytest.approx(1, abs=0.25)
    assert found["killed"]["statuses"] == [[1, -9, 1, 1], [1, -9]]
    assert found["killed"]["lost"] > 0 and found["killed"]["epsilon"] <= found["killed"]["target"]


def check_large_data(out: str, folder: Path) -> None:
    """Two thousand records to the first draw, which is not made."""
    found = one_line(out)
    assert list(found) == [
        "records", "cpu_seconds_to_first_draw", "peak_mb", "draw_ms", "draw_peak_mb", "ledger_ratio", "intent_ms",
    ]  # fmt: skip
    assert found["records"] == 2000 and found["cpu_seconds_to_first_draw"] > 0 and found["peak_mb"] > 50
    assert 0 < found["draw_ms"] < 200 and found["draw_peak_mb"] < 2 and found["ledger_ratio"] > 0 < found["intent_ms"]


def check_stale_adapter(out: str, folder: Path) -> None:
    """Every trial is found in one step, in both dtypes and in a process; a server that does its work is believed."""
    found = last_json(out)
    assert (found["trials"], found["found"], found["false_alarms"]) == (5, 5, 0)
    for dtype in ("float32", "bfloat16"):
        stale, fresh = found[dtype]["shares"]
        assert stale == 0 and 0.6 < fresh < 1.4 and found[dtype]["undecided"] == 0
    assert (
        found["bfloat16"]["rounding"] > 1e3 * found["float32"]["rounding"] and found["float32"]["smallest_move"] > 1e-3
    )


def check_fuzz(out: str, folder: Path) -> None:
    """No fault; and one that is there is found: an error that is not ours, a sentence that quotes a record."""
    found = last_json(out)
    assert found == json.loads((folder / "fuzz.json").read_text()) and found["cases"] == 60 and not found["faults"]
    assert all(kind["refused"] > 0 for kind in found["kinds"].values())
    fuzz = importlib.import_module("fuzz")
    # What is published is the sum of its rows, and what the page says.
    rows = [json.loads(line) for line in (folder / "docs/results/fuzz.runs.jsonl").read_text().splitlines()]
    published = fuzz.summed(rows)
    assert published == json.loads((folder / "docs/results/fuzz.json").read_text())
    assert published["cases"] >= 100_000 and not published["faults"] and published["kinds"].keys() == fuzz.KINDS.keys()
    page = (folder / "docs/security.md").read_text(encoding="utf-8").replace(",", "")
    assert all(
        f"| {one['cases']} | {one['accepted']} | {one['refused']} |" in page for one in published["kinds"].values()
    )
    kind, case = fuzz.KINDS["data"], fuzz.Case({"a": b"{}"})

    def meets(error: Exception) -> tuple[str, str]:
        def meet(case: object, folder: Path) -> None:
            raise error

        return fuzz.judged(replace(kind, meet=meet), case, folder)

    assert meets(DPAlignError("a sentence.")) == ("refused", "")
    assert meets(KeyError("x"))[1].startswith("KeyError") and meets(AssertionError("a row is lost")) == (
        "fault",
        "a row is lost",
    )
    assert (
        meets(DPAlignError(f"no {fuzz.MARKER}."))[1].startswith("quotes") and meets(DPAlignError("a\nb"))[0] == "fault"
    )


def check_malformed(out: str, folder: Path) -> None:
    found = last_json(out)
    assert found["inputs"] == 3 and not found["faults"] and found["slowest_s"] < 20
    assert len((folder / "malformed.jsonl").read_text().splitlines()) == 3


# The commands as documents and benchmarks give them ------------------------------------------------------------------


@dataclass(frozen=True)
class Smoke:
    """What makes a command small, what it needs, and what must come of it."""

    small: str
    check: Callable[[str, Path], None]
    prepare: Callable[[Path, pytest.MonkeyPatch], None] = lambda folder, monkeypatch: None


GPT2 = "--layers 1 --hidden 32 --heads 2 --vocab 64 --threads 1"
STAGES = (
    "--sft.expected_batch_size 4 --sft.max_steps 1 --sft.micro_batch_size 4 "
    "--ppo.expected_batch_size 4 --ppo.max_steps 1 --ppo.micro_batch_size 4 --ppo.max_completion_length 4"
)
SMOKE = {
    "private_step.py --json": Smoke(f"{GPT2} --rows 3 --tokens 6 --pairs 2", check_private_step, fixed_memory),
    "full_finetuning.py --json": Smoke(f"{GPT2} --rows 3 --tokens 6 --micro 2 --rounds 2", check_full_finetuning, fixed_peaks),
    "memory_flat.py --json": Smoke(
        "--layers 1 --hidden 32 --drawn 3 6 --records 2 --tokens 4 --vocab 512 --at_once 1", check_memory_flat, known_peaks
    ),
    "ppo_iteration.py --json": Smoke(
        f"{GPT2} --prompts 4 --prompt-tokens 3 --new-tokens 3 --trl-mini-batch-size 2 --pairs 2 "
        f"--micro-batch-size 3 --trl-python {shlex.quote(sys.executable)}",
        check_ppo_iteration, small_trl,
    ),
    "rloo_iteration.py --json": Smoke(
        f"{GPT2} --prompts 4 --generations 2 --prompt-tokens 3 --new-tokens 3 --trl-mini-batch-size 4 --pairs 2 "
        f"--micro-batch-size 4 --trl-python {shlex.quote(sys.executable)}",
        check_ppo_iteration, small_new_trl,
    ),
    "trl_ppo_curve.py --json": Smoke(
        "--seeds 2 --updates 2 --last 1 --batch_size 4 --mini_batch_size 4 --ppo_epochs 1 --new_tokens 3 --model small "
        f"--output curve.jsonl --trl-python {shlex.quote(sys.executable)}",
        check_trl_curve, same_trl,
    ),
    "trl_ppo_curve.py --output docs/results/trl_ppo_curve.runs.jsonl": Smoke("", check_trl_curve_table),
    "ppo_scale.py --sizes small --prompts 8 --device cpu": Smoke(
        "--sizes tiny --prompts 3 --prompt-tokens 3 --new-tokens 3 --vocab 64 --iterations 1 --micro-batch-size 2",
        check_ppo_scale,
    ),
    "many_processes.py --json": Smoke(
        "--processes 2 --units 32 --steps 2 --model small", check_many_processes, demo
    ),
    "dtype_auto.py --json": Smoke(
        "--models smollm2 --layers 1 --vocabulary 512 --prompts 2 --completion_tokens 2 --rounds 1", check_dtypes
    ),
    "float_attack.py --json": Smoke("--trials 4", check_float_attack),
    "sentiment_bars.py docs/results/quickstart_sentiment.runs.jsonl": Smoke("", check_sentiment_bars),
    "sentiment_bars.py docs/results/quickstart_sentiment.runs.jsonl --beside docs/results/rloo.runs.jsonl": Smoke(
        "", check_beside
    ),
    "preferences_bars.py docs/results/quickstart_preferences.runs.jsonl": Smoke("", check_preferences_bars),
    "own_pairs.py --output runs/own_pairs.jsonl": Smoke(
        "--arms 'dpo, best and worst of 4, beta 0.5' 'rloo, beta 0.2' 'grpo, beta 0.1' --completions 16 --steps 1 --prompts 4 "
        "--own_texts 40 --directions 4 --model small",
        check_own_pairs, demo,
    ),
    "own_pairs.py --seeds 0 --output docs/results/own_pairs.runs.jsonl": Smoke("", check_own_pairs_table),
    "reward_head.py": Smoke("--seeds 1 --epsilons 4 --batch-size 8 --steps 2", check_reward_head, demo),
    "quickstart_seeds.py --seeds 3": Smoke(
        f"--seeds 1 --output seeds.jsonl -- {STAGES} --model.name_or_path small --model.is_public true --sft.adapter.init_rows 16 --ppo.adapter.init_a random --eval_prompts 8",
        check_quickstart_seeds, demo,
    ),
    "dpo_pairs.py --epsilons 4 inf --seeds 3 --at inf dpo.learning_rate=1e-2": Smoke(
        "--seeds 1 --all dpo.max_steps=1 dpo.expected_batch_size=4 model.name_or_path=small model.is_public=true "
        "--output pairs.jsonl", check_dpo_pairs, demo
    ),
    "dpo_pairs.py --seeds 0 --least 8 --output docs/results/dpo_pairs.runs.jsonl": Smoke("", check_dpo_table),
    "offline.py --output runs/offline.jsonl": Smoke(
        "--arms 'best of 4' 'filtered, best of 4' 'conditional, 4, rank 8, private' 'filtered, best of 4, judge' 'rloo, beta 0.2' "
        "--steps 1 --completions 8 --prompts 4 --most_sampled 4 --init_rows 8 --model small --judge small", check_offline, demo
    ),
    "offline.py --arms --output docs/results/offline.runs.jsonl": Smoke("", check_offline_table),
    "ukp_convincingness.py --data ukpconvarg1_full.jsonl.gz --threads 1 --max-votes 4": Smoke(
        "--epsilons 4 --pair-batch-size 4 --pair-steps 1 --annotator-batch-size 2 --annotator-steps 1 --max-length 16 "
        "--device cpu --model small --output ukp.jsonl",
        check_ukp, argued,
    ),
    "free_and_private_reward.py --data DATA --output rewards.jsonl --json": Smoke(
        "--data . --tasks 'polite requests' --epsilons 1 --pairs 16 --splits 2 --draws 1 --texts 40 --own_texts 40 "
        "--prompts 3 --best_of 2 --model chatty --device cpu --cache kept",
        check_rewards, judged_texts,
    ),
    "free_and_private_reward.py --data DATA --output docs/results/free_and_private_reward.runs.jsonl --json": Smoke(
        "", check_rewards_again
    ),
    "free_and_private_reward.py --data DATA --tasks e-mails --show 8 --output rewards.jsonl": Smoke(
        "--data . --tasks 'polite requests' --epsilons 1 --show 2 --texts 40 --own_texts 40 "
        "--prompts 3 --best_of 2 --model chatty --device cpu --cache kept",
        check_choices, judged_texts,
    ),
    "what_privacy_buys.py --data DATA --tasks 'polite requests' 'inoffensive posts' 'movie snippets' e-mails --seeds 12 "
    "--output docs/results/what_privacy_buys.runs.jsonl --json": Smoke("", check_bought_again),
    "what_privacy_buys.py --data DATA --output buys.jsonl --json": Smoke(
        "--data . --tasks 'polite requests' 'text messages' --epsilons 8 --seeds 2 --draws 1 --texts 40 --own_texts 40 "
        "--prompts 3 --best_of 2 --model chatty --device cpu --cache kept --measured 8 --most_sampled 4 --most_steps 2 "
        "--of_a_person 2 --base small",
        check_bought, judging_people,
    ),
    "sft_directions.py --data DATA --output docs/results/sft_directions.runs.jsonl --json": Smoke(
        "", check_directions_again
    ),
    "sft_directions.py --data DATA --output directions.jsonl --json": Smoke(
        "--data . --seeds 1 2 --measured 8 --most_sampled 4 --most_steps 2 --of_a_person 2 --base small",
        check_directions, judging_people,
    ),
    "chat_emails.py --emails email_rewrites.jsonl.gz --output_dir runs/chat_emails --longest 160 --max_length 144 "
    "--completion 40 --batch 64 --steps 6 --prompts 8 --own_texts 128 --eval_prompts 32 --micro_batch_size 8": Smoke(
        "--model chatty --longest 600 --max_length 448 --batch 256 --steps 1 --prompts 32 --completion 4 --own_texts 40 "
        "--eval_prompts 4 --record runs.jsonl",
        check_chat_emails, emails,
    ),
    "profile_iteration.py --show docs/results/profile_h200_first.jsonl": Smoke("", check_shown),
    "profile_iteration.py --show docs/results/profile_h200.jsonl": Smoke("", check_shown),
    "faults.py --output docs/results/faults.runs.jsonl --summary docs/results/faults.json": Smoke(
        "--runs 1 --stages dpo --output faults.jsonl --summary faults.json --faults", check_faults
    ),
    "scaling.py --measured docs/results/profile_h200.jsonl docs/results/profile_h200_first.jsonl": Smoke("", check_scaling),
    "audit.py --output runs/audit.jsonl": Smoke("--runs 1 --canaries 60 --faults noise_halved", check_audit),
    "audit.py --runs 0 --output docs/results/audit.runs.jsonl": Smoke("", check_audit_again),
    "large_data.py --json": Smoke("--records 2000 --repeats 5 --model small --folder .", check_large_data, demo),
    "stale_adapter.py --json": Smoke("--trials 2 --processes 1", check_stale_adapter),
    "mutants.py --runs 100 --output docs/results/mutants.runs.jsonl --reasons docs/results/mutants.reasons.json "
    "--summary docs/results/mutants.json": Smoke(
        "--files training/optimizer.py --tests optimizer --runs 1 --output mutants.jsonl --reached tests.jsonl "
        "--summary mutants.json", check_mutants,
    ),
    "fuzz.py --output docs/results/fuzz.runs.jsonl --summary docs/results/fuzz.json": Smoke(
        "--cases 60 --kinds ledgers checkpoints --batch 30 --output fuzz.jsonl --summary fuzz.json", check_fuzz
    ),
    "malformed.py --output malformed.jsonl": Smoke("--groups together file ledgers --most 1", check_malformed),
    "profile_iteration.py --device cuda --dtype bfloat16 --model gpt2 --micro_batch_size 512 --output FILE": Smoke(
        "--device cpu --model tiny --micro_batch_size 2 --prompts 2 --prompt_tokens 2 --completion_tokens 2 --repeats 1 "
        "--algorithms ppo",
        check_profile,
    ),
}  # fmt: skip
USED_BY_OTHERS = {  # a word of theirs that a benchmark names
    "fuzz_kinds": ("fuzz", "fuzz_kinds"),
    "mutations": ("fuzz", "mutations"),
    "engine_server": ("stale_adapter", "engine_server.py"),
    "models": ("iteration", "word_tokenizer"),
    "iteration": ("ppo_iteration", "from iteration import"),
    "trl_rloo_worker": ("rloo_iteration", "trl_rloo_worker.py"),
    "forked": ("many_processes", "forked"),
    "trl_ppo_worker": ("ppo_iteration", "trl_ppo_worker.py"),
    "trl_ppo_script": ("trl_ppo_curve", "trl_ppo_script"),
}


@pytest.mark.parametrize("command", SMOKE)
def test_smoke(command, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    smoke, (file, *words) = SMOKE[command], shlex.split(command)
    smoke.prepare(tmp_path, monkeypatch)
    threads = torch.get_num_threads()
    try:
        importlib.import_module(Path(file).stem).main([*words, *shlex.split(smoke.small)])
    finally:
        torch.set_num_threads(threads)
    smoke.check(capsys.readouterr().out, tmp_path)


def test_every_benchmark_has_one():
    names = {file.stem for file in BENCHMARKS.glob("*.py")}
    assert names == {Path(command.split()[0]).stem for command in SMOKE} | set(USED_BY_OTHERS)
    for user, used in USED_BY_OTHERS.values():
        assert used in (BENCHMARKS / f"{user}.py").read_text(encoding="utf-8")


# The attack on low bits can find something ---------------------------------------------------------------------------


class NotRounded(GaussianMechanism):
    """The metrics' noise is added as it comes."""

    def _release_metrics(self):
        noise = self._noise(len(self.metrics), self.metrics_noise_multiplier) / self.metrics_grid
        noisy = (self._metrics_sum + noise) * (self.metrics_grid / self.divisor * math.sqrt(len(self.metrics)))
        pairs = zip(self.metrics, noisy.tolist(), strict=True)
        return {m.name: (m.low + m.high) / 2 + value * (m.high - m.low) / 2 for m, value in pairs}


class CoarseNoise(GaussianMechanism):
    """Noise in steps twice as large as those of the sum, whose lowest bit then shows through."""

    def _noise(self, count, standard_deviation):
        step = 2 * self.metrics_grid  # with C and sigma 1 that of the gradients, too
        return torch.round(super()._noise(count, standard_deviation) / step) * step


@pytest.mark.parametrize(("mutant", "gradients_too"), [(NotRounded, False), (CoarseNoise, True)])
def test_the_attack_sees_low_bits(mutant, gradients_too, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    attack = importlib.import_module("float_attack")
    small = ["--trials", "60", "--size", "100", "--units", "8"]
    assert attack.main(small)["ours_impossible"] == 0
    monkeypatch.setattr(gate, "GaussianMechanism", mutant)
    found = attack.main(small)
    assert found["ours_impossible_metrics"] > 30 and found["ours_impossible_evaluation"] > 30
    gradients = found["ours_impossible"] - found["ours_impossible_metrics"] - found["ours_impossible_evaluation"]
    assert (gradients > 2000) == gradients_too


@pytest.mark.parametrize("benchmark", ["ppo_iteration", "rloo_iteration", "trl_ppo_curve"])
def test_a_benchmark_without_trl_says_what_to_do(benchmark, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="make bench-setup"):
        importlib.import_module(benchmark).main(["--trl-python", str(tmp_path / "python")])


def test_a_peak_of_loading_is_not_taken_for_one_of_the_update(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memory_flat = importlib.import_module("memory_flat")
    monkeypatch.setattr(memory_flat, "highest", lambda: 500)
    with pytest.raises(SystemExit, match="nothing was measured"):
        memory_flat.peak(memory_flat.Update("sft", 2, 2, 1, 4, 64, 2), 1, 32)


def test_curves_are_compared_over_seeds(monkeypatch):
    """Worked by hand: variances 4 and 1 of three seeds each are an error of sqrt(5/3), with 50/17 degrees of freedom."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    curve = importlib.import_module("trl_ppo_curve")
    found = curve.compared([2.0, 4.0, 6.0], [0.0, 1.0, 2.0])
    assert (found["ours"], found["trl"], found["difference"]) == (4, 1, 3)
    assert (found["ours_deviation"], found["trl_deviation"]) == (2, 1)
    assert found["interval"] == pytest.approx(math.sqrt(5 / 3) * student.ppf(0.975, 50 / 17), abs=1e-4)
    assert found["within_noise"] and not curve.compared([7.0, 9.0, 11.0], [0.0, 1.0, 2.0])["within_noise"]
    seconds = {
        "ours_seconds": [9, 1, 3],
        "trl_seconds": [1, 2, 4],
        "ours_cpu_seconds": [9, 1, 1],
        "trl_cpu_seconds": [1, 4, 4],
    }
    rows = [{"ours_reward": [0, 0, 8 + n], "trl_reward": [9, 0, n], **seconds} for n in (0, 1)]
    found = curve.summary(rows, 1)
    assert (found["time_ratio"], found["cpu_ratio"], found["ours_seconds"]) == (0.625, 0.25, 2)
    assert (found["final"]["difference"], found["final"]["within_noise"], found["within_noise"]) == (8, False, False)
    assert (round(found["curve"]["ours"], 2), found["curve"]["within_noise"]) == (2.83, True)


def test_curves_of_other_settings_are_not_mixed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    curve, file = importlib.import_module("trl_ppo_curve"), tmp_path / "runs.jsonl"
    file.write_text(
        '{"seed": 0, "settings": {"updates": 2}}\n{"seed": 1, "settings": {"updates": 2}}\n', encoding="utf-8"
    )
    assert [row["seed"] for row in curve.read_rows(file, 1, {"updates": 2})] == [0]
    with pytest.raises(SystemExit, match="choose another --output"):
        curve.read_rows(file, 2, {"updates": 3})


def test_models_are_small_and_quiet(monkeypatch):
    """Without dropout, and a tokenizer whose tokens are its words' numbers."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    models = importlib.import_module("models")
    torch.manual_seed(0)
    model, tokenizer = models.gpt2(16, 1, 8, 2), models.word_tokenizer(16)
    ids = torch.tensor([tokenizer("w3 w15 w1")["input_ids"]])
    assert ids.tolist() == [[3, 15, 1]] and tokenizer.decode(ids[0]) == "w3 w15 w1"
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
