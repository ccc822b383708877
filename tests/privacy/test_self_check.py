"""The self-check before the first draw: what it must find, and that it leaves today's architectures alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpalign.algorithms import PPO, SFT, PPOConfig, RewardModelConfig, SFTConfig
from dpalign.algorithms.base import Rows
from dpalign.data import DataConfig
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, ModelConfig, Policy, RewardModel
from dpalign.recipe import Recipe
from dpalign.rewards import Reward, RewardConfig, load_reward
from dpalign.run import run_recipe
from dpalign.stages import STAGES, Listed
from dpalign.training.self_check import SelfCheck, check_stage
from dpalign.training.self_written import self_written
from helpers import ledger_rows, reviews, write_jsonl
from tiny import VOCABULARY, tiny_base, tiny_policy, tiny_tokenizer

pytestmark = pytest.mark.self_check
SCORED = {"reward": RewardConfig()}


def check(algorithm, model=None, *, people: bool = False, reward: Reward | None = None) -> None:
    kind = type(algorithm)
    model = model or tiny_policy("llama")
    if kind.model_kind is RewardModel and isinstance(model, Policy):
        model = RewardModel.from_policy(model, algorithm.config.text)
    entering = kind.entering(algorithm.config)
    rewards = {name: reward or load_reward(c) for name, c in entering.items()}
    check_stage(model, kind, algorithm.config, rewards, people=people)


# Models that couple units ------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A layer of the base with something done to its input or output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *rest, **named) -> Tensor:
        return self.after(self.layer(self.before(x), *rest, **named))

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, out: Tensor) -> Tensor:
        return out


class BatchMean(Wrapped):
    def after(self, out):
        return out - 0.1 * out.mean(0, keepdim=True)


class RunningBuffer(Wrapped):
    def __init__(self, layer):
        super().__init__(layer)
        self.register_buffer("mean", torch.zeros(1))

    def after(self, out):
        self.mean.mul_(0.9).add_(0.1 * out.detach().mean())
        return out - self.mean


class RunningAttribute(RunningBuffer):
    """The same, hidden from `named_buffers`."""

    def __init__(self, layer):
        super().__init__(layer)
        mean = self.mean
        del self.mean
        self.mean = mean

    def after(self, out):
        self.mean = self.mean.to(out.dtype)
        return super().after(out)


class PerTensorInt8(Wrapped):
    """Dynamic quantisation with one scale for the whole tensor."""

    def before(self, x):
        scale = x.detach().abs().max() / 127
        return x + ((x / scale).round() * scale - x).detach()


class Capacity(Wrapped):
    """An expert that takes so many tokens of a batch, and drops the rest."""

    def after(self, out):
        chosen = out[..., 0].flatten()
        kept = torch.zeros_like(chosen).index_fill_(0, chosen.topk(max(1, len(chosen) // 2)).indices, 1.0)
        return out * kept.view_as(out[..., :1])


class PositionsFirst(Wrapped):
    def before(self, x):
        return x.transpose(0, 1)

    def after(self, out):
        return out.transpose(0, 1)


class HandwrittenBatchNorm(Wrapped):
    def after(self, out):
        return (out - out.mean((0, 1))) / (out.std((0, 1)) + 1e-3)


def with_layer(kind: type[Wrapped], name: str = "model.layers.0.mlp", dtype: torch.dtype = torch.float32) -> Policy:
    policy = tiny_policy("llama", dtype)  # what is tried when it is loaded is another test's
    policy.model.set_submodule(name, kind(policy.model.get_submodule(name)).to(dtype))
    return policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", [harness.sft(), harness.ppo(**SCORED)], ids=["sft", "ppo"])
@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (BatchMean, r"first layer whose output differs is model\.layers\.0\.mlp"),
        (PerTensorInt8, r"first layer whose output differs is model\.layers\.0\.mlp"),
        (Capacity, r"first layer whose output differs is model\.layers\.0\.mlp"),
        (RunningBuffer, r"(buffer model\.layers\.0\.mlp\.mean changes|differs is model\.layers\.0\.mlp)"),
        (RunningAttribute, r"(remembers something of earlier units|differs is model\.layers\.0\.mlp)"),
    ],
)
def test_a_layer_that_couples_units_is_found_and_named(layer, told, algorithm, dtype):
    with pytest.raises(DPAlignError, match=told):
        check(algorithm, with_layer(layer, dtype=dtype))


POSITIONS = 7


@pytest.mark.parametrize("micro_batch_size", [5, POSITIONS - 1, POSITIONS, 12])
def test_positions_first_is_found_also_where_rows_are_as_many_as_positions(micro_batch_size):
    adapter = AdapterConfig(r=2, target_modules=["up_proj"])
    stage = harness.sft(max_length=POSITIONS + 1, micro_batch_size=micro_batch_size, adapter=adapter)
    with pytest.raises(DPAlignError, match=r"(layer model\.layers\.0\.mlp\.layer\.up_proj|clipped gradient of a unit)"):
        check(stage, with_layer(PositionsFirst))


def test_missing_positions_are_found():
    base = tiny_base("gpt2")
    forward = base.forward
    base.forward = lambda *args, position_ids=None, **named: forward(*args, **named)
    policy = Policy(base, tiny_tokenizer())
    check(harness.sft(), policy)
    for algorithm in (harness.ppo(**SCORED), harness.rloo(**SCORED)):  # with values, and without any
        with pytest.raises(DPAlignError, match="counts no positions"):
            check(algorithm, policy)


def test_a_reward_model_with_a_batch_norm_of_its_own_is_found():
    with pytest.raises(DPAlignError, match=r"first layer whose output differs is model\.layers\.1\.mlp"):
        model = RewardModel.from_policy(tiny_policy("llama"))
        model.model.set_submodule(
            "model.layers.1.mlp", HandwrittenBatchNorm(model.model.get_submodule("model.layers.1.mlp"))
        )
        check(harness.reward(), model)


# Algorithms and rewards that couple units -------------------------------------------------------------------------


class WhitenedAdvantages(PPO):
    def advantages(self, *args):
        advantages, returns = super().advantages(*args)
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns


class WhitenedRewards(PPO):
    def prepare(self, policy, rows):
        scores = rows.tensors["scores"]
        return super().prepare(
            policy, Rows(rows.unit, rows.tensors | {"scores": (scores - scores.mean()) / scores.std()})
        )


class RunningScale(PPO):
    scale = 1.0

    def prepare(self, policy, rows):
        self.scale = 0.5 * self.scale + 0.5 * float(rows.tensors["scores"].abs().mean())
        self.once = getattr(self, "once", self.scale)
        return super().prepare(policy, rows)

    def row_losses(self, policy, rows):
        losses, metrics = super().row_losses(policy, rows)
        return losses * self.scale * 100, metrics


class BatchMeanLoss(SFT):
    def row_losses(self, policy, rows):
        losses, metrics = super().row_losses(policy, rows)
        learned = rows.tensors["learned"][:, 1:].sum(1)
        return losses * learned / learned.sum(), metrics


@pytest.mark.parametrize(
    ("algorithm", "told"),
    [
        (harness.ppo(WhitenedAdvantages, **SCORED), "no layer.* it is WhitenedAdvantages"),
        (harness.ppo(WhitenedAdvantages, num_ppo_epochs=2, **SCORED), "the advantages of a unit changes"),
        (harness.ppo(WhitenedRewards, **SCORED), "the reward of a unit changes"),
        (
            harness.ppo(RunningScale, clipping_gamma=1.0, clipping="automatic", **SCORED),
            "no layer.* it is RunningScale",
        ),
        (harness.sft(BatchMeanLoss, clipping="automatic", clipping_gamma=1.0), "no layer.* it is BatchMeanLoss"),
    ],
)
def test_an_algorithm_that_couples_units_is_found(algorithm, told):
    with pytest.raises(DPAlignError, match=told):
        check(algorithm)


def test_a_reward_that_couples_units_is_found():
    norm = nn.BatchNorm1d(1)  # in training mode

    def score(prompts, completions, **columns):
        lengths = torch.tensor([[float(sum(map(ord, c)) % 50)] for c in completions])
        with torch.no_grad():
            return norm(lengths)[:, 0].tolist()

    with pytest.raises(DPAlignError, match="the reward of a unit changes"):
        check(harness.ppo(**SCORED), reward=Reward(score, -5, 5, rows_at_once=None))


@pytest.mark.parametrize(("kind", "people"), [("gpt2", True), ("llama", False)])
@pytest.mark.parametrize(
    "algorithm",
    [
        harness.sft(),
        harness.dpo(),
        harness.reward(),
        harness.reward(pooling="mean"),
        harness.ppo(**SCORED),
        harness.ppo(num_ppo_epochs=2, **SCORED),
        harness.rloo(**SCORED),
        harness.grpo(num_iterations=2, **SCORED),
        harness.offline(**SCORED),
        harness.offline(method="weighted", **SCORED),
        harness.offline(**SCORED, **harness.WORDS),
    ],
)
def test_what_couples_nothing_is_left_alone_and_as_it_was(algorithm, kind, people):
    policy = tiny_policy(kind)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    state = torch.random.get_rng_state()
    check(algorithm, policy, people=people)
    after = policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state, torch.random.get_rng_state()) and not policy.adapters
    assert not any(p.requires_grad for p in policy.parameters())


# Architectures ------------------------------------------------------------------------------------------------------

NAMED = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
WIDE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16,
}  # fmt: skip
NEO = {name: WIDE[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
EXPERTS = WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES: dict[str, dict] = {
    "gpt2": GPT, "gptj": GPT | {"rotary_dim": 8}, "codegen": GPT | {"n_head": 4, "rotary_dim": 4}, "gpt_bigcode": GPT,
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "gpt_neox": NEO, "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "opt": NEO | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 1},
    "llama": WIDE, "mistral": WIDE | {"sliding_window": 8}, "qwen2": WIDE, "qwen3": WIDE, "gemma": WIDE, "gemma2": WIDE,
    "gemma3_text": WIDE, "phi": WIDE, "phi3": WIDE, "stablelm": WIDE, "starcoder2": WIDE, "olmo": WIDE, "olmo2": WIDE,
    "cohere": WIDE, "granite": WIDE, "smollm3": WIDE, "helium": WIDE, "glm": WIDE, "nemotron": WIDE, "exaone4": WIDE,
    "mixtral": WIDE | {"num_local_experts": 4}, "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS, "olmoe": EXPERTS,
}  # fmt: skip
TARGETS = {"phi3": ["qkv_proj"]} | {n: ["q_proj"] for n in ("opt", "phi")}
HALF = ["llama", "qwen2", "gpt2", "gemma", "mistral", "mixtral"]


def random_model(name: str, dtype: torch.dtype) -> Policy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **NAMED | ARCHITECTURES[name])).to(dtype)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, 0, 0.2)
    return Policy(model, tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float32) for n in ARCHITECTURES] + [(n, torch.bfloat16) for n in HALF]
)
def test_there_is_no_false_alarm(name, dtype):
    policy = random_model(name, dtype)
    own_targets = any(hasattr(m, "q_proj") for m in policy.modules())
    adapter = AdapterConfig(r=2, target_modules=TARGETS.get(name, ["q_proj", "v_proj"] if own_targets else None))
    check(harness.ppo(adapter=adapter, **SCORED), policy)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma"])
@pytest.mark.parametrize("algorithm", [harness.sft(), harness.reward(), harness.dpo()], ids=["sft", "reward", "dpo"])
def test_there_is_no_false_alarm_in_half_precision(name, algorithm):
    check(algorithm, random_model(name, torch.bfloat16))


# In a run -----------------------------------------------------------------------------------------------------------


def recipe(folder: Path, **stages: Any) -> Recipe:
    data = write_jsonl(folder / "data.jsonl", reviews(64))
    return Recipe(
        output_dir=str(folder / "run"), ledger=str(folder / "ledger.sqlite"), target_epsilon=2.0, model=ModelConfig(),
        data=DataConfig(name="reviews", path=str(data), unit="id"), **stages,
    )  # fmt: skip


SMALL = {"expected_batch_size": 8, "max_steps": 2, "micro_batch_size": 8, "adapter": AdapterConfig(r=1)}
SAMPLING = {"prompt_max_tokens": 4, "max_prompt_length": 5, "max_completion_length": 4}


@pytest.mark.parametrize("coupled", ["sft", "ppo"])
def test_a_run_is_refused_before_its_first_draw_whichever_stage_couples(coupled, tmp_path, monkeypatch):
    chosen = BatchMeanLoss if coupled == "sft" else WhitenedAdvantages
    monkeypatch.setitem(STAGES, coupled, Listed(f"{__name__}:{chosen.__name__}", ""))
    asked = recipe(tmp_path, sft=SFTConfig(max_length=12, **SMALL), ppo=PPOConfig(**SMALL | SAMPLING))
    with pytest.raises(DPAlignError, match=f"stage {coupled} cannot be private .* no layer.* it is {chosen.__name__}"):
        run_recipe(asked)
    assert ledger_rows(tmp_path) == 0
    monkeypatch.undo()
    assert run_recipe(asked).statement.private and ledger_rows(tmp_path) == 4


def test_a_run_with_the_check_is_bit_for_bit_the_run_without_it(tmp_path, monkeypatch):
    """It draws from no stream of the run, and leaves no trace on the model."""
    monkeypatch.setattr("dpalign.privacy.gate.Gate.is_private", lambda self, step: True)

    def weights(folder: Path) -> dict[str, Tensor]:
        folder.mkdir()
        stages = {"sft": SFTConfig(max_length=12, insecure_seed=3, **SMALL)}
        stages["reward_model"] = RewardModelConfig(max_length=12, insecure_seed=3, **SMALL)
        stages["ppo"] = PPOConfig(insecure_seed=3, **SMALL | SAMPLING)
        pair = {"chosen": "A lovely film.", "rejected": "A dull film."}
        texts = reviews(64)
        asked = replace(recipe(folder, **stages), ledger=str(tmp_path / "ledger.sqlite"))  # one key: equal parts
        run_recipe(asked, records={n: [t | pair for t in texts] for n in stages})
        return load_file(folder / "run" / "release" / "adapter_model.safetensors")

    checked = weights(tmp_path / "a")
    monkeypatch.setattr("dpalign.run.Run.self_check", lambda *_: None)
    plain = weights(tmp_path / "b")
    assert checked.keys() == plain.keys() and all(torch.equal(checked[name], plain[name]) for name in plain)


def test_a_stage_that_takes_one_token_alone_is_tried_on_texts_of_one():
    """Texts are halved until the stage takes them: the last half is one token."""
    policy = tiny_policy("gpt2")

    class OneToken(SFT, is_base=True):
        @classmethod
        def check(cls, config, tokenizer, record):
            if len(tokenizer(record["text"], add_special_tokens=False).input_ids) > 1:
                raise DPAlignError("too long")
            return super().check(config, tokenizer, record)

    units = self_written(OneToken(harness.sft().config), policy, 6, 1, False)
    assert [len(policy.tokenizer(unit[0]["text"]).input_ids) for unit in units] == [1] * 6


@pytest.mark.parametrize(("others", "found"), [(3, True), (2, False)])
def test_of_five_units_rounding_may_tip_the_completions_of_two(others, found):
    """Never those of more than half; and of a stage that samples nothing, none."""
    trial = object.__new__(SelfCheck)
    trial.algorithm = harness.rloo(**SCORED)
    ids = torch.arange(10).reshape(5, 2)
    changed = torch.cat([ids[:others] + 1, ids[others:]])
    one, two = (Rows(torch.arange(5), {"input_ids": rows}) for rows in (ids, changed))
    if not found:
        assert trial._same_tokens(one, two, 5) == [False] * others + [True] * (5 - others)
        trial.algorithm = harness.sft()
    with pytest.raises(DPAlignError, match="the tokens of a unit's rows depend on the other units"):
        trial._same_tokens(one, two, 5)
