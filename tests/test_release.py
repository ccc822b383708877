"""The release is plain: transformers and peft load it where dpalign cannot be imported, with the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dpalign.algorithms import PPOConfig, SFTConfig
from dpalign.data.load import DataConfig
from dpalign.models import AdapterConfig, ModelConfig, Policy
from dpalign.recipe import Recipe
from dpalign.run import run_recipe
from helpers import reviews
from tiny import tiny_base, tiny_tokenizer, words

# Runs where every import of dpalign fails; prints one JSON object of what it found.
PLAIN = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dpalign":
            raise ImportError("dpalign is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import dpalign
    sys.exit("dpalign was imported")
except ImportError:
    pass

import numpy, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
texts = json.loads(sys.argv[1])
found = {}
for release in sys.argv[2:]:
    base = json.load(open(release + "/adapter_config.json"))["base_model_name_or_path"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(release)
    ids = torch.tensor([tokenizer(texts[release]).input_ids])
    with torch.no_grad():
        before = plain(ids).logits.clone()
        model = PeftModel.from_pretrained(plain, release).eval()
        logits = model(ids).logits
    numpy.save(release + "/../logits.npy", logits.numpy())
    found[release] = {"ids": ids.tolist(), "moved": (logits - before).abs().max().item()}
assert not any(name.partition(".")[0] == "dpalign" for name in sys.modules)
print(json.dumps(found))
"""
SMALL = {"expected_batch_size": 8, "max_steps": 2, "noise_multiplier": 1.0, "learning_rate": 0.05}
CASES = {
    "tiny-review-lm": (AdapterConfig(r=2), AdapterConfig(r=2)),
    "gpt2": (
        AdapterConfig(r=3, target_modules=["c_attn"]),
        AdapterConfig(r=1, target_modules=["c_fc", "c_proj"], lora_alpha=5),
    ),
    "gpt2 all-linear": (AdapterConfig(r=2, target_modules="all-linear"), AdapterConfig(r=2, freeze_a=True)),
    "llama": (
        AdapterConfig(r=2, target_modules=["q_proj", "v_proj"], freeze_a=True),
        AdapterConfig(r=4, target_modules=["v_proj", "down_proj"], layers=[1]),
    ),
}


def run(case: str, folder: Path) -> tuple[Policy, Path, str]:
    """Trains both stages; returns the policy with its stacked adapters, the release and a text."""
    model, records, text = ModelConfig(), reviews(48), "This quiet play won me over"
    if case != "tiny-review-lm":
        base = folder / "base"
        tiny_base(case.split()[0]).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        model = ModelConfig(name_or_path=str(base), is_public=True)
        records = [{"text": words(8, i)} for i in range(48)]
        text = records[0]["text"]
    sft, ppo = CASES[case]
    recipe = Recipe(
        output_dir=str(folder / "run"), ledger=str(folder / "ledger.sqlite"), model=model, target_epsilon=1000,
        data=DataConfig(name="reviews"),
        sft=SFTConfig(**SMALL, max_length=16, adapter=sft),
        ppo=PPOConfig(**SMALL, prompt_max_tokens=3, max_prompt_length=3, max_completion_length=4, adapter=ppo),
    )  # fmt: skip
    policy = Policy.load(model)
    run_recipe(recipe, records={"sft": records, "ppo": records}, policy=policy)
    return policy, folder / "run" / "release", text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All cases, and what one process without dpalign found in their releases."""
    trained = {case: run(case, tmp_path_factory.mktemp(case.replace(" ", "-"))) for case in CASES}
    texts = {str(release): text for _, release, text in trained.values()}
    process = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(texts), *texts],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd="/",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return trained, json.loads(process.stdout)


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_gives_the_same_logits(runs, case):
    policy, release, text = runs[0][case]
    found = runs[1][str(release)]
    ids = torch.tensor(found["ids"])
    assert ids.tolist() == [policy.tokenizer(text).input_ids]
    with torch.no_grad():
        ours = policy(ids, torch.ones_like(ids), ids.shape[1])[0]
        with policy.reference():
            after_sft = policy(ids, torch.ones_like(ids), ids.shape[1])[0]
    plain = torch.from_numpy(np.load(release.parent / "logits.npy"))
    assert (ours - plain).abs().max() <= 1e-5
    # Both stages have moved the logits by far more than that.
    assert found["moved"] > 1e-2 and (ours - after_sft).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_a_release_trained_further_is_loaded_by_dpalign_alike(runs, case):
    policy, release, _ = runs[0][case]
    ids = torch.tensor(runs[1][str(release)]["ids"])
    loaded = Policy.load(ModelConfig(name_or_path=str(release)))
    with torch.no_grad():
        difference = (
            loaded(ids, torch.ones_like(ids), ids.shape[1])[0] - policy(ids, torch.ones_like(ids), ids.shape[1])[0]
        )
    assert difference.abs().max() <= 1e-5
    assert loaded.adapters == ["earlier"] and policy.adapters == ["sft", "ppo"]


def test_the_card_tells_how_to_load_it(runs):
    release = runs[0]["tiny-review-lm"][1]
    card = (release / "README.md").read_text()
    base = json.loads((release / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert f"from_pretrained({json.dumps(base)})" in card and "differential privacy" in card
    assert json.loads((release / "adapter_config.json").read_text())["r"] == 4
