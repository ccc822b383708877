"""The TRL scripts in examples/trl: their ports run and differ in a few lines; docs/coming_from_trl.md shows those lines."""

from __future__ import annotations

import ast
import difflib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from chats import QWEN
from dpalign.models import embedded
from reader import ROOT, write_jsonl

EXAMPLES = ROOT / "examples" / "trl"
MOST = {"sft": 5, "reward": 5, "grpo": 4, "ppo": 3, "loop": 3}


def scripts(name: str) -> list[list[str]]:
    return [(EXAMPLES / f"{name}_{of}.py").read_text(encoding="utf-8").splitlines() for of in ("original", "dpalign")]


def difference(name: str) -> list[str]:
    """Lines that are taken away and lines that are new, in their order, without their surroundings."""
    return [line for line in difflib.unified_diff(*scripts(name), n=0, lineterm="") if line[:3] not in ("---", "+++")]


@pytest.mark.parametrize("name", MOST)
def test_a_port_changes_few_lines(name):
    assert {file.name for file in EXAMPLES.iterdir() if file.suffix == ".py"} == {
        f"{one}_{of}.py" for one in MOST for of in ("original", "dpalign")
    }
    lines = difference(name)
    new, gone = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    assert 0 < max(new, gone) <= MOST[name]
    compile("\n".join(scripts(name)[0]), name, "exec")


# What the trainers of TRL 0.11.4 (loop) and 1.9 (the others) take: what has to be there, and what may.
ASKED = {
    "sft": ("SFTTrainer", {"model", "train_dataset"}, {"args", "eval_dataset", "processing_class", "peft_config"}),
    "reward": (
        "RewardTrainer",
        {"model", "train_dataset"},
        {"args", "eval_dataset", "processing_class", "peft_config"},
    ),
    "grpo": (
        "GRPOTrainer",
        {"model", "reward_funcs"},
        {"args", "train_dataset", "eval_dataset", "processing_class", "peft_config"},
    ),
    "ppo": (
        "PPOTrainer",
        {"args", "processing_class", "model", "ref_model", "reward_model", "train_dataset", "value_model"},
        {"data_collator", "eval_dataset", "peft_config"},
    ),
    "loop": ("PPOTrainer", set(), {"dataset", "data_collator", "ref_model"}),
}


@pytest.mark.parametrize("name", MOST)
def test_an_original_gives_its_trainer_what_trl_takes(name):
    trainer, needed, allowed = ASKED[name]
    calls = [node for node in ast.walk(ast.parse("\n".join(scripts(name)[0]))) if isinstance(node, ast.Call)]
    by_name = {
        call.func.id: {k.arg: k.value for k in call.keywords} for call in calls if isinstance(call.func, ast.Name)
    }
    assert needed <= by_name[trainer].keys() <= needed | allowed
    if name == "ppo" and "eval_dataset" not in by_name[trainer]:  # TRL would look for completions to show in it
        assert by_name["PPOConfig"]["num_sample_generations"].value == 0


def test_the_document_shows_these_lines():
    text = (ROOT / "docs" / "coming_from_trl.md").read_text(encoding="utf-8")
    shown = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    expected = ["\n".join(line for line in difference(name) if line[:2] != "@@") + "\n" for name in MOST]
    assert shown == expected


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The embedded model with a chat template, a reward model, and data as users have them."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(embedded.resolve("tiny-review-lm"), folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = QWEN
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    scorer.save_pretrained(folder / "scorer")
    tokenizer.save_pretrained(folder / "scorer")

    def chat(number: int, answer: str) -> list[dict[str, str]]:
        asked = {"role": "user", "content": f"Is film {number} good?"}
        return [asked, {"role": "assistant", "content": f"{answer} {number}."}]

    write_jsonl(folder / "chats.jsonl", [{"messages": chat(i, "Yes, number")} for i in range(64)])
    pairs = [{"chosen": chat(i, "Yes, number"), "rejected": chat(i, "No, not")} for i in range(64)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"The film on day {i} was"} for i in range(64)])
    return folder


ARGUMENTS = {
    "sft": ("model", "chats.jsonl"), "reward": ("model", "pairs.jsonl"), "ppo": ("model", "scorer", "prompts.jsonl"),
    "grpo": ("model", "prompts.jsonl"), "loop": ("model", "prompts.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", MOST)
def test_a_port_runs(name, files, tmp_path, monkeypatch):
    monkeypatch.setenv("DPALIGN_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.setattr("dpalign.run.NORMALIZATION_ROWS", 16)  # self-written texts, which take the most of the time
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = [str(files / argument) for argument in ARGUMENTS[name]]
    monkeypatch.setattr(sys, "argv", [f"{name}_dpalign.py", *words, str(tmp_path / "output")])
    runpy.run_path(str(EXAMPLES / f"{name}_dpalign.py"), run_name="__main__")
    stated = json.loads((tmp_path / "output" / "privacy.json").read_text(encoding="utf-8"))
    assert (tmp_path / "output" / "adapter_model.safetensors").is_file()
    if name == "loop":
        assert not stated["private"]
    else:
        assert stated["private"] and 0 < stated["epsilon"] <= 8
