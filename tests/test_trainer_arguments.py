"""What the trainers ask for: all of it at once, at construction; TRL's names are ours, or refused by name."""

import dataclasses
import math

import pytest
from peft import LoraConfig

from dpalign import (
    DPAlignError,
    DPOConfig,
    DPPPOTrainer,
    DPRewardTrainer,
    DPSFTTrainer,
    GRPOConfig,
    OfflineConfig,
    PPOConfig,
    Privacy,
    Recipe,
    RewardModelConfig,
    RLOOConfig,
    SFTConfig,
    algorithms,
)
from dpalign.domains import check_settings
from dpalign.settings.rewards import RewardConfig
from dpalign.settings.trainers import FOR_A_TRAINER

CONFIGS = [SFTConfig, RewardModelConfig, DPOConfig, PPOConfig, RLOOConfig, GRPOConfig, OfflineConfig]
ROWS = [{"text": "w1 w2"}, {"text": "w3 w4"}]
GIVEN = {"target_epsilon": 4.0, "dataset_name": "toy"}


def refused(make) -> str:
    with pytest.raises(DPAlignError) as caught:
        make()
    return str(caught.value)


def scored(prompts, completions):
    return [0.0] * len(completions)


# One message -----------------------------------------------------------------------------------------------------------


def test_everything_that_is_missing_is_asked_for_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, shown = [{"prompt": "w1"}], [{"prompt": "w2"}]
    said = refused(lambda: DPPPOTrainer("some/model", PPOConfig(), rows, shown, reward_funcs=scored))
    for name in (
        "output_dir=", "target_epsilon=", "dataset_name=", "model_is_public=", "reward_is_public=", "reward_range=",
        "eval_is_public=", "declared_units=", "unit=",
    ):  # fmt: skip
        assert name in said, name
    assert said.startswith("DPPPOTrainer has to be told more") and not list(tmp_path.iterdir())


def test_what_is_not_missing_is_not_asked_for(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path / "run"))
    said = refused(lambda: DPSFTTrainer("some/model", args, ROWS, privacy=Privacy(**GIVEN)))
    assert "model_is_public=" in said and "declared_units=" in said
    for name in ("output_dir=", "target_epsilon=", "dataset_name=", "reward", "eval_is_public="):
        assert name not in said, name
    assert "declared_units" not in refused(
        lambda: DPSFTTrainer("some/model", args, ROWS, privacy=Privacy(**GIVEN, declared_units=2))
    )
    DPSFTTrainer("tiny-review-lm", args, ROWS, privacy=Privacy(**GIVEN))  # the count in the file becomes public
    DPSFTTrainer("some/model", args, ROWS, privacy=Privacy(**GIVEN, model_is_public=True))
    assert not (tmp_path / "run").exists()


def test_a_budget_stands_in_either_place_and_in_one(tmp_path):
    def trainer(settings, given):
        args = SFTConfig(output_dir=str(tmp_path / "run"), **settings)
        return DPSFTTrainer("tiny-review-lm", args, ROWS, privacy=Privacy(dataset_name="toy", **given))

    assert trainer({"target_epsilon": 3.0}, {})._recipe.target_epsilon == 3
    assert trainer({}, {"target_epsilon": 3.0})._recipe.target_epsilon == 3
    assert trainer({"target_epsilon": 3.0}, {"target_epsilon": 3.0})._recipe.target_epsilon == 3
    assert trainer({}, {"noise_multiplier": 2.0})._recipe.sft.noise_multiplier == 2
    assert "target_epsilon is 3 in args and 4 in Privacy" in refused(
        lambda: trainer({"target_epsilon": 3.0}, {"target_epsilon": 4.0})
    )
    sequential = trainer({}, {"target_epsilon": 3.0, "composition": "sequential"})._recipe
    assert sequential.target_epsilon == 3 and sequential.sft.target_epsilon is None


def test_values_that_cannot_be_are_refused_at_construction(tmp_path):
    def trainer(**settings):
        return DPSFTTrainer(
            "tiny-review-lm", SFTConfig(**{"output_dir": "run", **settings}), ROWS, privacy=Privacy(**GIVEN)
        )

    assert "learning_rate" in refused(lambda: trainer(learning_rate=-1.0))
    assert "output_dir" in refused(lambda: trainer(output_dir=7))
    assert "Privacy.declared_units" in refused(
        lambda: DPSFTTrainer(
            "tiny-review-lm", SFTConfig(output_dir="run"), ROWS, privacy=Privacy(**GIVEN, declared_units=0)
        )
    )
    assert "a dpalign.SFTConfig, and it is a dpalign.settings.trainers.PPOConfig" in refused(
        lambda: DPSFTTrainer("tiny-review-lm", PPOConfig(output_dir="run"), ROWS, privacy=Privacy(**GIVEN))
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        Privacy().target_epsilon = 8.0


def test_a_reward_range_stands_in_one_place(tmp_path):
    def trainer(**reward):
        args = PPOConfig(output_dir="run", reward=RewardConfig(**reward))
        declared = Privacy(**GIVEN, reward_is_public=True, reward_range=(0, 1))
        return DPPPOTrainer("tiny-review-lm", args, [{"prompt": "w1"}], reward_funcs=scored, privacy=declared)

    reward = trainer()._recipe.ppo.reward
    assert (reward.low, reward.high, reward.is_public) == (0, 1, True)
    assert "Privacy a reward_range: give one" in refused(lambda: trainer(low=0.0, high=2.0))


# Sizes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_trls_sizes_are_ours(config):
    plain = config.Section()

    def sizes(**given):
        section = config(**given).section()
        assert type(section) is config.Section
        return section.expected_batch_size, section.micro_batch_size

    assert sizes() == (plain.expected_batch_size, plain.micro_batch_size)
    assert sizes(per_device_train_batch_size=16, gradient_accumulation_steps=24) == (384, 16)
    assert sizes(per_device_train_batch_size=16) == (16, 16)
    assert sizes(per_device_train_batch_size=16, expected_batch_size=500) == (500, 16)
    assert sizes(per_device_train_batch_size=16, expected_batch_size=384, gradient_accumulation_steps=24) == (384, 16)
    assert sizes(expected_batch_size=64, micro_batch_size=8) == (64, 8)
    assert sizes(per_device_train_batch_size=8, micro_batch_size=8) == (8, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"per_device_train_batch_size": 16, "micro_batch_size": 32}, "two names of one size"),
        (
            {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "expected_batch_size": 512},
            "expected_batch_size 512 contradicts .* = 32",
        ),
        ({"gradient_accumulation_steps": 2}, "give that too, or expected_batch_size"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(given, said):
    with pytest.raises(DPAlignError, match=said):
        SFTConfig(**given).section()
    with pytest.raises(DPAlignError, match=said):  # among all else, at construction
        DPSFTTrainer("tiny-review-lm", SFTConfig(**given), ROWS)


# Names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("packing", "one record change another one's gradient"),
        ("max_seq_length", "it is called max_length"),
        ("lerning_rate", "did you mean learning_rate"),
        ("zzz", "leave it out"),
    ],
)
def test_an_argument_that_is_not_there_says_what_else_to_do(name, said):
    for config in CONFIGS:
        with pytest.raises(DPAlignError, match=f"{config.__name__} has no {name}: .*{said}"):
            config(**{name: 1})


def test_names_that_are_refused_are_not_there():
    lacking = {name for config in CONFIGS for name in FOR_A_TRAINER if not hasattr(config, name)}
    assert set(FOR_A_TRAINER) - lacking == set()
    assert all("missing_eos_penalty" in vars(config()) for config in (PPOConfig, RLOOConfig, GRPOConfig, OfflineConfig))


def test_how_a_model_is_loaded(tmp_path):
    def dtype(**settings):
        args = SFTConfig(output_dir="run", **settings)
        return DPSFTTrainer("tiny-review-lm", args, ROWS, privacy=Privacy(**GIVEN))._recipe.model.dtype

    assert dtype() == "auto" and dtype(bf16=True) == "bfloat16"  # what the device computes faster
    assert dtype(model_init_kwargs={"dtype": "float16"}) == "float16"
    assert "bf16=True contradicts" in refused(lambda: dtype(bf16=True, model_init_kwargs={"dtype": "float32"}))
    assert "not device_map" in refused(lambda: dtype(model_init_kwargs={"device_map": "auto"}))
    assert "dtype" in refused(lambda: dtype(model_init_kwargs={"dtype": "int8"}))


# In a recipe -----------------------------------------------------------------------------------------------------------


def test_a_trainers_settings_are_a_recipes():
    recipe = Recipe(sft=SFTConfig(per_device_train_batch_size=4, max_steps=3), target_epsilon=math.inf)
    assert type(recipe.sft) is algorithms.SFTConfig and recipe.sft.expected_batch_size == 4
    check_settings(recipe)
    assert "output_dir, report_to is for the trainers" in refused(
        lambda: Recipe(sft=SFTConfig(output_dir="run", report_to="tensorboard"))
    )


def test_reward_settings_are_asked_for_where_nobody_gives_a_function(tmp_path):
    pairs = [{"chosen": "a", "rejected": "b"}]
    args = RewardModelConfig(output_dir="run")
    assert "reward" not in refused(lambda: DPRewardTrainer("some/model", args, pairs, privacy=Privacy(**GIVEN)))
    DPPPOTrainer("tiny-review-lm", PPOConfig(output_dir="run"), [{"prompt": "a"}], privacy=Privacy(**GIVEN))  # vader


@pytest.mark.parametrize("name", ["lora_dropout", "modules_to_save"])
def test_what_a_lora_config_may_say(name):
    value = {"lora_dropout": 0.05, "modules_to_save": ["score"]}[name]
    lora = LoraConfig(r=2, **{name: value})
    args, privacy = SFTConfig(output_dir="run"), Privacy(**GIVEN)
    said = refused(lambda: DPSFTTrainer("tiny-review-lm", args, ROWS, peft_config=lora, privacy=privacy))
    assert f"{name}={value!r} cannot be honoured" in said and f"; {name}: " in said

    def reward_trainer(lora):
        args, pairs = RewardModelConfig(output_dir="run"), [{"chosen": "a", "rejected": "b"}]
        return DPRewardTrainer("tiny-review-lm", args, pairs, peft_config=lora, privacy=privacy)

    if name == "modules_to_save":
        assert reward_trainer(lora)._recipe.reward_model.adapter.r == 2  # the head is trained anyway
        assert "cannot be honoured" in refused(lambda: reward_trainer(LoraConfig(modules_to_save=["score", "norm"])))
    else:
        assert "lora_dropout=0.05" in refused(lambda: reward_trainer(lora))
