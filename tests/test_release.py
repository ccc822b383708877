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
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from conftest import FRESH
from dpalign.algorithms import PPOConfig, SFTConfig
from dpalign.data import DataConfig
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, ModelConfig, Normalization, Policy, RewardModel, TextFormat, verify
from dpalign.models.bases import base_path, remember_base
from dpalign.models.verify import check_merged, check_release, probe_ids, probe_logits
from dpalign.privacy.statement import PrivacyStatement
from dpalign.recipe import Recipe
from dpalign.release import PromptFormat, write_release
from dpalign.run import run_recipe
from helpers import call, files_below, reviews
from tiny import tiny_base, tiny_folder, tiny_tokenizer, words

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
texts, bases = json.loads(sys.argv[1]), json.loads(sys.argv[2])  # where they lie is in no release
found = {}
for release, base in bases.items():
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
        [sys.executable, "-c", PLAIN, json.dumps(texts), json.dumps({name: base_path(name) for name in texts})],
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


# What was written is what was trained -----------------------------------------------------------------------------


def trained(folder: Path, dtype: str = "float32") -> tuple[Policy, str]:
    """A policy on a base in folder/base with two random adapters, and that base."""
    base = folder / "base" if (folder / "base").exists() else tiny_folder("llama", folder / "base")
    policy = Policy.load(ModelConfig(str(base), dtype=dtype))
    torch.manual_seed(0)
    for stage in ("sft", "ppo"):
        policy.add_adapter(stage, AdapterConfig(r=2))
        for name, p in policy.named_parameters():
            if f".{stage}." in name:
                torch.nn.init.normal_(p, std=0.1)
    return policy, str(base)


STATEMENT = PrivacyStatement(private=True, epsilon=1.0, delta=1e-5, stages=[])


def scaled(factor: float):
    """A policy whose release is another adapter than the one that was trained."""

    class Wrong(Policy):
        def save_adapter(self, folder, base_model):
            super().save_adapter(folder, base_model)
            file = Path(folder) / "adapter_model.safetensors"
            save_file({k: v * factor if "lora_B" in k else v for k, v in load_file(file).items()}, file)

    return Wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("factor", [0.0, 0.97, 1.03, 1.0])
def test_a_release_that_is_not_what_was_trained_is_not_left(dtype, factor, tmp_path):
    """The right one passes in every dtype, and one that is 3% off in none: what is compared is float32."""
    policy, base = trained(tmp_path, dtype)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    release = tmp_path / "release"
    write_release(release, policy, STATEMENT, base, "t", PromptFormat())
    old = {f: f.read_bytes() for f in files_below(release)}
    policy.__class__ = scaled(factor)
    if factor == 1:
        write_release(release, policy, STATEMENT, base, "t", PromptFormat())
    else:
        with pytest.raises(DPAlignError, match=r"nothing was released: .* away from the trained model's"):
            write_release(release, policy, STATEMENT, base, "t", PromptFormat())
        assert {f: f.read_bytes() for f in files_below(release)} == old
    assert {p.name for p in tmp_path.iterdir()} == {"base", "release"}
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in policy.named_parameters())


def test_half_precision_is_compared_in_float32_and_put_back(tmp_path):
    policy, _ = trained(tmp_path, "bfloat16")
    before, ids = {n: (p.data_ptr(), p.dtype) for n, p in policy.named_parameters()}, probe_ids(policy)
    narrow = policy(ids, torch.ones_like(ids), ids.shape[1])[0]
    found = probe_logits(policy.model, ids)
    assert {n: (p.data_ptr(), p.dtype) for n, p in policy.named_parameters()} == before
    wide = policy.float()(ids, torch.ones_like(ids), ids.shape[1])[0]
    assert (found - wide).abs().max() < 1e-4 < 1e-3 < (narrow - wide).abs().max()


def test_a_base_that_has_changed_since_the_run_began_is_noticed(tmp_path):
    policy, base = trained(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    save_file({k: v * 1.01 if "embed" in k else v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(DPAlignError, match="Is the base what it was when the run began"):
        write_release(tmp_path / "release", policy, STATEMENT, base, "t", PromptFormat())
    assert not (tmp_path / "release").exists()


def test_a_release_is_checked_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Nothing that this process has done to peft can make a release look right, or wrong."""
    monkeypatch.setattr(verify, "in_fresh_process", FRESH)
    policy, base = trained(tmp_path)
    with monkeypatch.context() as here:
        here.setattr("peft.PeftModel.from_pretrained", lambda *a, **k: pytest.fail("loaded in this process"))
        write_release(tmp_path / "release", policy, STATEMENT, base, "t", PromptFormat())
    file = tmp_path / "release" / "adapter_model.safetensors"
    save_file({k: 1.1 * v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(DPAlignError, match=r"its logits are .* away from the trained"):
        check_release(policy, tmp_path / "release", base)
    with pytest.raises(DPAlignError, match="cannot load it in a process of its own: "):
        check_release(policy, tmp_path / "nothing", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_reward_models_release_is_checked_with_its_head(pooling, tmp_path):
    policy, base = trained(tmp_path)
    model = RewardModel.from_policy(policy, TextFormat(max_length=8, pooling=pooling))
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path / "release", base, Normalization())
    check_release(model, tmp_path / "release", base)
    with torch.no_grad():
        model.head.weight[0, 3] += 0.1
    with pytest.raises(DPAlignError, match="nothing was released"):
        check_release(model, tmp_path / "release", base)


def test_a_merged_export_is_checked_and_keeps_its_stop_ids(tmp_path, capsys, monkeypatch):
    base = tiny_base("llama")
    base.generation_config = GenerationConfig(eos_token_id=[1, 5])
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    policy, name = trained(tmp_path)
    write_release(tmp_path / "release", policy, STATEMENT, name, "t", PromptFormat())
    (tmp_path / "private").mkdir()
    remember_base(tmp_path / "private", name)
    assert call(capsys, "export", tmp_path / "release", "--to", tmp_path / "out", "--merge").status == 0
    assert Policy.load(ModelConfig(str(tmp_path / "out"))).stop_ids == [1, 5]
    check_merged(policy, tmp_path / "out")
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self: self.unload(), raising=False)
    refused = call(capsys, "export", tmp_path / "release", "--to", tmp_path / "other", "--merge").error
    assert "nothing was released" in refused and not (tmp_path / "other").exists()
