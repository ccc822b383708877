"""The recipes of the paper: their numbers, and their first steps on tiny models of the same architectures."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dpalign import run
from dpalign.errors import DPAlignError
from dpalign.parsing import recipe_from
from dpalign.plan import declared_units, delta_of, plan_stages
from dpalign.recipe import Recipe
from dpalign.training import Stage
from helpers import call, statement, write_jsonl
from tiny import VOCABULARY, tiny_tokenizer, words

FOLDER = Path(__file__).parent.parent / "src" / "dpalign" / "recipes"
SIZES = {"gpt2": 3e-3, "gpt2-medium": 1e-3, "gpt2-large": 2e-5}  # learning rate of DP-PPO
IMDB = [f"imdb_sentiment_{size}" for size in SIZES]
TLDR = [f"tldr_summarization_{size}" for size in SIZES]


@functools.cache
def recipe(name: str, *overrides: object) -> Recipe:
    return recipe_from("run", [str(FOLDER / f"{name}.yaml"), *map(str, overrides)])


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Fields of nested dataclasses by their dotted names."""
    if not dataclasses.is_dataclass(value):
        return {prefix.removesuffix("."): value}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        fields |= flat(getattr(value, field.name), f"{prefix}{field.name}.")
    return fields


# What the paper says -------------------------------------------------------------------------------------------

PRIVATE_STEP = {
    "clipping": "flat", "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "adapter.r": 4,
    "adapter.target_modules": ["c_attn"], "adapter.freeze_a": False, "adapter.init_a": "random", "seed": 0,
    "target_epsilon": None, "noise_multiplier": None, "insecure_seed": None, "max_steps": None,
}  # fmt: skip
SFT = {"expected_batch_size": 512, "learning_rate": 3e-4}
REWARD = {"expected_batch_size": 4096, "learning_rate": 2e-4, "num_train_epochs": 50}
PPO = {
    "expected_batch_size": 256, "num_mini_batches": 16, "num_ppo_epochs": 1, "num_generations": 1, "gamma": 1.0,
    "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "beta": 0.2, "adaptive_kl_target": 6,
    "adaptive_kl_horizon": 10000, "noised_baseline": False, "missing_eos_penalty": 0.0, "prompts": "private",
}  # fmt: skip


def in_section(name: str, *tables: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for table in tables for key, value in table.items()}


def paper(name: str) -> dict[str, Any]:
    """What the paper's text fixes for one recipe, by dotted field."""
    case, _, size = name.rpartition("_")
    common = {"target_epsilon": 4.0, "composition": "parallel", "model.name_or_path": f"openai-community/{size}"}
    common |= {"model.is_public": True, "rloo": None, "measurement": None, "output_dir": f"runs/{name}"}
    common |= in_section("ppo", PRIVATE_STEP, PPO, {"learning_rate": SIZES[size]})
    common |= in_section("sft", PRIVATE_STEP, SFT)
    if case == "imdb_sentiment":
        classifier = "classifier:cardiffnlp/twitter-roberta-base-sentiment"
        return common | {
            "target_delta": 1 / 25_000, "data.path": "stanfordnlp/imdb", "data.declared_units": 25_000, "reward_model": None,
            "split": {"sft": 0.5, "ppo": 0.5}, "sft.num_train_epochs": 40, "ppo.num_train_epochs": 100,
            "ppo.prompt_min_tokens": 2, "ppo.prompt_max_tokens": 8, "ppo.min_completion_length": 4,
            "ppo.max_completion_length": 16, "ppo.reward.source": classifier, "ppo.reward.label": "LABEL_2",
            "ppo.reward.use_logit": True, "ppo.reward.is_public": True,
        }  # fmt: skip
    other = size != "gpt2"  # the reward model is always GPT-2
    model = {"reward_model.model.name_or_path": "openai-community/gpt2", "reward_model.model.is_public": True}
    return common | in_section("reward_model", PRIVATE_STEP, REWARD) | (model if other else {"reward_model.model": None}) | {
        "target_delta": 1 / 479_000, "split": None, "units_disjoint": "declared", "ppo.reward.source": "reward_model",
        "sft_data.declared_units": 100_000, "reward_model_data.declared_units": 179_000, "ppo_data.declared_units": 200_000,
        "sft.num_train_epochs": 10, "ppo.num_train_epochs": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", IMDB + TLDR)
def test_numbers_of_the_paper(name):
    found = flat(recipe(name))
    expected = paper(name)
    differ = {k: (v, found.get(k)) for k, v in expected.items() if found.get(k, "no such field") != v}
    assert not differ, differ
    assert found["ppo.metrics_noise_ratio"] > 0  # what the adaptive KL coefficient reads


def test_the_lengths_fit_the_models():
    for name in IMDB + TLDR:
        given = recipe(name)
        assert given.ppo is not None and given.sft is not None
        whole = given.ppo.max_prompt_length + given.ppo.max_completion_length
        assert whole <= given.sft.max_length <= 1024
        assert given.ppo.max_prompt_length >= (given.ppo.prompt_max_tokens or 0)
        if given.reward_model is not None:
            assert whole <= given.reward_model.max_length <= 1024


@pytest.mark.parametrize(
    ("name", "units", "steps", "batches", "delta", "golden"),
    [
        ("imdb", [12_500, 12_500], [977, 4883], [512, 256], 4e-5, [1.498, 1.6164]),
        ("tldr", [100_000, 179_000, 200_000], [1953, 2185, 781], [512, 4096, 256], 1 / 479_000, None),
    ],
)
def test_sizes_of_the_paper(name, units, steps, batches, delta, golden):
    given = recipe(f"paper_sizes_{name}")
    assert delta_of(given, declared_units(given)) == pytest.approx(delta, rel=1e-15)
    stages = plan_stages(given, declared_units(given), delta)
    assert list(stages) == ["sft", "reward_model", "ppo"][:: 1 if name == "tldr" else 2]
    assert [s.units.count for s in stages.values()] == pytest.approx(units, abs=1e-6)
    assert [s.plan.steps for s in stages.values()] == steps
    assert [s.config.expected_batch_size for s in stages.values()] == batches
    assert [s.plan.metrics_noise_ratio for s in stages.values()] == [0] * len(units)
    assert len({s.part.dataset for s in stages.values()}) == 1
    for stage, sigma in zip(stages.values(), golden or [], strict=False):
        assert sigma <= stage.plan.noise_multiplier <= sigma * 1.002
    assert all(3.98 < s.plan.epsilon <= 4 for s in stages.values())


def test_units_in_both_stages_of_the_paper_cost_a_third_more_noise():
    # As the recipe's comment says.
    overrides = ("--composition", "sequential", "--split", "null", "--data.declared_units", 12_500)
    given = recipe("paper_sizes_imdb", *overrides)
    stages = plan_stages(given, declared_units(given), 4e-5)
    for stage in stages.values():
        assert stage.units.count == 12_500
        assert stage.plan.noise_multiplier / stage.alone.noise_multiplier == pytest.approx(1.333, abs=0.003)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_parses_and_says_what_it_is(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert 2 <= comment <= 4 or file.stem.startswith("quickstart")
    assert all(len(line) <= 120 for line in lines)
    stages = recipe(file.stem).stages
    assert {"dpo", "ppo", "rloo"} & set(stages)
    for config in stages.values():
        config.validate()


def test_half_a_character_is_refused_with_its_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text('sft: {}\nmodel: "\\ud800"\n', encoding="utf-8")
    with pytest.raises(DPAlignError, match="line 2: a text holds half of a character"):
        recipe_from("run", [str(file)])
    file.write_text('{"\\u202esft": 3}', encoding="utf-8")  # a name that would turn the sentence round
    with pytest.raises(DPAlignError) as raised:
        recipe_from("run", [str(file)])
    assert str(raised.value).isprintable()


# Their first steps ---------------------------------------------------------------------------------------------


class Recorded(Stage):
    """A stage that remembers itself, and what its optimiser was given first."""

    ran: list[Recorded]

    def train(self) -> None:
        Recorded.ran.append(self)
        super().train()

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = super()._optimizer()
        self.trained = {n: tuple(p.shape) for n, p in zip(self.gradients.names, self.gradients.parameters, strict=True)}
        return optimizer


@pytest.fixture
def ran(monkeypatch) -> list[Recorded]:
    Recorded.ran = []
    monkeypatch.setattr(run, "Stage", Recorded)
    return Recorded.ran


@pytest.fixture
def asked(monkeypatch) -> list[Recipe]:
    """The recipes that the command hands on."""
    recipes: list[Recipe] = []
    carried_out = run.run_recipe

    def remember(given: Recipe, **options: Any) -> dict[str, Any]:
        recipes.append(given)
        return carried_out(given, **options)

    monkeypatch.setattr(run, "run_recipe", remember)
    return recipes


def save_gpt2(folder: Path, width: int) -> Path:
    """GPT-2 with its own layer names, positions and one token for padding, beginning and end; random weights."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=1024, n_embd=width, n_layer=2, n_head=2, initializer_range=0.3,
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def save_classifier(folder: Path) -> Path:
    """A RoBERTa of three labels, as in TweetEval; random weights."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 32
    torch.manual_seed(0)
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=40, num_labels=3, initializer_range=0.5, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def as_options(overrides: dict[str, Any]) -> list[str]:
    return [text for name, value in overrides.items() for text in (f"--{name}", str(value))]


def check_run(capsys, name: str, overrides: dict[str, Any], ran: list[Recorded], asked: list[Recipe]) -> dict[str, Any]:
    """Runs a recipe with `overrides`; what trained was told what the file says, but for those.

    Returns:
        The run's summary.
    """
    summary = call(capsys, "run", FOLDER / f"{name}.yaml", *as_options(overrides), "--json").json
    before, after = flat(recipe(name)), flat(asked[0])
    assert {k for k in after if after[k] != before.get(k)} <= set(overrides)
    assert [s.algorithm.name for s in ran] == list(recipe(name).stages)
    for stage in ran:
        section = stage.algorithm.name
        trained = flat(stage.config) | {"target_epsilon": None, "target_delta": None}
        said = {k.removeprefix(f"{section}."): v for k, v in (after | before).items() if k.startswith(f"{section}.")}
        if said.get("model.dtype") == "auto":  # of a model of its own; a tiny one is float32
            said["model.dtype"] = "float32"
        sizes = {k.removeprefix(f"{section}.") for k in overrides}
        assert {k for k in trained if trained[k] != said.get(k)} <= sizes
        # What the settings became: one learning rate, rank 4 on the fused projection, flat clipping at 1.
        (group,) = stage.optimizer.param_groups
        assert group["lr"] == before[f"{section}.learning_rate"]
        lora = {n: shape for n, shape in stage.trained.items() if ".lora_" in n}
        assert all(".c_attn." in n and 4 in shape for n, shape in lora.items()) and len(lora) == 2 * 2
        heads = set(stage.trained) - set(lora)
        assert len(heads) == {"sft": 0, "reward_model": 1, "ppo": 2}[section]
        assert (stage.plan.passes, stage.plan.minibatches) == (1, 16 if section == "ppo" else 1)
        assert stage.plan.noise_multiplier > 0 and stage.private
    release = Path(summary["release"])
    adapter = json.loads((release / "adapter_config.json").read_text())
    assert adapter["r"] == 4 * (2 if "sft" in recipe(name).stages else 1)
    assert (release / "adapter_model.safetensors").is_file()
    assert summary["private"] and 3 < summary["epsilon"] <= 4
    assert summary["delta"] == before["target_delta"]
    assert statement(release.parent)["epsilon"] == summary["epsilon"]
    return summary


UNITS = 20  # of every stage


def stage_sizes(*stages: str) -> dict[str, Any]:
    """Samples of 4 expected units, 2 steps, micro-batches of 8."""
    return {
        f"{stage}.{key}": value
        for stage in stages
        for key, value in (("expected_batch_size", 4), ("max_steps", 2), ("micro_batch_size", 8))
    }


@pytest.mark.parametrize("name", IMDB)
def test_first_steps_on_reviews(tmp_path, capsys, ran, asked, name):
    reviews = [{"text": words(12, i), "label": i % 2} for i in range(2 * UNITS)]
    overrides = stage_sizes("sft", "ppo") | {
        "output_dir": tmp_path / "run", "ledger": tmp_path / "ledger.sqlite", "num_threads": 1,
        "model.name_or_path": save_gpt2(tmp_path / "base", 16), "data.path": write_jsonl(tmp_path / "r.jsonl", reviews),
        "data.declared_units": 2 * UNITS, "ppo.reward.source": f"classifier:{save_classifier(tmp_path / 'classifier')}",
    }  # fmt: skip
    summary = check_run(capsys, name, overrides, ran, asked)
    assert [(s["stage"], s["units"]) for s in summary["stages"]] == [("sft", UNITS), ("ppo", UNITS)]
    declared = summary["assumptions"]
    assert len(declared) == 2 and all("made without the private data" in a for a in declared)  # model and classifier
    ppo = ran[1].algorithm
    assert (ppo.reward.low, ppo.reward.high) == (-5, 5)
    assert {len(prompt.ids) for unit in ran[1].examples for prompt in unit} <= set(range(2, 9))
    noised = [json.loads(line)["noised_metrics"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert len(noised) == 2 + 16  # the PPO batch is 16 Poisson samples
    assert ppo.beta != 0.2 and math.isclose(ppo.beta, 0.2, rel_tol=0.2 * 16 * 4 / 10_000)  # it has begun to adapt


@pytest.mark.parametrize("name", TLDR)
def test_first_steps_on_summaries(tmp_path, capsys, ran, asked, name):
    posts, summaries = [words(12, i) for i in range(3 * UNITS)], [words(6, i) for i in range(100, 100 + 3 * UNITS)]
    files = {
        "sft": [{"prompt": p, "completion": s} for p, s in zip(posts, summaries, strict=True)][:UNITS],
        "reward_model": [
            {"prompt": posts[i], "chosen": summaries[i], "rejected": summaries[i + UNITS]}
            for i in range(UNITS, 2 * UNITS)
        ],
        "ppo": [{"prompt": p} for p in posts[2 * UNITS :]],
    }
    base = save_gpt2(tmp_path / "base", 16)
    # The lengths too: 512 texts of the SFT model are scored at full length to fix the reward's scale.
    overrides = stage_sizes(*files) | {
        "output_dir": tmp_path / "run", "ledger": tmp_path / "ledger.sqlite", "num_threads": 1,
        "model.name_or_path": base, "sft.max_length": 24, "reward_model.max_length": 24, "ppo.max_prompt_length": 16,
        "ppo.max_completion_length": 8,
    }  # fmt: skip
    for stage, records in files.items():
        path = write_jsonl(tmp_path / f"{stage}.jsonl", records)
        overrides |= {f"{stage}_data.path": path, f"{stage}_data.declared_units": UNITS}
    small = None
    if name != "tldr_summarization_gpt2":
        small = overrides["reward_model.model.name_or_path"] = save_gpt2(tmp_path / "small", 8)
    summary = check_run(capsys, name, overrides, ran, asked)
    assert [(s["stage"], s["units"]) for s in summary["stages"]] == [(stage, UNITS) for stage in files]
    models = [a for a in summary["assumptions"] if "made without the private data (declared)" in a]
    assert len(models) == (1 if small is None else 2)
    assert len(summary["assumptions"]) == 3 + len(models) and all("declared" in a for a in summary["assumptions"])
    # The reward model starts from the run's SFT model for GPT-2 itself, and from the public GPT-2 for larger policies.
    reward = ran[1].model
    assert isinstance(reward.model.get_base_model(), GPT2ForSequenceClassification)
    assert reward.adapters == (["reward_model"] if small else ["sft", "reward_model"])
    released = Path(summary["reward_model_release"])
    adapter = json.loads((released / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (
        (4, f"./{Path(small).name}") if small else (8, f"./{Path(base).name}")
    )
    assert (ran[2].algorithm.reward.low, ran[2].algorithm.reward.high) == (-4, 4)
