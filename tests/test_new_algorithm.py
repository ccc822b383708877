"""A new algorithm is a class, a line in the list of stages and a field of the recipe: all else goes by what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpalign import stages
from dpalign.algorithms.base import Algorithm, Rows, Tokens, TrainingConfig
from dpalign.cli.plan_recipe import plan_of
from dpalign.data import DataConfig
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, ModelConfig, Policy
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import MetricRange
from dpalign.recipe import Recipe
from dpalign.rewards import RewardConfig
from dpalign.run import run_recipe
from helpers import ledger_rows, reviews, statement, write_jsonl


@dataclass(kw_only=True)
class UnlikelihoodConfig(TrainingConfig):
    """Settings of the toy; `judge` enters it, and so is asked where it comes from."""

    judge: RewardConfig | None = None


class Unlikelihood(Algorithm[UnlikelihoodConfig, Policy, list[int]]):
    """The toy: makes the first token of every text less likely."""

    name, Config, model_kind, columns = "toy", UnlikelihoodConfig, Policy, (("text",),)
    metrics = (MetricRange("loss", 0.0, 20.0),)

    @classmethod
    def entering(cls, config):
        return {} if config.judge is None else {"judge": config.judge}

    @classmethod
    def longest(cls, config):
        return config.max_length

    @classmethod
    def tokens(cls, config):
        return Tokens(trained=config.max_length)

    @classmethod
    def check(cls, config, tokenizer, record):
        if "forbidden" in record["text"]:
            raise DPAlignError("a word that the toy refuses")

    def setup(self, model):
        model.add_adapter(self.name, self.config.adapter)

    def encode(self, model, record):
        return model.tokenizer(record["text"]).input_ids[:2]

    def rows(self, model, units, coins):
        rows = [(unit, ids) for unit, examples in enumerate(units) for ids in examples]
        ids = torch.tensor([ids for _, ids in rows], dtype=torch.int64).reshape(-1, 2)
        return Rows(torch.tensor([unit for unit, _ in rows], dtype=torch.int64), {"ids": ids})

    def row_losses(self, model, rows):
        ids = rows.tensors["ids"]
        logits, _ = model(ids[:, :1], torch.ones_like(ids[:, :1]), 1)
        loss = logits[:, 0].log_softmax(-1).gather(1, ids[:, 1:]).squeeze(1)
        return loss, -loss.detach().unsqueeze(1)


@dataclass(kw_only=True)
class ToyRecipe(Recipe):
    """The recipe with the toy's field."""

    toy: UnlikelihoodConfig | None = None


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(stages.STAGES, "toy", stages.Listed(f"{__name__}:Unlikelihood", "makes first tokens unlikely"))


def recipe(folder: Path, texts: list[dict[str, Any]] | None = None, **changes: Any) -> ToyRecipe:
    data = write_jsonl(folder / "data.jsonl", texts or reviews(40))
    small = {"expected_batch_size": 8, "max_steps": 3, "max_length": 8, "adapter": AdapterConfig(r=1)}
    return ToyRecipe(
        output_dir=str(folder / "run"), ledger=str(folder / "ledger.sqlite"), target_epsilon=2.0, model=ModelConfig(),
        data=DataConfig(name="reviews", path=str(data), unit="id"), toy=UnlikelihoodConfig(**small | changes),
    )  # fmt: skip


def test_it_is_planned_run_stated_and_released(tmp_path):
    shown = plan_of(recipe(tmp_path))
    (planned,) = shown["stages"]
    assert planned["stage"] == "toy" and planned["tokens_trained"] == 3 * 8 * 8 and shown["epsilon"] <= 2
    done = run_recipe(recipe(tmp_path))
    assert done.statement.epsilon == pytest.approx(shown["epsilon"], rel=1e-3)
    (stage,) = statement(tmp_path / "run")["stages"]
    assert stage["stage"] == "toy" and stage["mechanisms"][0]["steps"] == 3 == ledger_rows(tmp_path, stage="toy")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["release"].endswith("release")
    again = run_recipe(recipe(tmp_path))
    assert again.statement.epsilon == done.statement.epsilon and ledger_rows(tmp_path) == 3


def test_it_resumes_after_a_crash(tmp_path, monkeypatch):
    write = Ledger.write

    def dies(self, intents):
        if intents[0].step == 2:
            raise KeyboardInterrupt
        write(self, intents)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Ledger, "write", dies)
        run_recipe(recipe(tmp_path))
    assert run_recipe(recipe(tmp_path)).statement.epsilon <= 2 and ledger_rows(tmp_path) == 3


def test_what_it_says_is_asked(tmp_path):
    """Provenance, lengths and records of a stage that no room above knows by name."""
    with pytest.raises(DPAlignError, match="stage toy needs 9999 positions"):
        run_recipe(recipe(tmp_path / "a", max_length=9999) if (tmp_path / "a").mkdir() is None else None)
    with pytest.raises(DPAlignError, match=r"record 2 of .*: a word that the toy refuses"):
        texts = reviews(40)
        texts[1]["text"] = "a forbidden text"
        run_recipe(recipe(tmp_path, texts))
    judge = RewardConfig(source=f"reward_model:{tmp_path}")
    with pytest.raises(DPAlignError, match="must be declared public"):
        run_recipe(recipe(tmp_path, judge=judge))
    with pytest.raises(DPAlignError, match="needs a section reward_model"):
        run_recipe(recipe(tmp_path, judge=replace(judge, source="reward_model")))
    assert not (tmp_path / "ledger.sqlite").exists() or ledger_rows(tmp_path) == 0


@pytest.mark.parametrize("member", ["entering", "longest", "tokens", "check", "encode", "rows", "row_losses", "setup"])
def test_a_forgotten_member_is_a_type_error_where_the_class_stands(member):
    members = {name: value for name, value in vars(Unlikelihood).items() if name != member and name[:2] != "__"}
    with pytest.raises(TypeError, match=f"Forgetful lacks {member}"):
        type(Algorithm)("Forgetful", (Algorithm,), members)


@pytest.mark.parametrize("attribute", ["name", "Config", "model_kind", "columns"])
def test_a_forgotten_attribute_too(attribute):
    members = {name: value for name, value in vars(Unlikelihood).items() if name != attribute and name[:2] != "__"}
    with pytest.raises(TypeError, match=f"Forgetful lacks {attribute}"):
        type(Algorithm)("Forgetful", (Algorithm,), members)
