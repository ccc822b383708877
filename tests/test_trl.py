"""`dpalign.trl`: TRL's names, each honoured or refused; TRL 0.11's loop without privacy; TRL 0.12's trainer with and without."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    TrainerCallback,
)

from dpalign import DPAlignError, DPSFTTrainer, SFTConfig
from dpalign.settings.rewards import RewardConfig
from dpalign.trl import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    Privacy,
    create_reference_model,
    set_seed,
)
from dpalign.trl.config import HONOURED, TOLD
from dpalign.trl.loop import LoopTrainer
from dpalign.trl.models import ValueHead
from dpalign.trl.translate import read_rows, settings
from dpalign.trl.update import Coefficient, RunningMoments, collected, losses, masked_variance, whitened
from tiny import tiny_folder, tiny_object, tiny_policy, tiny_tokenizer, words


def names(text: str) -> set[str]:
    return set(text.split())


# Fields of PPOConfig in TRL 0.11.4 and 1.9 beside those of transformers' TrainingArguments.
TRL_0_11 = names("""
    exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns tracker_kwargs
    accelerator_kwargs project_kwargs tracker_project_name push_to_hub_if_best_kwargs steps learning_rate adap_kl_ctrl
    init_kl_coef kl_penalty target horizon gamma lam cliprange cliprange_value vf_coef batch_size forward_batch_size
    mini_batch_size gradient_accumulation_steps world_size ppo_epochs max_grad_norm optimize_cuda_cache
    optimize_device_cache early_stopping target_kl compare_steps ratio_threshold use_score_scaling use_score_norm
    score_clip whiten_rewards gradient_checkpointing is_encoder_decoder is_peft_model backward_batch_size
    global_backward_batch_size global_batch_size dataset_num_proc
""")
TRL_1_9 = names("""
    learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
    num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path
    world_size num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size
    push_to_hub reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef
    kl_estimator cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation logging_steps
    gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel torch_empty_cache_steps
""")
NAMES = {f.name for f in dataclasses.fields(PPOConfig)}
OTHER = {  # another value of a field, where 3 will not do
    "lr_scheduler_type": "constant", "stop_token": "eos", "save_strategy": "no", "adap_kl_ctrl": False,
    "early_stopping": True, "use_score_scaling": True, "whiten_rewards": True, "gradient_checkpointing": True,
    "kl_penalty": "mse", "eval_strategy": "steps", "gamma": 0.5, "lam": 0.5, "save_steps": 2, "num_ppo_epochs": 2,
}  # fmt: skip


# Settings --------------------------------------------------------------------------------------------------------


def test_every_field_of_both_versions_is_there():
    assert not (TRL_0_11 | TRL_1_9) - NAMES


@pytest.mark.parametrize("style", ["loop", "trainer"])
def test_a_field_is_honoured_told_or_refused_by_name(style):
    refused = sorted(NAMES - HONOURED[style] - TOLD)
    assert len(refused) > 70
    for name in refused:
        config = PPOConfig()
        config.resolve(style)  # its own defaults are none of it
        setattr(config, name, "something else")
        with pytest.raises(
            DPAlignError, match=rf"^{name}='something else' (cannot be honoured: .+|is a setting of .+)\.$"
        ):
            config.resolve(style)


def translated(**changes):
    config = PPOConfig(**{"output_dir": "x", "total_episodes": 640, "gradient_accumulation_steps": 6} | changes)
    config.resolve("trainer")
    return settings(config, 100, 8, RewardConfig())


ELSEWHERE = {  # honoured where the name is: in PPOTrainer, or in a check of its values
    "output_dir", "report_to", "disable_tqdm", "num_sample_generations", "optim", "max_grad_norm", "max_prompt_length",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HONOURED["trainer"] - ELSEWHERE))
def test_what_is_honoured_changes_our_settings(name):
    more = {"total_episodes": None} if name == "num_train_epochs" else {}
    assert translated(**more) != translated(**more, **{name: OTHER.get(name, 4)})


def test_batches_and_steps_are_those_of_trl():
    ours = translated(per_device_train_batch_size=4, num_mini_batches=3, num_ppo_epochs=2, total_episodes=100)
    assert (ours.expected_batch_size, ours.num_mini_batches, ours.micro_batch_size) == (8, 3, 4)
    assert ours.max_steps == 3 * math.ceil(100 / 24) and ours.passes == 2
    assert translated().min_completion_length == 53 and translated(stop_token="eos").min_completion_length == 0


def test_unknown_names_get_the_closest_one():
    with pytest.raises(DPAlignError, match=r"no field kl_coeff, .* the closest is kl_coef"):
        PPOConfig(kl_coeff=0.1)
    with pytest.raises(DPAlignError, match="no field reward_whitening, here as in TRL and transformers"):
        PPOConfig(reward_whitening=True)


def test_the_defaults_are_those_of_the_version_that_the_names_are_of():
    assert PPOConfig(init_kl_coef=0.1).learning_rate == 1.41e-5 and PPOConfig(init_kl_coef=0.1).batch_size == 128
    assert PPOConfig(kl_coef=0.1).learning_rate == 3e-6 and PPOConfig(kl_coef=0.1).seed == 42
    assert PPOConfig(batch_size=64, steps=640).total_ppo_epochs == 10
    assert PPOConfig(forward_batch_size=16).mini_batch_size == 16
    (parsed,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(["--output_dir", "x", "--kl_coef", "0.3"])
    assert parsed.kl_coef == 0.3 and parsed.learning_rate == 3e-6


# The numbers of TRL 0.11's step, worked out by hand ------------------------------------------------------------------


def test_whitening_is_over_all_tokens_that_count():
    values, mask = torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert masked_variance(values, mask) == 4  # of 1, 3 and 5, unbiased
    assert torch.allclose(whitened(values, mask)[mask > 0], torch.tensor([-1.0, 0.0, 1.0]))
    assert torch.allclose(whitened(values, mask, shift_mean=False)[mask > 0], torch.tensor([2.0, 3.0, 4.0]))


def test_advantages_and_losses_by_hand():
    config = PPOConfig(init_kl_coef=0.5, gamma=1.0, lam=0.5, vf_coef=0.1)
    config.resolve("loop")
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    logprobs, ref = torch.tensor([[-1.0, -1.0], [-2.0, 0.0]]), torch.tensor([[-2.0, -1.0], [-2.0, 0.0]])
    batch = collected(config, torch.tensor([1.0, 3.0]), logprobs, ref, torch.zeros(2, 2), mask, 0.5)
    # KL 1 on the first token costs 0.5; the score falls on the last token that counts.
    assert batch.penalties.tolist() == [[-0.5, 0.0], [0.0, 0.0]]
    assert batch.returns.tolist() == [[-0.5 + 0.5 * 1.0, 1.0], [3.0, 0.0]]
    assert torch.allclose(
        batch.advantages[mask > 0], torch.tensor([0.0, 1.0, 3.0]).sub(4 / 3).div((7 / 3) ** 0.5), atol=1e-5
    )
    found = losses(config, batch, torch.tensor([0, 1]), logprobs, torch.zeros(2, 2))
    assert abs(float(found["loss/policy"])) < 1e-6  # ratio 1, whitened
    assert float(found["loss/value"]) == pytest.approx(0.5 * (0 + 1 + 9) / 3)
    moved = losses(config, batch, torch.tensor([0, 1]), logprobs + math.log(2) * mask, torch.full((2, 2), 1.0))
    a = batch.advantages[mask > 0]
    assert float(moved["loss/policy"]) == pytest.approx(float(torch.max(-a * 2, -a * 1.2).mean()), rel=1e-5)
    clipped = [max((1.0 - r) ** 2, (0.2 - r) ** 2) for r in (0.0, 1.0, 3.0)]
    assert float(moved["loss/value"]) == pytest.approx(0.5 * sum(clipped) / 3)
    config.ratio_threshold = 1.5
    assert float(losses(config, batch, torch.tensor([0, 1]), logprobs + math.log(2) * mask, mask)["loss/policy"]) == 0


def test_the_coefficient_and_the_running_moments():
    adaptive, fixed = Coefficient(0.2, 6.0, 1000.0), Coefficient(0.2, None, 1000.0)
    for coefficient in (adaptive, fixed):
        coefficient.update(60.0, 100)
    assert adaptive.value == pytest.approx(0.2 * 1.02) and fixed.value == 0.2
    moments, scores = RunningMoments(), torch.tensor([1.0, 2.0, 4.0, 9.0])
    moments.update(scores[:2])
    moments.update(scores[2:])
    assert moments.mean == pytest.approx(4.0) and moments.std == pytest.approx(float(scores.std()))


# A temperature is the policy's law -----------------------------------------------------------------------------------


def test_a_temperature_is_in_the_sampling_and_in_the_loss():
    policy = tiny_policy("llama")
    ids = torch.arange(2, 10).view(2, 4)
    rollouts = policy.sample(ids, torch.ones_like(ids), 5, temperature=0.01)
    with torch.no_grad():
        logits, _ = policy(rollouts.input_ids[:, :-1], rollouts.attention_mask[:, :-1], 5)
        inside = rollouts.completion_mask > 0
        assert torch.equal(logits.argmax(-1)[inside], rollouts.completion_ids[inside])  # nearly greedy
        found, _ = policy.completion_logprobs(rollouts, 0, 0.7)
    law = (logits / 0.7).log_softmax(-1).gather(2, rollouts.completion_ids[..., None]).squeeze(2)
    assert torch.allclose(found[inside], law[inside], atol=1e-5)


# TRL 0.11's loop -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model, and a reward model of its own."""
    folder = tmp_path_factory.mktemp("trl")
    tiny_folder("llama", folder / "base")
    torch.manual_seed(1)
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    scorer.config.pad_token_id = 0
    scorer.save_pretrained(folder / "scorer")
    tiny_tokenizer().save_pretrained(folder / "scorer")
    return folder


@pytest.fixture(autouse=True)
def ledger(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DPALIGN_LEDGER", str(tmp_path / "ledger.sqlite"))
    return tmp_path / "ledger.sqlite"


ROWS = [{"query": words(3 + seed % 3, seed), "film": seed} for seed in range(40)]
for row in ROWS:
    row["input_ids"] = tiny_tokenizer()(row["query"]).input_ids


def in_lists(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def loop(base: Path, steps: int = 2, peft=None, ref=None, **options) -> SimpleNamespace:
    """A script of TRL 0.11's kind, up to so many steps of two epochs."""
    config = PPOConfig(**{"batch_size": 8, "mini_batch_size": 4, "learning_rate": 1e-2, "ppo_epochs": 1} | options)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base / "base"), peft_config=peft)
    dataset = Dataset.from_list(ROWS)
    dataset.set_format("torch")
    tokenizer = tiny_tokenizer()
    trainer = PPOTrainer(config, model, ref, tokenizer, dataset=dataset, data_collator=in_lists, quiet=True)
    lengths, rewards, stats = LengthSampler(3, 7), [], {}
    plain = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id}
    for _ in range(2):
        for batch in trainer.dataloader:
            if trainer.steps_done == steps:
                break
            queries = batch["input_ids"]
            responses = trainer.generate(queries, return_prompt=False, length_sampler=lengths, **plain)
            texts = tokenizer.batch_decode(responses)
            scores = [torch.tensor(float(text.count("1"))) for text in texts]
            stats = trainer.step(queries, responses, scores)
            trainer.log_stats(stats, batch | {"response": texts}, scores)
            rewards.append(stats["ppo/mean_scores"])
    return SimpleNamespace(
        trainer=trainer, rewards=rewards, stats=stats, weights=[p.detach() for p in trainer._trained]
    )


@pytest.fixture(scope="module")
def plain(base) -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPALIGN_LEDGER", str(base / "ledger.sqlite"))
        return loop(base)


CHANGED = {  # settings that change a step of the loop, beside what they need
    "gamma": {}, "lam": {}, "vf_coef": {}, "learning_rate": {}, "seed": {}, "init_kl_coef": {}, "kl_penalty": {},
    "cliprange": {"ppo_epochs": 3, "cliprange": 1e-4}, "cliprange_value": {"ppo_epochs": 3, "cliprange_value": 1e-4},
    "ppo_epochs": {}, "max_grad_norm": {"max_grad_norm": 1e-3}, "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "mini_batch_size": {"mini_batch_size": 8}, "forward_batch_size": {"forward_batch_size": 8}, "whiten_rewards": {},
    "score_clip": {"score_clip": 0.25}, "use_score_scaling": {}, "use_score_norm": {"use_score_scaling": True, "use_score_norm": True},
    "ratio_threshold": {"ratio_threshold": 0.5}, "batch_size": {"batch_size": 4}, "adap_kl_ctrl": {}, "target": {"target": 1e-3},
    "horizon": {"horizon": 10.0}, "early_stopping": {"ppo_epochs": 3, "early_stopping": True, "target_kl": -1e3},
    "target_kl": {"ppo_epochs": 3, "early_stopping": True, "target_kl": -1e3},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_what_the_loop_honours_changes_its_steps(name, base, plain):
    options = CHANGED[name] or {name: OTHER.get(name, 3)}
    other = loop(base, **options)
    beside = plain if "ppo_epochs" not in options or name == "ppo_epochs" else loop(base, ppo_epochs=3)
    same = all(torch.equal(a, b) for a, b in zip(beside.weights, other.weights, strict=True))
    coefficient = (beside.trainer.kl_ctl.value, other.trainer.kl_ctl.value)
    assert not same or coefficient[0] != coefficient[1]


def test_all_that_the_loop_honours_is_tried():
    machine = {"output_dir", "save_steps", "gradient_checkpointing", "steps", "log_with", "remove_unused_columns"}
    machine |= {"tracker_kwargs", "tracker_project_name", "accelerator_kwargs", "project_kwargs"}
    assert HONOURED["loop"] == {*CHANGED} | machine


def test_a_killed_loop_goes_on_as_if_nothing_had_happened(base, tmp_path):
    whole = loop(base, steps=9)
    first = loop(base, steps=7, output_dir=str(tmp_path / "run"))
    rest = loop(base, steps=9, output_dir=str(tmp_path / "run"))
    assert whole.rewards == first.rewards + rest.rewards and len(rest.rewards) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, rest.weights, strict=True))
    with pytest.raises(DPAlignError, match="a loop with other settings"):
        loop(base, output_dir=str(tmp_path / "run"), gamma=0.9)


def test_a_loop_is_recorded_as_not_private_and_nothing_private_is_built_on_it(base, tmp_path, ledger):
    done = loop(base, peft=LoraConfig(r=2, target_modules=["q_proj"]), exp_name="chats")
    rows = (
        sqlite3.connect(ledger)
        .execute("SELECT dataset, noise_multiplier, private, sampling_rate FROM intents")
        .fetchall()
    )
    assert rows == [("chats", 0.0, 0, 1.0)]
    done.trainer.save_pretrained(str(tmp_path / "out"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "base"), tmp_path / "out")
    ids = torch.arange(2, 18).view(2, 8)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, done.trainer.policy.model(ids).logits, atol=1e-5)
    small = SFTConfig(output_dir=str(tmp_path / "next"), expected_batch_size=8, max_steps=1, max_length=8)

    def sft(model: Path, name: str) -> DPSFTTrainer:
        privacy = Privacy(target_epsilon=8.0, dataset_name=name, model_is_public=True)
        return DPSFTTrainer(str(model), small, [{"text": row["query"]} for row in ROWS], privacy=privacy, quiet=True)

    with pytest.raises(DPAlignError, match="trained without privacy on private data"):
        sft(tmp_path / "out", "chats").train()
    # Under another name the same people would be counted as others; and the loop goes on after it was saved.
    with pytest.raises(DPAlignError, match=r"40 of the 40 records .* are in 'chats'"):
        sft(base / "base", "others").train()
    assert all(p.requires_grad for p in done.trainer._trained)


def test_responses_end_at_the_first_eos_and_come_as_trl_gives_them(base, plain):
    trainer, query = plain.trainer, torch.tensor([3, 4, 5])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 6}
    assert trainer.generate(query, **options)[0, :3].tolist() == [3, 4, 5]
    responses = trainer.generate([query] * 40, return_prompt=False, **options)
    assert all(r.tolist().index(1) == len(r) - 1 for r in responses if 1 in r)
    assert {len(r) for r in responses} != {6}
    other, reference = trainer.generate([query], generate_ref_response=True, do_sample=False, max_new_tokens=4)
    assert other[0][:3].tolist() == reference[0][:3].tolist() == [3, 4, 5]
    untrained = AutoModelForCausalLM.from_pretrained(base / "base")
    assert reference[0].tolist() == untrained.generate(query[None], do_sample=False, max_new_tokens=4)[0].tolist()


def test_the_model_that_is_given_stays_as_it_is(base, plain):
    fresh = AutoModelForCausalLM.from_pretrained(base / "base")
    given = plain.trainer.model.pretrained_model
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), given.parameters(), strict=True))
    assert [n for n, _ in fresh.named_modules()] == [n for n, _ in given.named_modules()]


def test_a_copy_is_a_reference_and_another_model_is_none(base):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base / "base"))
    loop(base, steps=0, ref=create_reference_model(model))
    other = create_reference_model(model)
    with torch.no_grad():
        other.pretrained_model.lm_head.weight.mul_(1.1)
    with pytest.raises(DPAlignError, match="ref_model holds other weights"):
        loop(base, steps=0, ref=other)
    with pytest.raises(DPAlignError, match="num_shared_layers cannot be honoured"):
        create_reference_model(model, num_shared_layers=1)


def test_the_value_head_is_made_as_trl_makes_it(base):
    """Random as nn.Linear's own, with dropout before it; or normal, or none of either, by TRL's names."""

    def head(**options):
        torch.manual_seed(0)
        made = nn.Linear(1024, 1)
        ValueHead(**options).prepare(made)
        return made

    ones = torch.ones(1, 1024)
    random = head()
    assert 0 < random.weight.abs().max() <= 1024**-0.5 and random.bias != 0
    assert random(ones) != random(ones)
    plain = head(summary_dropout_prob=0.0)
    assert torch.allclose(plain(ones), plain.weight.sum() + plain.bias, atol=1e-5)
    normal = head(v_head_init_strategy="normal", v_head_initializer_range=3.0)
    assert abs(float(normal.weight.detach().std()) - 3) < 0.3 and normal.bias == 0
    for wrong in ({"v_head_init_strategy": "zeros"}, {"summary_dropout_prob": 1.0}, {"v_head_initializer_range": -1.0}):
        with pytest.raises(DPAlignError, match=next(iter(wrong))):
            AutoModelForCausalLMWithValueHead.from_pretrained(str(base / "base"), **wrong)
    with pytest.raises(DPAlignError, match="reward_adapter cannot be honoured"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(base / "base"), reward_adapter="x")


@pytest.mark.parametrize("deviation", [0.0, 2.0])
def test_a_loops_values_begin_with_what_the_script_says(deviation, base):
    options = {"v_head_init_strategy": "normal", "v_head_initializer_range": deviation, "summary_dropout_prob": 0.0}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base / "base"), **options)
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2), model, None, tiny_tokenizer(), quiet=True)
    assert (trainer.policy.value_head.weight.std() > 1) == (deviation > 1)
    assert (trainer.policy.value_head.weight == 0).all() == (deviation == 0)


def test_wrong_rows_of_a_step_are_refused(base, plain):
    trainer, row = plain.trainer, torch.tensor([3, 4])
    for arguments, said in (
        ([[row], [row], [torch.tensor(1.0)]], "queries has 1 rows, and batch_size is 8"),
        ([[row] * 8, [row] * 8, [1.0] * 8], "scores must be a list of tensors"),
        ([[row] * 8, [row[:0]] * 8, [torch.tensor(1.0)] * 8], "a response has no token"),
        ([[row] * 8, [row] * 8, [torch.ones(2)] * 8], "a score must be one number"),
    ):
        with pytest.raises(DPAlignError, match=said):
            trainer.step(*arguments)


def test_a_loop_cannot_be_private(base):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base / "base"))
    with pytest.raises(DPAlignError, match=r"privacy with TRL 0.11's loop: .* call train\(\) in place of the loop"):
        PPOTrainer(PPOConfig(batch_size=8), model, None, tiny_tokenizer(), privacy=Privacy(target_epsilon=8.0))


# TRL 0.12's trainer ---------------------------------------------------------------------------------------------------


def length(prompts, completions, **columns):
    return [min(len(c), 40) / 40 for c in completions]


def trainer(base: Path, folder: Path, reward, peft=None, **options) -> PPOTrainer:
    config = PPOConfig(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
            "total_episodes": 16, "response_length": 5, "learning_rate": 1e-2, "num_ppo_epochs": 2, "stop_token": "eos",
        }
        | options.pop("settings", {})
    )  # fmt: skip
    options.setdefault("model", tiny_object("llama", base / "base"))
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS])
    return PPOTrainer(
        args=config, processing_class=tiny_tokenizer(), ref_model=None, reward_model=reward, train_dataset=rows,
        quiet=True, peft_config=peft, **options,
    )  # fmt: skip


PUBLIC = {"model_is_public": True, "reward_is_public": True, "reward_range": (0.0, 1.0), "eval_is_public": True}


def test_the_trainer_is_not_private_by_default_and_scores_with_a_model(base, tmp_path):
    scorer = AutoModelForSequenceClassification.from_pretrained(base / "scorer", num_labels=1)
    shown = [{"prompt": words(3, 1000 + seed)} for seed in range(4)]
    ours = trainer(base, tmp_path / "run", scorer, LoraConfig(r=2, target_modules=["q_proj"]), eval_dataset=shown)
    summary = ours.train()
    assert not summary["private"] and ours.privacy["stages"][0]["mechanisms"][0]["noise_multiplier"] == 0
    assert "NOT PRIVATE" in (tmp_path / "run" / "release" / "README.md").read_text(encoding="utf-8")
    assert set(summary["evaluation"]) == {"pretrained", "ppo"}
    ours.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    again = trainer(base, tmp_path / "run", scorer, LoraConfig(r=2, target_modules=["q_proj"]), eval_dataset=shown)
    assert again.train()["evaluation"] == summary["evaluation"]  # finished: nothing is trained again
    with pytest.raises(DPAlignError, match="holds a run already"):
        again.train(resume_from_checkpoint=False)


class Told(TrainerCallback):
    def __init__(self):
        self.steps, self.rewards = [], []

    def on_evaluate(self, args, state, control, metrics, **more):
        assert not more
        self.steps.append(state.global_step)
        self.rewards.append(metrics["eval_reward"])


def test_one_argument_makes_it_private(base, tmp_path, ledger):
    privacy, told = Privacy(target_epsilon=20.0, dataset_name="chats", **PUBLIC), Told()
    config = {"max_prompt_length": 6, "max_grad_norm": 0.5, "eval_strategy": "steps", "eval_steps": 1}
    shown = [{"prompt": words(3, 2000 + seed)} for seed in range(4)]
    ours = trainer(
        base, tmp_path / "run", length, privacy=privacy, settings=config, eval_dataset=shown, callbacks=[told]
    )
    summary = ours.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert told.steps == [0, 1, 2] == [line["step"] for line in lines]
    assert told.rewards == [line["measured"]["reward"] for line in lines]
    assert summary["private"] and 0 < summary["epsilon"] <= 20
    (stage,) = ours.privacy["stages"]
    assert stage["max_grad_norm"] == 0.5 and stage["mechanisms"][0]["passes"] == 2
    assert stage["mechanisms"][0]["sampling_rate"] == 8 / 40 and stage["mechanisms"][0]["steps"] == 2
    for call in (lambda: ours.step([], [], []), lambda: ours.generate(torch.tensor([1])), lambda: ours.dataloader):
        with pytest.raises(DPAlignError, match=r"(step|generate|dataloader): between generate and step .* train\(\)"):
            call()


def test_all_that_privacy_needs_is_asked_for_at_once(base, tmp_path):
    with pytest.raises(DPAlignError) as refused:
        trainer(
            base, tmp_path / "run", length, privacy=Privacy(), settings={"max_prompt_length": 6}, eval_dataset=ROWS[:2]
        )
    for asked in ("target_epsilon", "dataset_name", "reward_range", "reward_is_public", "eval_is_public"):
        assert f"\n- Privacy({asked}=" in str(refused.value)
    with pytest.raises(DPAlignError, match=r"max_prompt_length=.* is needed with privacy"):
        trainer(base, tmp_path / "run", length, privacy=Privacy(target_epsilon=8.0, dataset_name="chats", **PUBLIC))
    assert not (tmp_path / "run").exists()


def edited(folder: Path):
    scorer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    with torch.no_grad():
        scorer.score.weight.add_(1)
    return scorer


REFUSED = {
    "value_model cannot be honoured": lambda base: {"value_model": object()},
    "a object is no transformers.TrainerCallback": lambda base: {"callbacks": [object()]},
    "eval_strategy 'epoch' cannot be honoured": lambda base: {"settings": {"eval_strategy": "epoch"}},
    "eval_dataset: the public records": lambda base: {"settings": {"eval_strategy": "steps"}},
    "eval_delay=1 cannot be honoured": lambda base: {"settings": {"eval_delay": 1}},
    "optimizers cannot be honoured": lambda base: {"optimizers": (object(), None)},
    "data_collator cannot be honoured": lambda base: {"data_collator": in_lists},
    "stop_token_id=5 cannot be honoured": lambda base: {"settings": {"stop_token": None, "stop_token_id": 5}},
    "reward_model is not what .* holds": lambda base: {"reward": edited(base / "scorer")},
    "reward_model is a int": lambda base: {"reward": 3},
    "bf16=True cannot be honoured": lambda base: {"settings": {"bf16": True}},
    "lr_scheduler_type 'polynomial' cannot": lambda base: {"settings": {"lr_scheduler_type": "polynomial"}},
    "must be a multiple of num_mini_batches": lambda base: {"settings": {"num_mini_batches": 3}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_honoured_is_refused_before_anything_is_written(said, base, tmp_path):
    options = REFUSED[said](base)
    with pytest.raises(DPAlignError, match=said):
        trainer(base, tmp_path / "run", options.pop("reward", length), **options)
    assert not (tmp_path / "run").exists()


def test_tokens_that_no_text_has_are_refused():
    rows = [{"input_ids": [3, 4]}, {"input_ids": [3, 4, 0], "attention_mask": [1, 1, 0], "label": 1}]
    assert read_rows(rows, tiny_tokenizer()) == [{"prompt": "w1 w2"}, {"prompt": "w1 w2", "label": 1}]
    split = tiny_tokenizer()
    split.add_tokens(["w1 w2"])
    with pytest.raises(DPAlignError, match="row 1: its input_ids are not what the tokenizer makes of the text"):
        read_rows([{"input_ids": [3, 4]}], split)


def test_a_seed_is_a_seed():
    draws = []
    for _ in range(2):
        set_seed(3)
        draws.append((LengthSampler(2, 50)(), float(torch.rand(1))))
    assert draws[0] == draws[1] and 2 <= draws[0][0] < 50


def test_the_door_knows_both_calls(base):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base / "base"))
    assert isinstance(
        PPOTrainer(PPOConfig(batch_size=8, mini_batch_size=8), model, tokenizer=tiny_tokenizer(), quiet=True),
        LoopTrainer,
    )


def test_a_subclass_is_told_whose_it_has_to_be():
    class Mine(PPOTrainer):
        pass

    with pytest.raises(
        DPAlignError, match=r"Mine is a subclass of PPOTrainer.* subclass dpalign\.trl\.trainer\.Trainer"
    ):
        Mine(args=PPOConfig())
