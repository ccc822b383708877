"""What private data bought: the free row, the closed gap by hand, and a run, a sweep and a card that say it in words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dpalign import sweep
from dpalign.compared import caveats, free_recipe, measure_of, nonprivate_recipe
from dpalign.data import DataConfig
from dpalign.errors import DPAlignError
from dpalign.evaluation.closed_gap import ClosedGap, Mean, closed_gap
from dpalign.models import ModelConfig
from dpalign.parsing import recipe_from
from dpalign.plan import Past, make_plan
from dpalign.recipe import Recipe
from dpalign.release import say_in_card
from dpalign.reporting.plots import read_metrics
from dpalign.reporting.sweep import bought_sentences, plot_sweep, summarize_sweep, write_markdown
from dpalign.rewards import RewardConfig
from dpalign.settings.ppo import PPOConfig
from dpalign.settings.reward_model import RewardModelConfig
from dpalign.settings.reward_query import RewardQueryConfig
from dpalign.settings.sft import SFTConfig
from helpers import call, in_this_process, ledger_rows, reviews, small_model, write_jsonl, write_recipe
from test_report import Reading

# By hand -------------------------------------------------------------------------------------------------------


def gap(free: float, private: float, nonprivate: float | None = None, half: float = 0.01) -> ClosedGap:
    return ClosedGap(
        "reward", Mean(free, half), Mean(private, half), None if nonprivate is None else Mean(nonprivate, half)
    )


def test_the_closed_gap_worked_by_hand():
    found = gap(0.2, 0.5, 0.6)
    assert found.share is not None and found.share.value == pytest.approx(0.75)
    # d/dp = 1/0.4, d/dn = -0.75/0.4, d/df = -0.25/0.4, each times 0.01.
    assert found.share.half == pytest.approx(0.01 * math.sqrt(1 + 0.75**2 + 0.25**2) / 0.4)
    assert found.bought.value == pytest.approx(0.3) and found.bought.half == pytest.approx(0.01 * math.sqrt(2))
    assert found.as_dict() | {"closed_gap": 0, "closed_gap_ci95": 0} == {
        "measure": "reward", "free": 0.2, "free_ci95": 0.01, "private": 0.5, "private_ci95": 0.01, "nonprivate": 0.6,
        "nonprivate_ci95": 0.01, "closed_gap": 0, "closed_gap_ci95": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (gap(0.2, 0.5, 0.6), ["The private data bought 0.300 ± 0.014", "0.600 ± 0.010): 0.750 ± 0.032."]),
        (gap(0.67, 0.51, 0.57), ["WARNING: the private data bought nothing: what is free", "not defined"]),
        (gap(0.5, 0.51, 0.6), ["WARNING: the private data bought nothing that shows", "): 0.100 ± "]),
        (gap(0.5, 0.52, 0.51), ["The private data bought 0.020", "not defined: without privacy (0.510"]),
        (gap(0.2, 0.5), ["The private data bought 0.300"]),
    ],
)
def test_it_says_in_words_what_was_bought(found, words):
    said = found.sentences()
    assert len(said) == len(words) and all(part in sentence for part, sentence in zip(words, said, strict=True))


def test_what_was_not_measured_has_no_gap():
    row = {"reward": 0.1, "reward_ci95": 0.01}
    assert closed_gap("reward", row, row, row) is not None and closed_gap("reference_reward", row, row, row) is None
    assert closed_gap("reward", row | {"reward_ci95": math.nan}, row, row) is None
    assert closed_gap("reward", row, row, None).nonprivate is None


# What is free --------------------------------------------------------------------------------------------------

SHOWN = DataConfig(name="d", path="d.jsonl", declared_units=10_000, eval_path="p.jsonl", eval_is_public=True)
LEARNED = {"reward_model": RewardModelConfig(), "ppo": PPOConfig(reward=RewardConfig(source="reward_model"))}


def test_the_free_policy_reads_no_private_data():
    private = PPOConfig(
        expected_batch_size=100, num_train_epochs=2.0, clipping_gamma=0.3, learning_rate=5e-3, prompt_max_tokens=6,
        max_prompt_length=6, target_epsilon=2.0,
    )  # fmt: skip
    recipe = Recipe(
        data=SHOWN, sft=SFTConfig(), ppo=private, split={"sft": 0.5, "ppo": 0.5}, output_dir="runs/x", eval_seed=3
    )
    free = free_recipe(recipe)
    assert free.drawing == {} and [*free.stages] == ["ppo"] and free.output_dir == "runs/x/free"
    assert free.data == DataConfig(eval_path="p.jsonl", eval_is_public=True) and free.split is None
    assert free.ppo.prompts == "self_written" and free.ppo.max_steps == 100  # two epochs of 5,000 units
    assert (free.ppo.expected_batch_size, free.ppo.learning_rate, free.eval_seed) == (100, 5e-3, 3)
    assert free.ppo.clipping_gamma == 0.01 and free.ppo.target_epsilon is None and free.ppo.max_prompt_length == 7
    assert measure_of(recipe) == "reward" and caveats(recipe) == []


def test_without_privacy_only_the_noise_is_gone():
    recipe = Recipe(data=SHOWN, sft=SFTConfig(noise_multiplier=1.0), ppo=PPOConfig(target_epsilon=2.0), output_dir="x")
    bare = nonprivate_recipe(recipe)
    assert bare.target_epsilon == math.inf and bare.output_dir == "x/nonprivate" and bare.data == SHOWN
    assert bare.sft.noise_multiplier is None and bare.ppo.target_epsilon is None and bare.ppo.prompts == "private"


def test_the_free_reward_is_the_one_that_needs_no_people():
    def reward_of(**changes: Any) -> str:
        return free_recipe(Recipe(data=SHOWN, **LEARNED | changes)).ppo.reward.source

    judge = RewardConfig(source="mine:judge", is_public=True, low=0, high=1)
    assert reward_of(free_reward=RewardConfig()) == "vader" == reward_of(reference_reward=RewardConfig())
    assert reward_of(free_reward=RewardConfig(), reference_reward=judge) == "vader"
    both = Recipe(data=SHOWN, **LEARNED, free_reward=RewardConfig(), reference_reward=judge)
    other = "What is free was trained against vader: its reward is on another scale than the other rows'."
    assert measure_of(both) == "reference_reward" and caveats(both) == [other]
    query = RewardQueryConfig(free=[{"source": "vader"}])  # what people are asked to add to
    policy = PPOConfig(prompts="self_written", max_steps=1, reward=RewardConfig(source="reward_model"))
    asked = Recipe(data=SHOWN, ppo=policy, reward_query=query, reward_query_data=DataConfig(path="pairs.jsonl"))
    assert free_recipe(asked).ppo.reward == query.free_mean and caveats(asked)[0].startswith("What is free was trained")
    flattering = Recipe(data=SHOWN, **LEARNED, reference_reward=RewardConfig())
    assert caveats(flattering)[0] == other
    assert caveats(flattering)[1].startswith("The free policy was trained against the reward that this compares by")


def test_what_reads_no_record_shows_the_numbers_of_a_reference_only_where_the_data_is_demo():
    """A reference reward without a guarantee may rest on the very data that the free policy does not read."""
    for is_demo in (False, True):
        recipe = Recipe(data=replace(SHOWN, is_demo=is_demo), ppo=PPOConfig())
        assert make_plan(free_recipe(recipe), {}, Past()).is_all_demo is is_demo


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "no free reward to compare with: the reward is learned from people"),
        ({"free_reward": RewardConfig(source="reward_model:x")}, "no free reward to compare with"),
        ({"ppo": None, "reward_model": None, "sft": SFTConfig()}, "no stage that samples completions"),
        (
            {"ppo": PPOConfig(reward=RewardConfig(source="m:f", is_public=True, low=0, high=1, columns=["mood"]))},
            "reward.columns mood: what the model writes itself has no columns",
        ),
    ],
)
def test_where_nothing_is_free_it_says_why(changes, words):
    with pytest.raises(DPAlignError, match=words):
        free_recipe(Recipe(data=SHOWN, **LEARNED | changes))


def test_a_model_with_a_private_past_is_not_free(tmp_path):
    mechanism = {"sampling_rate": 0.5, "noise_multiplier": 2.0, "steps": 3}
    stage = {
        "stage": "sft", "dataset": "d", "part": [0, 1], "split": "s", "unit": "record", "declared_units": 9,
        "max_grad_norm": 1, "epsilon_alone": 1, "mechanisms": [mechanism], "private": True,
    }  # fmt: skip
    stated = {"private": True, "epsilon": 1.0, "stages": [stage], "assumptions": []}
    (tmp_path / "privacy.json").write_text(json.dumps(stated))
    with pytest.raises(DPAlignError, match="has been trained on private data"):
        free_recipe(Recipe(data=SHOWN, model=ModelConfig(str(tmp_path)), ppo=PPOConfig()))


# A run ---------------------------------------------------------------------------------------------------------


def small(folder: Path, **changes: Any) -> Path:
    write_jsonl(folder / "public.jsonl", reviews(6, "morning"))
    data = {"eval_path": str(folder / "public.jsonl"), "eval_is_public": True} | changes.pop("data", {})
    return write_recipe(folder, data=data, **{"sft": {"max_steps": 1}, "ppo": {"max_steps": 1}} | changes)


def test_a_run_says_what_its_private_data_bought(tmp_path, capsys):
    recipe = small(tmp_path, data={"is_demo": True})
    called = call(capsys, "run", recipe, "--compare", "--json")
    found, run = called.json["comparison"], tmp_path / "run"
    assert {"free", "private", "nonprivate", "closed_gap"} <= found.keys() and found["measure"] == "reward"
    assert called.json["private"] and called.json["epsilon"] <= 2
    free, bare = (json.loads((run / name / "summary.json").read_text()) for name in ("free", "nonprivate"))
    assert free["stages"] == [] and free["evaluation"]["ppo"]["reward"] == found["free"] and not bare["private"]
    assert bare["evaluation"]["ppo"]["reward"] == found["nonprivate"]
    assert ledger_rows(tmp_path) == 2 * (1 + 1)  # the run and the one without privacy; what is free draws nothing
    said = found["said"]
    assert len(said) == 2 and "the private data bought" in said[0].lower() and "gap" in said[1]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["comparison"] == json.loads(json.dumps(found))
    page, card = (run / "report.html").read_text(), (run / "release" / "README.md").read_text()
    assert all(sentence in page and sentence in card for sentence in said) and "ppo, free" in page
    assert "No private record was read" in (run / "free" / "report.html").read_text()
    say_in_card(run / "release", ["Something else."])
    again = (run / "release" / "README.md").read_text()
    assert again.count("## What the private data bought") == 1 and "Something else." in again and said[0] not in again
    assert again.replace("Something else.", "") in card.replace(f"- `{said[0]}`\n- `{said[1]}`", "- ``")


def test_private_data_is_not_run_without_privacy(tmp_path, capsys):
    write_jsonl(tmp_path / "x.jsonl", reviews(2))
    recipe = small(tmp_path, sft=None, eval_prompts=4)
    found = call(capsys, "run", recipe, "--compare", "--json").json["comparison"]
    assert "nonprivate" not in found and found["closed_gap"] is None
    assert (
        "the private data bought" in found["said"][0].lower() and "Nothing was run without privacy" in found["said"][1]
    )
    assert not (tmp_path / "run" / "nonprivate").exists() and ledger_rows(tmp_path, noise_multiplier=0.0) == 0
    assert "seconds" not in json.loads((tmp_path / "run" / "free" / "summary.json").read_text())


def test_a_run_with_nothing_free_beside_it_says_so(tmp_path, capsys):
    recipe = small(tmp_path, ppo=None)
    found = call(capsys, "run", recipe, "--compare", "--json").json["comparison"]
    assert found["said"][0].startswith("There is no free policy to compare with: the recipe has no stage that samples")


# A sweep -------------------------------------------------------------------------------------------------------


def trial(epsilon: str, seed: int, reward: float, **more: Any) -> dict[str, Any]:
    return {
        "epsilon": epsilon, "seed": seed, "value": None, "reward": reward, "kl": 1.0, "reward_ci95_prompts": 0.01
    } | more  # fmt: skip


def test_rows_of_a_sweep_by_hand(tmp_path):
    runs = [trial("0", 0, 0.1), trial("free", 0, 0.2), trial("4", 0, 0.5), trial("inf", 0, 0.6)]
    rows = {row["epsilon"]: row for row in summarize_sweep(runs)}
    assert rows[4.0]["closed_gap"] == pytest.approx(0.75) and rows[4.0]["share"] == pytest.approx(0.8)
    assert not any("closed_gap" in rows[e] or "share" in rows[e] for e in (0.0, "free", "inf"))
    result = {"varied": None, "rows": [*rows.values()], "command": "x", "spent_by_tuning": []}
    assert bought_sentences(result)[0].startswith("epsilon 4: The private data bought 0.300 ± 0.014")
    write_markdown(tmp_path / "a.md", result)
    plot_sweep(result, tmp_path / "a.png")
    text = (tmp_path / "a.md").read_text()
    assert "| closed gap |" in text and "0.75 ± 0.03" in text and "bought 0.300" in text
    seeds = [trial(e, s, r + 0.1 * s) for e, r in (("free", 0.2), ("4", 0.5), ("inf", 0.6)) for s in (0, 1)]
    wide = {row["epsilon"]: row for row in summarize_sweep(seeds)}[4.0]
    assert wide["private_ci95"] == pytest.approx(0.05 * 12.706, rel=1e-3) and wide["closed_gap"] is None
    learned = [run | {"reference_reward": run["reward"] / 2, "reward_model": {"accuracy": 0.7}} for run in runs]
    assert "closed_gap" not in {r["epsilon"]: r for r in summarize_sweep(learned)}[4.0]  # no interval was kept
    learned = [run | {"reference_reward_ci95_prompts": 0.01} for run in learned]
    four = {r["epsilon"]: r for r in summarize_sweep(learned)}[4.0]
    assert four["measure"] == "reference reward" and four["private"] == 0.25


def test_a_sweep_has_the_free_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DPALIGN_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.setattr(sweep, "_in_fresh_process", in_this_process)
    recipe = small(tmp_path, sft=None, ppo={"max_steps": 1})
    words = ("sweep", recipe, "--epsilons", 2, "--seeds", 1, "--compare", "--output_dir", tmp_path / "sweep", "--json")
    found = call(capsys, *words).json
    assert [row["epsilon"] for row in found["rows"]] == [0, "free", 2, "inf"]
    assert found["rows"][2]["bought"] and "--epsilons 0 free 2 inf" in found["command"]
    assert ledger_rows(tmp_path) == 2
    made = tmp_path / "sweep" / "runs" / "epsilon-free-seed-0"
    assert json.loads((made / "summary.json").read_text())["stages"] == []
    assert recipe_from("run", [str(made / "recipe.json")]).ppo.prompts == "self_written"
    again = call(capsys, *words).json
    assert again["rows"] == found["rows"] and ledger_rows(tmp_path) == 2
    shown, own = (Reading(tmp_path / "sweep" / page).text for page in ("report.html", "private/report.html"))
    first, second = found["rows"][2]["bought"]  # the second rests on the run without privacy, and the data is private
    assert first in shown and second not in shown and first in own and second in own
    assert "free free" in shown and "losed gap" not in shown and "without privacy not covered" in own


def test_a_sweep_without_anything_free_says_so(tmp_path, capsys):
    said: list[str] = []
    counts = sweep._with_ends(Recipe(data=SHOWN, **LEARNED), {"4": 2}, Mock(note=said.append))
    assert counts == {"0": 2, "4": 2, "inf": 2} and "no free reward to compare with" in said[0]
    learned = {"reward": {"source": "mine:f", "is_public": True, "low": 0, "high": 1, "columns": ["text"]}}
    recipe = small(tmp_path, sft=None, ppo={"max_steps": 1} | learned)
    refused = call(
        capsys, "sweep", recipe, "--epsilons", "free", "--seeds", 1, "--output_dir", tmp_path / "sweep"
    ).error
    assert refused.startswith("there is no free policy to compare with: ppo: reward.columns text")
    assert not (tmp_path / "sweep").exists()


# The quickstart ------------------------------------------------------------------------------------------------


def test_the_quickstarts_table_has_the_free_row(tmp_path, capsys, monkeypatch):
    files = (
        write_jsonl(tmp_path / "private.jsonl", reviews(40)),
        write_jsonl(tmp_path / "public.jsonl", reviews(4, "noon")),
    )
    monkeypatch.setattr("dpalign.cli.quickstart.movie_snippets", lambda: files)
    monkeypatch.setenv("DPALIGN_LEDGER", str(tmp_path / "ledger.sqlite"))
    words = ["--model.name_or_path", small_model(), "--model.is_public", "true", "--output_dir", tmp_path / "q"]
    words += ["--ppo.max_completion_length", 4, "--ppo.adapter.init_a", "random", "--sft.max_length", 8]
    for stage in ("sft", "ppo"):
        words += [f"--{stage}.expected_batch_size", 4, f"--{stage}.max_steps", 1, f"--{stage}.micro_batch_size", 8]
    called = call(capsys, "quickstart", "--compare", *words)
    assert called.status == 0, called.err
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert {"reward_pretrained", "reward_sft", "reward_private", "reward_free", "reward_nonprivate"} <= summary.keys()
    assert summary["comparison"]["free"] == summary["reward_free"]
    assert summary["comparison"]["said"][0] in " ".join(called.out.split())
    assert "free" in {line.split()[1] for line in called.out.splitlines() if line.startswith("│")}
    assert ledger_rows(tmp_path) == 2 and (tmp_path / "q" / "reward.png").is_file()
    rows = {stage: read_metrics(tmp_path / "q" / "metrics.jsonl", stage) for stage in ("sft", "ppo")}
    assert ["noised_metrics" in row for row in rows["sft"]] == [True] and "own_text_metrics" in rows["ppo"][0]
