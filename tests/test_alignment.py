"""SFT, reward model and PPO or RLOO through the command line: what they leave, what they add up to, what is refused."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest

from dpalign.training import Stage
from helpers import (
    PICKLES,
    call,
    files_below,
    in_fresh_process,
    judged,
    ledger_rows,
    reviews,
    statement,
    write_jsonl,
    write_recipe,
)
from test_pipeline import recomputed

STAGE = {"expected_batch_size": 8, "micro_batch_size": 32, "prepend_bos": True, "adapter": {"r": 2}}
REWARD = STAGE | {"max_steps": 2, "max_length": 20}
LEARNED = {"reward": {"source": "reward_model"}, "max_steps": 2}


def write_data(folder: Path) -> dict[str, Any]:
    """Texts, pairs and prompts of different people, and public pairs and prompts; the recipe's sections for them."""
    files = {
        "texts": reviews(40), "pairs": judged(40, start=100), "prompts": [r | {"id": f"q{r['id']}"} for r in reviews(80)[40:]],
        "public_pairs": judged(6, "public"), "public_prompts": reviews(6, "public"),
    }  # fmt: skip
    paths = {name: str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in files.items()}
    sections: dict[str, Any] = {"data": None}
    for stage, name in (("sft", "texts"), ("reward_model", "pairs"), ("ppo", "prompts")):
        public = paths.get(f"public_{name}")
        sections[f"{stage}_data"] = {"name": name, "path": paths[name], "unit": "id"} | (
            {"eval_path": public, "eval_is_public": True} if public else {}
        )
    return sections


def release_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "privacy.json").read_text(encoding="utf-8"))


# One run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All three stages in a fresh process: its folder, standard output and standard error."""
    folder = tmp_path_factory.mktemp("alignment")
    recipe = write_recipe(folder, reward_model=REWARD, ppo=LEARNED, **write_data(folder))
    status, out, err = in_fresh_process(folder, "run", recipe, "--json")
    assert status == 0, err
    return folder, out, err


def test_the_summary_of_three_stages(finished):
    folder, out, err = finished
    summary = json.loads(out)
    assert out.count("\n") == 1 and summary == json.loads((folder / "run" / "summary.json").read_text())
    assert summary["private"] and 0 < summary["epsilon"] <= 2
    assert [(s["stage"], s["dataset"], s["units"]) for s in summary["stages"]] == [
        ("sft", "texts", 40), ("reward_model", "pairs", 40), ("ppo", "prompts", 40)
    ]  # fmt: skip
    assert summary["reward_model"]["pairs"] == 6 and 0 <= summary["reward_model"]["accuracy"] <= 1
    assert set(summary["evaluation"]) >= {"pretrained"} and len(summary["ledger"]) == 3
    assert summary["release"].endswith("run/release") and summary["reward_model_release"].endswith("run/reward_model")
    assert f"epsilon {summary['epsilon']:.3f}" in err


def test_both_releases_are_complete_readable_and_not_pickled(finished):
    run = finished[0] / "run"
    needed = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "privacy.json"}
    assert needed <= {f.name for f in (run / "release").iterdir()}
    assert needed | {"reward.json"} <= {f.name for f in (run / "reward_model").iterdir()}
    assert not [f for f in files_below(run) if f.suffix in PICKLES]
    for name in ("release", "reward_model"):
        assert stat.S_IMODE((run / name).stat().st_mode) == 0o755
        assert {stat.S_IMODE(f.stat().st_mode) for f in (run / name).iterdir()} == {0o644}
    assert stat.S_IMODE((run / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE((finished[0] / "ledger.sqlite").stat().st_mode) == 0o600
    card = (run / "reward_model" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "num_labels=1" in card and "differential privacy" in card
    scale = json.loads((run / "reward_model" / "reward.json").read_text())["normalization"]
    assert scale["scale"] > 0 and math.isfinite(scale["shift"])


def test_each_release_states_what_it_rests_on(finished):
    """The reward model rests on SFT and its own stage; the policy on all three. Disjoint people: the largest counts."""
    run = finished[0] / "run"
    policy, reward = statement(run), release_of(run / "reward_model")
    assert [s["stage"] for s in reward["stages"]] == ["sft", "reward_model"]
    assert [s["stage"] for s in policy["stages"]] == ["sft", "reward_model", "ppo"]
    assert policy["stages"][:2] == reward["stages"]
    for value in (policy, reward):
        alone = [recomputed([stage], value["delta"]) for stage in value["stages"]]
        assert value["epsilon"] == pytest.approx(max(alone), rel=1e-3) and value["epsilon"] <= 2
        assert [s["epsilon_alone"] for s in value["stages"]] == pytest.approx(alone, rel=1e-3)


def test_metrics_are_noised_and_no_text_leaves(finished):
    folder, out, err = finished
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = {line["stage"]: set(line["noised_metrics"]) for line in lines}
    assert metrics["reward_model"] == {"loss", "accuracy", "margin"} and len(lines) == 3 + 2 + 2
    outside = files_below(folder / "run", lambda path: path.parts[0] != "private")
    assert not [f for f in outside if b"evening" in f.read_bytes()] and "evening" not in out + err


def test_a_second_call_draws_nothing_and_changes_nothing(finished, capsys):
    folder = finished[0]
    assert {s: ledger_rows(folder, stage=s) for s in ("sft", "reward_model", "ppo")} == {
        "sft": 3,
        "reward_model": 2,
        "ppo": 2,
    }
    files = files_below(folder / "run" / "release") + files_below(folder / "run" / "reward_model")
    before = {f: f.read_bytes() for f in files if f.suffix == ".safetensors" or f.name == "reward.json"}
    again = call(capsys, "run", folder / "recipe.yaml", "--json")
    assert again.json["epsilon"] == json.loads(finished[1])["epsilon"]
    assert again.json["evaluation"] == json.loads(finished[1])["evaluation"]
    assert again.err.count("already done") == 3 and ledger_rows(folder) == 7
    assert len(before) == 3 and all(f.read_bytes() == content for f, content in before.items())


def test_other_pairs_are_refused(finished, capsys, tmp_path):
    folder = finished[0]
    data = write_jsonl(tmp_path / "pairs.jsonl", judged(41, start=100))
    refused = call(capsys, "run", folder / "recipe.yaml", "--reward_model_data.path", data)
    assert (
        "data of stage reward_model has changed" in refused.error or "settings of stage reward_model" in refused.error
    )
    assert ledger_rows(folder) == 7


# One name, one budget ----------------------------------------------------------------------------------------


def one_name(folder: Path, **changes: Any) -> Path:
    """A recipe in sequential composition: 40 people, with texts in one file and pairs in another."""
    write_jsonl(folder / "data.jsonl", reviews(40))
    pairs = write_jsonl(folder / "pairs.jsonl", judged(40))
    data = {"name": "people", "path": str(folder / "data.jsonl"), "unit": "id"}
    return write_recipe(
        folder, **{
            "composition": "sequential", "data": data, "reward_model_data": data | {"path": str(pairs)}, "reward_model": REWARD, "ppo": None,
        } | changes,
    )  # fmt: skip


def test_separate_names_that_share_people_are_an_error_that_counts_them(tmp_path, capsys):
    recipe = one_name(
        tmp_path, reward_model_data={"name": "judges", "path": str(tmp_path / "pairs.jsonl"), "unit": "id"}
    )
    for composition in ("parallel", "sequential"):
        error = call(capsys, "run", recipe, "--composition", composition).error
        assert "40 units are in both 'people' (sft) and 'judges' (reward_model)" in error
    assert ledger_rows(tmp_path) == 0


def test_one_name_in_sequential_composition_charges_both_stages(tmp_path, capsys):
    done = call(capsys, "run", one_name(tmp_path), "--json").json
    value = statement(tmp_path / "run")
    assert [s["stage"] for s in value["stages"]] == ["sft", "reward_model"] and {
        s["part"][1] for s in value["stages"]
    } == {1}
    together = recomputed(value["stages"], value["delta"])
    assert 1.95 < together <= 2.0005 and done["epsilon"] == pytest.approx(together, rel=2e-3) and done["epsilon"] <= 2
    alone = [recomputed([s], value["delta"]) for s in value["stages"]]
    assert max(alone) < 0.9 * together, "neither stage alone spends it"
    reward = release_of(tmp_path / "run" / "reward_model")
    assert reward["epsilon"] == pytest.approx(done["epsilon"], rel=1e-6)
    spent = call(capsys, "ledger", "--ledger", tmp_path / "ledger.sqlite", "--json").json["datasets"]
    assert [d["dataset"] for d in spent] == ["people"]
    assert spent[0]["epsilon_of_all_private_runs"] == pytest.approx(done["epsilon"], rel=2e-3)


def test_a_killed_sequential_run_ends_within_its_target(tmp_path, capsys, monkeypatch):
    """The reward stage loses a step; what it does after that leaves SFT what SFT has spent."""
    recipe = one_name(tmp_path, reward_model=REWARD | {"max_steps": 8, "save_steps": 2})
    step = Stage._step

    def dies(self, phase, positions, sample, number):
        if self.algorithm.name == "reward_model" and number == 5:
            raise KeyboardInterrupt
        return step(self, phase, positions, sample, number)

    monkeypatch.setattr(Stage, "_step", dies)
    assert call(capsys, "run", recipe, "--json").status == 130
    assert not (tmp_path / "run" / "reward_model").exists() and not (tmp_path / "run" / "release").exists()
    monkeypatch.setattr(Stage, "_step", step)
    done = call(capsys, "run", recipe, "--json")
    assert done.json["epsilon"] <= 2 and "1 drawn step" in done.err and "sft is already done" in done.err
    stages = statement(tmp_path / "run")["stages"]
    assert [sum(m["steps"] for m in s["mechanisms"]) for s in stages] == [3, 9]
    assert len(stages[1]["mechanisms"]) == 2 and 1.9 < recomputed(stages, done.json["delta"]) <= 2.0005


def test_a_single_stage_of_a_shared_budget_is_refused(tmp_path, capsys):
    assert "only `dpalign run` can divide" in call(capsys, "reward_model", one_name(tmp_path)).error


# Releases that enter a run -----------------------------------------------------------------------------------

NOISY = {
    "target_epsilon": 100,
    "sft": {"noise_multiplier": 2, "max_steps": 2},
    "reward_model": REWARD | {"noise_multiplier": 2},
}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """The folder of a finished run of SFT and a reward model on the same people."""
    folder = tmp_path_factory.mktemp("reward")
    status, _, err = in_fresh_process(folder, "run", one_name(folder, **NOISY), "--json")
    assert status == 0, err
    return folder


def test_ppo_against_an_earlier_reward_model_composes_its_stages(reward_model, tmp_path, capsys):
    """Same people: all three stages add up, and the SFT stage below both releases counts once."""
    run = reward_model / "run"
    source = {"reward": {"source": f"reward_model:{run / 'reward_model'}"}, "max_steps": 2, "noise_multiplier": 2}
    changes = NOISY | {
        "sft": None,
        "reward_model": None,
        "reward_model_data": None,
        "ppo": source,
        "composition": "parallel",
    }
    recipe = one_name(
        tmp_path, **changes, ledger=str(reward_model / "ledger.sqlite"), model={"name_or_path": str(run / "release")}
    )
    done = call(capsys, "run", recipe, "--json").json
    value = statement(tmp_path / "run")
    assert [s["stage"] for s in value["stages"]] == ["sft", "reward_model", "ppo"]
    together = recomputed(value["stages"], value["delta"])
    assert done["epsilon"] == value["epsilon"] == pytest.approx(together, rel=2e-3)
    assert together > 1.1 * recomputed(value["stages"][:2], value["delta"])
    # The reward model alone, on the public base: its own past still counts.
    base = call(
        capsys, "run", recipe, "--model.name_or_path", "tiny-review-lm", "--output_dir", tmp_path / "b", "--json"
    ).json
    assert [s["stage"] for s in base["stages"]] == ["sft", "reward_model", "ppo"] and base["epsilon"] == done["epsilon"]


def test_a_budget_that_the_reward_models_past_exceeds_is_refused(reward_model, tmp_path, capsys):
    past = release_of(reward_model / "run" / "reward_model")["epsilon"]
    source = {"reward": {"source": f"reward_model:{reward_model / 'run' / 'reward_model'}"}, "noise_multiplier": 50}
    changes = NOISY | {
        "sft": None,
        "reward_model": None,
        "reward_model_data": None,
        "ppo": source,
        "composition": "parallel",
    }
    recipe = one_name(tmp_path, **changes, ledger=str(reward_model / "ledger.sqlite"))
    draws = ledger_rows(reward_model)
    refused = call(capsys, "run", recipe, "--target_epsilon", past)
    assert "all stages together would spend epsilon" in refused.error and ledger_rows(reward_model) == draws


def test_a_reward_model_made_without_privacy_is_refused(tmp_path, capsys):
    loose = {
        "sft": None,
        "reward_model": REWARD | {"max_steps": 1},
        "target_epsilon": "inf",
        "output_dir": str(tmp_path / "loose"),
    }
    assert call(capsys, "reward_model", one_name(tmp_path, **loose), "--json").json["private"] is False
    released = tmp_path / "loose" / "reward_model"
    assert release_of(released)["private"] is False and "NOT PRIVATE" in (released / "README.md").read_text()
    source = {"reward": {"source": f"reward_model:{released}"}, "max_steps": 1}
    recipe = one_name(tmp_path, sft=None, reward_model=None, reward_model_data=None, ppo=source)
    draws = ledger_rows(tmp_path)
    for declared in ("false", "true"):
        refused = call(capsys, "run", recipe, "--ppo.reward.is_public", declared)
        assert "was trained without privacy" in refused.error
    assert ledger_rows(tmp_path) == draws
    further = one_name(
        tmp_path, sft=None, reward_model=REWARD | {"model": {"name_or_path": str(released), "is_public": True}}
    )
    assert "was trained without privacy" in call(capsys, "run", further).error


def test_dpalign_reward_and_rloo_alone(tmp_path, capsys):
    """`dpalign reward_model` takes the pairs' part of the recipe, `dpalign rloo` the prompts'; an evaluation closes the run."""
    sections = write_data(tmp_path)
    recipe = write_recipe(tmp_path, sft=None, ppo=None, reward_model=REWARD, **sections)
    reward = call(capsys, "reward_model", recipe, "--output_dir", tmp_path / "a", "--json").json
    assert [s["stage"] for s in reward["stages"]] == ["reward_model"] and reward["release"].endswith("a/reward_model")
    assert not (tmp_path / "a" / "release").exists()
    rollouts = STAGE | {
        "max_steps": 2, "prompt_max_tokens": 4, "max_prompt_length": 5, "max_completion_length": 6, "num_generations": 2,
        "reward": {"source": f"reward_model:{tmp_path / 'a' / 'reward_model'}"},
    }  # fmt: skip
    held_out = {"name": "held-out", "path": str(write_jsonl(tmp_path / "h.jsonl", reviews(100)[80:])), "unit": "id"}
    recipe = write_recipe(
        tmp_path, sft=None, ppo=None, rloo=rollouts, measurement={"noise_multiplier": 2.0}, measurement_data=held_out,
        units_disjoint="declared", output_dir=str(tmp_path / "b"), **sections | {"sft_data": None, "reward_model_data": None, "ppo_data": None, "rloo_data": sections["ppo_data"]},
    )  # fmt: skip
    done = call(capsys, "run", recipe, "--json").json
    assert [s["stage"] for s in done["stages"]] == ["reward_model", "rloo", "measurement"] and done["epsilon"] <= 2
    assert any("disjoint (declared)" in a for a in done["assumptions"])
    measured = done["measurement"]
    assert measured["units"] == 20 and measured["noise_standard_deviation"]["win_rate"] == pytest.approx(
        2 * 3**0.5 / 20 / 2
    )
    again = call(capsys, "run", recipe, "--json").json
    assert again["measurement"] == measured and ledger_rows(tmp_path, stage="measurement") == 1
