"""DPO on pairs that the policy writes and a reward labels: by hand, from end to end, and what is refused."""

from __future__ import annotations

import json
import math
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import dpo, pairs
from safetensors.torch import load_file
from torch import Tensor

import dpalign
from dpalign import DPDPOTrainer, Privacy
from dpalign.algorithms import DPO, DPOConfig, PPOConfig
from dpalign.algorithms.base import Rows, encode_units
from dpalign.algorithms.own_pairs import OwnPairs
from dpalign.data import DataConfig
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, Policy
from dpalign.models.policy import Rollouts
from dpalign.privacy.ledger import Ledger
from dpalign.recipe import Recipe
from dpalign.rewards import Reward, RewardConfig
from dpalign.settings.engine import EngineConfig
from dpalign.settings.measurement import MeasurementConfig
from dpalign.stages import kind
from dpalign.training import OwnTextStage, Stage
from helpers import call, judged, ledger_rows, reviews, small_model, statement, write_jsonl, write_recipe
from tiny import dataset, tiny_policy

SMALL: dict[str, Any] = {
    "prompts": "self_written", "max_steps": 2, "expected_batch_size": 6, "max_prompt_length": 9,
    "max_completion_length": 6, "adapter": AdapterConfig(r=2),
}  # fmt: skip


def length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def own_pairs(function: Any = length, **changes: Any) -> OwnPairs:
    return OwnPairs(DPOConfig(**SMALL | changes), Reward(function, -100, 100))


# What a pair is ----------------------------------------------------------------------------------------------------


def rows_of(scores: list[float]) -> Rows:
    """Rows of prompts with three completions each; `place` says which row was which."""
    count = len(scores)
    tensors = {"scores": torch.tensor(scores), "place": torch.arange(count), "prompt": torch.arange(count) // 3}
    return Rows(torch.arange(count) // 3, tensors)


def chosen_and_rejected(scores: list[float]) -> list[tuple[int, int]]:
    rows = own_pairs(num_generations=3).learned(rows_of(scores))
    places = rows.tensors["place"].tolist()
    assert rows.unit.tolist() == [place // 3 for place in places]
    return [*zip(places[0::2], places[1::2], strict=True)]


def test_the_best_is_chosen_over_the_worst():
    assert chosen_and_rejected([1, 5, 3, -1, -7, -2, 0, 0, 1]) == [(1, 2 - 2), (3, 4), (8, 6)]


def test_equal_scores_and_a_missing_one_give_no_pair():
    assert chosen_and_rejected([2, 2, 2, 1, math.nan, 3, math.inf, 0, 1, 4, 4, 5]) == [(11, 9)]
    assert chosen_and_rejected([2, 2, 2]) == []


def moved(algorithm: OwnPairs, kind: str) -> Policy:
    """With the stage's adapter, which does something."""
    policy = tiny_policy(kind)
    algorithm.setup(policy)
    generator = torch.Generator().manual_seed(3)
    for p in policy.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return policy


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_the_stage_started_from_writes_them(kind):
    """The policy that has moved writes other texts; mutant: it is asked."""

    def written(algorithm: OwnPairs, policy: Policy) -> Tensor:
        units = encode_units(algorithm, policy, [[{"prompt": f"w{i} w{i + 1}"}] for i in range(6)])
        torch.manual_seed(0)
        return algorithm.rows(policy, units, None).tensors["input_ids"]

    class OnPolicy(OwnPairs):
        def sampling(self, policy):
            return nullcontext()

    algorithm = own_pairs()
    policy = moved(algorithm, kind)
    started = tiny_policy(kind)
    own_pairs().setup(started)  # an adapter that does nothing yet
    assert torch.equal(written(algorithm, policy), written(algorithm, started))
    mutant = OnPolicy(algorithm.config, algorithm.reward)
    assert not torch.equal(written(mutant, policy)[:, 9:], written(mutant, started)[:, 9:])


# The loss ------------------------------------------------------------------------------------------------------------


@dataclass
class FixedPolicy:
    """Answers with given log-probabilities."""

    logprobs: Tensor

    def completion_logprobs(self, rollouts: Rollouts, *law: float) -> tuple[Tensor, Tensor]:
        assert law == (2, 0.7)  # of the policy that sampled them
        return self.logprobs, torch.zeros_like(self.logprobs)


@pytest.mark.parametrize("loss", ["sigmoid", "square"])
def test_loss_and_metrics_worked_by_hand(loss):
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    logprobs = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, -1.0, -3.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -2.25, -9.0], [-0.5, -1.0, -3.25]])
    ids = torch.zeros(2, 5, dtype=torch.int64)
    rows = Rows(torch.zeros(2, dtype=torch.int64), {
        "input_ids": ids, "attention_mask": ids, "completion_mask": mask, "ref_logprobs": reference,
    })  # fmt: skip
    algorithm = own_pairs(beta=0.4, loss=loss, label_smoothing=0.1, temperature=0.7, min_completion_length=2)
    losses, metrics = algorithm.row_losses(FixedPolicy(logprobs), rows)
    ahead = 0.4 * (0.75 - -0.25)  # log-ratios of the chosen and of the rejected completion
    likely = 1 / (1 + math.exp(-ahead))
    expected = -0.9 * math.log(likely) - 0.1 * math.log(1 - likely) if loss == "sigmoid" else (0.9 - likely) ** 2
    assert losses.tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert metrics.tolist() == [pytest.approx([expected, 1.0, ahead], rel=1e-5)] * 2
    losses.mean().backward()
    slope = 0.4 * ((likely - 0.9) if loss == "sigmoid" else 2 * (likely - 0.9) * likely * (1 - likely))
    assert torch.allclose(logprobs.grad, slope * mask * torch.tensor([[1.0], [-1.0]]), atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_begins_at_log_2_and_the_policy_climbs_the_reward(kind, tmp_path):
    def count(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(c.split().count("w5")) for c in completions]

    changes = {"max_steps": 20, "expected_batch_size": 32, "learning_rate": 3e-2, "num_generations": 8}
    algorithm, policy, told = own_pairs(count, **changes), tiny_policy(kind), []
    OwnTextStage(policy, algorithm, None, folder=tmp_path, report=told.append).train()
    assert told[0].metrics["loss"] == pytest.approx(math.log(2), rel=1e-4) and told[0].metrics["accuracy"] == 0.5
    assert told[-1].metrics["accuracy"] > 0.8 and all(report.epsilon is None for report in told)

    def share() -> float:
        ids, mask = policy.encode_prompts([[3, 4]] * 256, 4)
        torch.manual_seed(0)
        return float((policy.sample(ids, mask, 6).completion_ids == 7).float().mean())  # w5

    with policy.reference():
        before = share()
    assert share() > 2 * before


def test_prompts_without_pairs_change_nothing(tmp_path):
    """All scores are equal: no row, no metric, no step."""
    policy, told = tiny_policy("gpt2"), []
    algorithm = own_pairs(lambda prompts, completions, **_: [1.0] * len(completions))
    OwnTextStage(policy, algorithm, None, folder=tmp_path, report=told.append).train()
    assert [report.metrics for report in told] == [None, None]
    assert all(p.abs().max() == 0 for name, p in policy.named_parameters() if "lora_B" in name)


# From end to end -------------------------------------------------------------------------------------------------------

QUERY = {"target_epsilon": 100.0, "max_length": 20, "directions": 4, "own_texts": 64, "shrinkage": 1.0}
STAGE: dict[str, Any] = {
    "prompts": "self_written", "max_steps": 3, "expected_batch_size": 8, "micro_batch_size": 32, "prepend_bos": True,
    "adapter": {"r": 2}, "prompt_max_tokens": 4, "max_prompt_length": 5, "max_completion_length": 6,
    "reward": {"source": "reward_model"}, "learning_rate": 1e-2,
}  # fmt: skip


def test_a_private_reward_then_pairs_of_its_own(tmp_path, capsys):
    """The reward's one query is all that is spent; the policy is measured on public prompts."""
    write_jsonl(tmp_path / "pairs.jsonl", judged(24))
    write_jsonl(tmp_path / "public.jsonl", reviews(4, "public"))
    shown = {"eval_path": str(tmp_path / "public.jsonl"), "eval_is_public": True}
    data = {"name": "pairs", "path": str(tmp_path / "pairs.jsonl")}
    recipe = write_recipe(
        tmp_path, sft=None, ppo=None, data=data, target_epsilon=100, reward_query=QUERY, dpo=STAGE, dpo_data=shown
    )
    plan = call(capsys, "plan", recipe, "--json").json
    assert [s["stage"] for s in plan["stages"]] == ["reward_query"] and plan["stages"][0]["units"] == 24
    (own,) = plan["drawing_nothing"]
    assert (own["stage"], own["steps"], own["batch_size"]) == ("dpo", 3, 8)
    assert (own["tokens_trained"], own["tokens_read"]) == (3 * 8 * 2 * 11, 3 * 8 * (4 + 2) * 11)
    done = call(capsys, "run", recipe, "--json").json
    assert [s["stage"] for s in done["stages"]] == ["reward_query"] and 0 < done["epsilon"] <= 100
    assert ledger_rows(tmp_path) == ledger_rows(tmp_path, stage="reward_query") == 1
    assert (
        "stage dpo read prompts that the model wrote itself; it drew nothing"
        in statement(tmp_path / "run")["assumptions"]
    )
    assert list(done["evaluation"]) == ["pretrained", "dpo"] and done["evaluation"]["pretrained"]["kl"] == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    own_lines = [line for line in lines if line["stage"] == "dpo"]
    assert [line["step"] for line in own_lines] == [1, 2, 3]
    assert all(line["own_text_metrics"].keys() == {"loss", "accuracy", "margin"} for line in own_lines)
    again = call(capsys, "run", recipe)
    assert "stage dpo is already done" in again.err and ledger_rows(tmp_path) == 1
    beside = ("--compare", "--free_reward.source", "vader", "--reference_reward.source", "vader")
    compared = call(capsys, "run", recipe, *beside, "--output_dir", tmp_path / "compared")
    free = json.loads((tmp_path / "compared" / "free" / "summary.json").read_text())
    assert compared.status == 0 and free["epsilon"] == 0 and list(free["evaluation"]) == ["pretrained", "dpo"]


def test_whoever_the_records_are_the_policy_is_the_same(tmp_path, capsys):
    """The SFT stage before it draws and learns nothing: what DPO then makes may not depend on anybody."""
    found = []
    for name, records in (("one", reviews(64)), ("other", reviews(80, "morning")[16:])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "data.jsonl", records)
        stage = STAGE | {"reward": {"source": "vader"}, "num_generations": 6}
        recipe = write_recipe(tmp_path / name, sft={"learning_rate": 0.0, "max_steps": 1}, ppo=None, dpo=stage)
        assert call(capsys, "run", recipe).status == 0
        assert ledger_rows(tmp_path / name) == ledger_rows(tmp_path / name, stage="sft") == 1
        found.append(load_file(tmp_path / name / "run" / "release" / "adapter_model.safetensors"))
    one, other = found
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in one.items() if "lora_B" in name)


@pytest.mark.parametrize("source", ["self_written", "public:public.jsonl"])
def test_a_killed_run_ends_where_it_would_have_ended(source, tmp_path, capsys, monkeypatch):
    """Equal weights, bit for bit."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "public.jsonl", reviews(20, "public"))
    stage = STAGE | {"prompts": source, "max_steps": 4, "reward": {"source": f"{__name__}:hashed", "low": 0, "high": 1}}
    stage["reward"]["is_public"] = True
    recipe = write_recipe(tmp_path, sft=None, ppo=None, dpo=stage)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert call(capsys, "run", recipe, "--output_dir", "whole").status == 0
    save = OwnTextStage._save

    def dies(self: OwnTextStage, step: int, where: str) -> None:
        save(self, step, where)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OwnTextStage, "_save", dies)
        assert call(capsys, "run", recipe).status == 130
    again = call(capsys, "run", recipe)
    assert "stage dpo resumes after step 2 of 4" in again.err and again.status == 0
    released = Path("release") / "adapter_model.safetensors"
    assert ("whole" / released).read_bytes() == ("run" / released).read_bytes() and ledger_rows(tmp_path) == 0
    for setting, value in (("num_generations", 5), ("beta", 0.5), ("max_completion_length", 5)):
        assert "changed since this run began" in call(capsys, "run", recipe, f"--dpo.{setting}", value).error


def hashed(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [zlib.crc32(c.encode()) % 97 / 97 for c in completions]


def test_the_trainer_takes_a_reward_and_no_records(tmp_path):
    args = partial(
        dpalign.DPOConfig, output_dir=str(tmp_path / "run"), prepend_bos=True, prompt_max_tokens=4, max_prompt_length=5,
        max_completion_length=6, max_steps=1, expected_batch_size=4,
    )  # fmt: skip
    privacy = Privacy(
        model_is_public=True, reward_is_public=True, reward_range=(0, 50), ledger=str(tmp_path / "ledger.sqlite")
    )
    made = partial(DPDPOTrainer, small_model(), privacy=privacy, quiet=True)
    with pytest.raises(DPAlignError, match="train_dataset is private, and with prompts self_written no record is read"):
        made(args(prompts="self_written"), judged(8), reward_funcs=length)
    with pytest.raises(DPAlignError, match="reward_funcs is for completions, and with args"):
        made(dpalign.DPOConfig(output_dir="x", max_steps=1), judged(8), reward_funcs=length)
    trainer = made(args(prompts="self_written", reward_weights=[0.5]), reward_funcs=[length])
    done = trainer.train()
    assert done["epsilon"] == 0 and done["stages"] == [] and ledger_rows(tmp_path) == 0


# What is refused -----------------------------------------------------------------------------------------------------------

OWN = {
    "num_generations": 2, "reward": RewardConfig(source="judge:x", questions=["a?"]), "max_prompt_length": 9,
    "truncate_prompts": True, "prompt_min_tokens": 3, "prompt_max_tokens": 4, "max_completion_length": 9,
    "min_completion_length": 1, "temperature": 0.5, "sft_coefficient": 0.1, "missing_eos_penalty": 0.1,
    "engine": EngineConfig(url="http://127.0.0.1:8000"),
}  # fmt: skip
OF_RECORDS = {
    "target_epsilon": 2.0, "target_delta": 1e-6, "noise_multiplier": 1.0, "num_train_epochs": 2.0,
    "adam_noise_correction": True, "adam_noise_floor": 0.2, "clipping": "flat", "clipping_gamma": 0.5,
    "metrics_noise_ratio": 5.0, "insecure_seed": 1, "margin_range": 9.0, "append_eos": False, "max_length": 64,
}  # fmt: skip
OF_BOTH = {
    "expected_batch_size", "max_steps", "micro_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_checkpointing", "save_steps",
    "logging_steps", "eval_steps", "seed", "adapter", "prompts", "prepend_bos", "beta", "loss", "label_smoothing",
}  # fmt: skip


def test_every_setting_is_honoured_or_refused():
    """A new one has to be put into one of the three."""
    assert {f.name for f in fields(DPOConfig)} == OF_BOTH | OWN.keys() | OF_RECORDS.keys()
    assert set(DPOConfig.of_other_prompts) == OWN.keys() and set(DPOConfig.of_private_prompts) == OF_RECORDS.keys()


@pytest.mark.parametrize("name", OWN)
def test_a_setting_of_own_pairs_is_refused_by_name_with_records(name):
    check_settings(DPOConfig(), "dpo")
    with pytest.raises(DPAlignError, match=f"^dpo: {name} is for prompts that are no one's.*leave {name} out"):
        check_settings(DPOConfig(**{name: OWN[name]}), "dpo")


@pytest.mark.parametrize("name", OF_RECORDS)
def test_a_setting_of_records_is_refused_by_name_with_own_pairs(name):
    check_settings(DPOConfig(prompts="self_written", max_steps=1), "dpo")
    with pytest.raises(DPAlignError, match=f"^dpo: {name} is for private prompts.*leave {name} out"):
        check_settings(DPOConfig(prompts="self_written", max_steps=1, **{name: OF_RECORDS[name]}), "dpo")


def test_one_stage_of_a_recipe_samples():
    own, data = DPOConfig(prompts="self_written", max_steps=1), DataConfig(name="d")
    with pytest.raises(DPAlignError, match="both dpo and ppo: keep one"):
        Recipe(data=data, dpo=own, ppo=PPOConfig()).check()
    both = Recipe(data=data, dpo=DPOConfig(), ppo=PPOConfig())
    both.check()
    assert both.rollouts is both.ppo and Recipe(dpo=own).rollouts is own and Recipe(dpo=DPOConfig()).rollouts is None


def test_a_measurement_does_not_measure_as_private_pairs_would_be_sampled():
    complete = partial(kind("measurement").completed, MeasurementConfig())
    with pytest.raises(DPAlignError, match="nothing to measure by"):
        complete([DPOConfig()])
    assert complete([DPOConfig(prompts="self_written", max_completion_length=7)]).sampling.max_completion_length == 7


def test_one_completion_makes_no_pair():
    with pytest.raises(DPAlignError, match="num_generations 1 must be at least 2"):
        check_settings(DPOConfig(num_generations=1))


def test_a_private_run_that_was_begun_before_there_were_own_pairs_goes_on(tmp_path):
    """Its settings have the hash that they had; what is new means nothing to it."""
    algorithm = dpo()
    stage = Stage(tiny_policy("gpt2"), algorithm, dataset(pairs()), folder=tmp_path, run="r", ledger=Ledger(":memory:"))
    assert isinstance(algorithm, DPO) and stage.config_hash == "a016bbc9505325da"
