"""The quickstart with a model that chats: its table, completions and files; its judge, its requests, and best-of-n."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from chats import model_folder
from dpalign.algorithms.own_pairs import OwnPairs
from dpalign.algorithms.rollouts import rollouts_of
from dpalign.data.demo import film_prompts
from dpalign.errors import DPAlignError
from dpalign.evaluation.best_of import chosen
from dpalign.models import ModelConfig, Policy
from dpalign.models.generation import Prompt
from dpalign.recipe import Recipe
from dpalign.rewards import Reward, load_reward, raters
from dpalign.rewards.own import words
from dpalign.rewards.raters import Ridge, grams
from dpalign.rewards.written import PublicModel, PublicModels
from dpalign.settings.dpo import DPOConfig
from dpalign.settings.models import AdapterConfig
from dpalign.settings.rewards import RewardConfig
from helpers import call, ledger_rows, small_model
from reader import at_home
from tiny import tiny_policy

# The command -----------------------------------------------------------------------------------------------------

FREE = [
    {"source": "vader"},
    {
        "source": "contrast",
        "wanted": "good",
        "unwanted": "bad",
        "written_texts": 8,
        "written_tokens": 6,
        "max_length": 12,
    },
]
SMALL = {
    "eval_prompts": 4, "eval_best_of": 2, "split": None, "reward_query.own_texts": 24, "reward_query.directions": 4,
    "reward_query.max_length": 16, "reward_query.micro_batch_size": 4, "reward_query.free": json.dumps(FREE),
    "dpo.max_prompt_length": 200, "dpo.max_completion_length": 6, "dpo.expected_batch_size": 2, "dpo.max_steps": 1,
    "dpo.num_generations": 2, "dpo.micro_batch_size": 2,
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Demo data of a few records, and a small model that chats instead of SmolLM2."""
    at_home(tmp_path, monkeypatch)
    model = model_folder(tmp_path / "model", "smol", 512)
    monkeypatch.setattr("dpalign.models.smollm2.fetch", lambda: model)
    raters._learned.cache_clear()
    return tmp_path


def small(folder: Path, **changes: object) -> list[str]:
    fields = {**SMALL, "output_dir": folder / "q", **changes}
    return [word for name, value in fields.items() for word in (f"--{name}", "null" if value is None else str(value))]


def test_its_table_has_every_reward_and_policy_and_one_query_is_all_it_draws(home, capsys):
    called = call(capsys, "quickstart", "--model", "smollm2", "--compare", *small(home))
    assert called.status == 0, called.err
    summary = json.loads((home / "q" / "summary.json").read_text())
    rows = {row["model"]: row for row in summary["rows"]}
    order = ["pretrained", "free, best of 2", "free", "private, best of 2", "private"]
    assert [*rows] == [*order, "non-private, best of 2", "non-private"]
    pairs = summary["reward_query"]
    assert rows["free"]["agreement"] == rows["free, best of 2"]["agreement"] == pairs["free_accuracy"]
    assert rows["private"]["agreement"] == pairs["accuracy"] and "agreement" not in rows["pretrained"]
    assert rows["private"]["judge"] == summary["evaluation"]["dpo"]["reference_reward"]
    assert rows["private, best of 2"]["judge"] == summary["best_of"]["reward"]["judge"]
    assert (
        rows["private, best of 2"]["kl_at_most"] == pytest.approx(math.log(2) - 0.5) and rows["pretrained"]["kl"] == 0
    )
    # One draw of the run, one of the run without privacy; nothing else is ever read of the pairs.
    assert ledger_rows(home) == 2 and [stage["stage"] for stage in summary["stages"]] == ["reward_query"]
    assert summary["private"] and summary["epsilon"] <= 1
    assert summary["comparison"]["measure"] == "reference reward"
    for word in (*rows, "temperature 0.7", "at most 0.19", "trained against"):
        assert word.split(",")[0] in " ".join(called.out.split())
    assert (home / "q" / "judged.png").is_file() and (home / "q" / "report.html").is_file()
    # What the reward is worth stands where people look for it: in the report, and in the card of its release.
    page, best = (home / "q" / "report.html").read_text(), summary["best_of"]
    assert page.count("at work</h3>") == 2 and "The free rewards at work" in page
    assert all(f"{best[name]['judge']:.3f} ± {best[name]['judge_ci95']:.3f}" in page for name in ("reward", "free"))
    card = (home / "q" / "reward_model" / "README.md").read_text()
    assert card.count("What it was measured to be worth") == 1 and card.index("to be worth") < card.index("not cover")
    assert f"accuracy {pairs['accuracy']:.3f}" in card and f"free rewards {pairs['free_accuracy']:.3f}" in card
    assert f"reference reward {best['reward']['judge']:.3f}" in card
    # And how far people's texts are from the policy's own: 24 that it wrote, both texts of the 8 public pairs.
    assert pairs["own_texts"] == 24 and pairs["shift"] >= 0 and 0 <= pairs["outside"] <= 1
    assert f"{pairs['shift']:.2f} deviations from what the policy writes" in " ".join(card.split())
    assert "farther out than 95% of that" in page and f"{pairs['outside']:.0%} of them" in " ".join(card.split())
    (mean,) = (home / "q" / "rewards").glob("mean-*")
    assert pairs["free_accuracy"] == pytest.approx(agreement_of(mean, home)) and pairs["pairs"] == 8
    # What shows the free rewards' scales is written by the first of the three runs, and by no other.
    kept = [
        home / "q" / place / "rewards" / mean.name / "constants.safetensors" for place in ("free", ".", "nonprivate")
    ]
    assert len({file.stat().st_mtime_ns for file in kept}) == 1


def agreement_of(mean: Path, home: Path) -> float:
    """Share of the public pairs that the mean of the free rewards orders as people do."""
    reward = load_reward(RewardConfig(source=f"fitted:{mean}", is_public=True))
    lines = (home / ".cache/dpalign/movie-preferences/public_pairs.jsonl").read_text().splitlines()
    scores = [reward(["", ""], [pair["chosen"], pair["rejected"]]) for pair in map(json.loads, lines)]
    return sum(float(better > worse) + 0.5 * float(better == worse) for better, worse in scores) / len(scores)


def test_what_is_shown_was_written_at_the_temperature_that_is_said(home, capsys, monkeypatch):
    temperatures = []
    sample = Policy.sample
    monkeypatch.setattr(
        Policy, "sample", lambda self, *a, **k: temperatures.append(k.get("temperature", 1.0)) or sample(self, *a, **k)
    )
    found = call(capsys, "quickstart", "--model", "smollm2", "--json", *small(home)).json
    assert [row["model"] for row in found["rows"]] == ["pretrained", "free, best of 2", "private, best of 2", "private"]
    kept = json.loads((home / "q" / "completions_to_read.json").read_text())
    assert kept["temperature"] == 0.7 and temperatures[-2:] == [0.7, 0.7] and {*temperatures[:-2]} == {1.0}
    assert [*kept["completions"][0]] == ["asked", "pretrained", "private"] and len(kept["completions"]) == 12
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    assert PeftModel.from_pretrained(base, home / "q" / "release").peft_config["default"].r == 4


@pytest.mark.parametrize("word", ["--data.path", "--reward_query_data.path=x", "--dpo_data.eval_path"])
def test_other_data_is_refused(word, capsys):
    said = call(capsys, "quickstart", "--model", "smollm2", word, "x").error
    assert said.startswith("the quickstart is for its demo data")


def test_without_a_policy_there_is_nothing_to_show(capsys):
    said = call(capsys, "quickstart", "--model", "smollm2", "--dpo", "null").error
    assert said.startswith("the quickstart shows what a model learns from a private reward: without it")


# Requests, and the judge -----------------------------------------------------------------------------------------


def test_the_requests_to_measure_on_are_about_other_films(tmp_path):
    asked, public = (
        [json.loads(line)["prompt"] for line in film_prompts(tmp_path)[name].read_text().splitlines()]
        for name in ("asked", "public")
    )
    assert len(asked) == len(public) == 96 and [message["role"] for message in asked[0]] == ["user"]
    said = [{prompt[0]["content"] for prompt in prompts} for prompts in (asked, public)]
    assert len(said[0] | said[1]) == 192
    assert "Write one sentence about a film you have just seen." in said[0]


def test_the_judge_learns_what_words_are_worth():
    texts = ["a fine film", "a fine play", "a dull film", "a dull play"] * 3
    ridge = Ridge(texts, [1.0, 1.0, -1.0, -1.0] * 3)
    fine, dull, neither = ridge.scores(["fine", "dull", "nothing"]).tolist()
    assert fine > 0.2 and dull < -0.2 and neither == pytest.approx(0, abs=1e-6)
    found = ridge.scaled_on(texts).scores(texts)
    assert float(found.mean()) == pytest.approx(0, abs=1e-5) and float(found.std()) == pytest.approx(1, rel=1e-5)
    assert grams("A fine, FINE film") == {"a", "fine", ",", "film", "a fine", "fine ,", ", fine", "fine film"}


def test_the_judge_solves_the_ridge_in_its_dual():
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{'abcdefgh'[i]}" for i in torch.randint(0, 8, (6,), generator=generator)) for _ in range(20)]
    values = torch.randn(20, generator=generator).double().numpy()
    ridge = Ridge(texts, values.tolist())
    rows = ridge._rows(texts).toarray()
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(20))
    plain = np.linalg.solve(rows.T @ rows + np.eye(rows.shape[1]), rows.T @ (values - values.mean()))
    assert np.allclose(ridge.weights, plain, atol=1e-5)


def test_the_judge_reads_the_answer_of_a_chat(monkeypatch):
    monkeypatch.setattr(
        raters, "_learned", lambda: Mock(scores=lambda texts: np.array([float(len(t)) for t in texts]))
    )
    answer = [{"role": "assistant", "content": "Good."}]
    assert raters.judge([[{"role": "user", "content": "Well?"}]], [answer]) == [5.0] and words(answer) == "Good."


# Best of n ---------------------------------------------------------------------------------------------------------


def test_what_a_reward_chooses_worked_by_hand():
    nan = math.nan
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0], [nan, 1.0, 0.0], [nan, nan, nan], [1.0, 2.0, 3.0]])
    judged = torch.tensor([[0.0, 6.0, 0.0], [1.0, 3.0, 2.0], [9.0, 0.0, 3.0], [1.0, 1.0, 1.0], [1.0, 1.0, nan]])
    found = chosen(scores, judged)
    # 6 of a mean of 2; the mean 2 of two equal ones of 2; 0 of 4. The others have no score, or not every judgement.
    assert (found.judge, found.gain) == pytest.approx((8 / 3, (4 + 0 - 4) / 3)) and found.prompts == 3
    assert found.gain_ci95 == pytest.approx(1.96 * 4 / math.sqrt(3))
    assert found.kl_at_most == pytest.approx(math.log(3) - 2 / 3) and found.completions == 3


def test_best_of_needs_a_judge_and_a_policy():
    judge, sampling = RewardConfig(source="vader"), DPOConfig(prompts="self_written", max_steps=1)
    for fields in ({"dpo": DPOConfig(), "reference_reward": judge}, {"dpo": sampling}):
        with pytest.raises(DPAlignError, match="it needs a reference_reward, and a stage that samples"):
            Recipe(eval_best_of=4, **fields).check()
    Recipe(eval_best_of=4, dpo=sampling, reference_reward=judge).check()


# Nothing is computed twice -----------------------------------------------------------------------------------------


def test_the_reference_reads_only_the_pairs_that_are_learned_from(monkeypatch):
    """Mutant: log-probabilities of other rows than those that were kept."""
    length = Reward(lambda prompts, completions, **_: [float(len(c)) for c in completions], -1, 1e3, rows_at_once=None)
    config = DPOConfig(
        prompts="self_written", num_generations=4, max_steps=1, max_completion_length=5, max_prompt_length=4,
        micro_batch_size=2, adapter=AdapterConfig(r=2),
    )  # fmt: skip
    policy, algorithm = tiny_policy("llama"), OwnPairs(config, length)
    algorithm.setup(policy)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.add_(0.3)
    read = []
    original = Policy.completion_logprobs
    monkeypatch.setattr(
        Policy,
        "completion_logprobs",
        lambda self, r, *a, **k: read.append(len(r.input_ids)) or original(self, r, *a, **k),
    )
    rows = algorithm.rows(policy, [[Prompt([3, 4], "w1 w2")], [Prompt([5], "w3")]], None)
    assert sum(read) == 4 and len(rows.unit) == 4 and rows.unit.tolist() == [0, 0, 1, 1]
    scores = rows.tensors["scores"]
    assert bool((scores[0::2] > scores[1::2]).all())
    with torch.no_grad(), policy.reference():
        expected = original(policy, rollouts_of(rows))[0]
    assert torch.allclose(rows.tensors["ref_logprobs"], expected, atol=1e-5)


def test_text_that_shows_the_scales_of_several_rewards_is_written_once():
    policy = Policy.load(ModelConfig(name_or_path=small_model(), is_public=True))
    public = PublicModels(PublicModel(policy, "small", has_run=True), completion_tokens=4)
    contrast = RewardConfig(source="contrast", wanted="a", unwanted="b", written_texts=8)
    first = public.own_rows(contrast)
    assert public.own_rows(RewardConfig(source="mean", of=[{"source": "vader"}], written_texts=8)) is first
    assert len(public.own_rows(replace(contrast, written_texts=9))[0]) == 18  # others where others are asked for
    assert public.own_rows(replace(contrast, written_seed=1)) != first
