"""What a run rests on: its models stay the ones it began with, and stay in its statement."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
from safetensors.torch import load_file, save_file

from dpalign.algorithms import SFT, SFTConfig
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig
from dpalign.privacy.accountant import SampledGaussian, epsilon
from dpalign.privacy.ledger import Intent, Ledger
from dpalign.privacy.statement import StageStatement, account, epsilon_of, merge_stages, read_statement
from dpalign.provenance import Origin
from dpalign.reporting.numbers import at_most
from dpalign.training import OwnTextStage, Stage
from dpalign.workspace import Workspace, same_origins
from helpers import call, ledger_rows, reviews, small_model, statement, write_jsonl, write_recipe
from tiny import dataset, tiny_policy, words

FAST = {"target_epsilon": 100, "sft": {"noise_multiplier": 2, "max_steps": 2}, "ppo": {"noise_multiplier": 2}}
ORIGIN = Origin("old", (), ())
SPENT = StageStatement(
    stage="sft", dataset="d", part=(0.0, 1.0), split="s", unit="record", declared_units=9.0, max_grad_norm=1.0,
    epsilon_alone=1.0, private=True, id="a",
    mechanisms=[SampledGaussian(0.5, 2.0, 3)],
)  # fmt: skip
INTENT = Intent(
    dataset="d", run="run", stage="sft", step=0, attempt=0, split="s", low=0.0, high=1.0, sampling_rate=0.5,
    noise_multiplier=2.0, metrics_noise_multiplier=20.0, passes=1, max_grad_norm=1.0, unit="record", units=9.0,
    fingerprint="f", config_hash="c", private=True,
)  # fmt: skip


@pytest.fixture
def two(tmp_path, capsys):
    """PPO on the release of SFT, in a folder of its own: the recipe, and the folders of both runs."""
    recipe = write_recipe(tmp_path, split=None, **FAST | {"ppo": None})
    call(capsys, "sft", recipe, "--output_dir", tmp_path / "one")
    recipe = write_recipe(tmp_path, split=None, **FAST | {"sft": None})
    run = ("ppo", recipe, "--output_dir", tmp_path / "two", "--json")
    call(capsys, *run, "--model.name_or_path", tmp_path / "one" / "release")
    return tmp_path, run


@pytest.mark.parametrize("number", [math.inf, math.nan, "9", None])
@pytest.mark.parametrize("name", ["declared_units", "max_grad_norm"])
def test_a_stage_with_what_is_no_number_cannot_be_added_up(name, number):
    assert SPENT.is_whole and not replace(SPENT, **{name: number}).is_whole


def test_a_run_cannot_forget_the_release_that_it_began_from(two, capsys):
    folder, run = two
    before, drawn = statement(folder / "two"), ledger_rows(folder)
    assert [s["stage"] for s in before["stages"]] == ["sft", "ppo"]
    refused = call(capsys, *run).error
    assert "models of the run" in refused and f"one/release' and is now '{small_model()}'" in refused
    assert statement(folder / "two") == before and ledger_rows(folder) == drawn
    again = call(capsys, *run, "--model.name_or_path", folder / "one" / "release").json
    assert again["epsilon"] == before["epsilon"] > 1.2 * max(s["epsilon_alone"] for s in before["stages"])


def test_the_forgotten_release_is_what_the_refusal_saves_from(two, capsys, monkeypatch):
    """Mutant: the models of the latest call are believed, and the statement shrinks."""
    folder, run = two
    before = statement(folder / "two")["epsilon"]
    monkeypatch.setattr("dpalign.workspace.same_origins", lambda private, origins, drawn: origins)
    assert call(capsys, *run).json["epsilon"] < before / 1.2


def test_a_damaged_statement_is_one_sentence(two, capsys):
    folder, run = two
    (folder / "one" / "release" / "privacy.json").write_text('{"private": true, "epsilon": 1, "assumptions": []}')
    refused = call(capsys, *run, "--model.name_or_path", folder / "one" / "release").error
    assert "not a privacy statement: copy the release again" in refused


def test_stages_with_budgets_of_their_own_run_one_by_one_and_together(tmp_path, capsys):
    """Overlapping ranges in a parallel recipe: what another stage is about to spend is no change of this one's settings."""
    own = {"target_epsilon": 0.5}
    recipe = write_recipe(tmp_path, split={"sft": [0.0, 0.6], "ppo": [0.4, 1.0]}, sft=own, ppo=own)
    call(capsys, "sft", recipe, "--json")
    together = call(capsys, "run", recipe, "--json")
    assert "stage sft is already done" in together.err and together.json["epsilon"] <= 2
    assert together.json["epsilon"] > max(s["epsilon"] for s in together.json["stages"])  # the middle meets both


def test_the_log_says_whether_the_run_so_far_is_private(tmp_path, capsys):
    recipe = write_recipe(tmp_path, ppo={"target_epsilon": 2})
    call(capsys, "run", recipe, "--target_epsilon", "inf")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"sft", "ppo"} and not any(line["private"] for line in lines)


class Stale(Stage):
    """Mutant: what the accountant said last is shown until it is asked again."""

    def epsilon_spent(self, ahead: int = 0, sigma: float = 0.0) -> float:
        return super().epsilon_spent()


@pytest.mark.parametrize("kind", [Stage, Stale])
def test_no_line_of_the_log_is_behind_what_was_spent(kind, tmp_path):
    """The accountant is asked at every third step; in between its answer has to cover the steps until then."""
    steps = 300
    config = SFTConfig(
        noise_multiplier=2.0, target_delta=1e-5, expected_batch_size=4, max_steps=steps, max_length=4, save_steps=steps,
        adapter=AdapterConfig(r=1),
    )  # fmt: skip
    data = dataset([[{"id": f"r{i}", "text": words(4, i)}] for i in range(8)])
    ledger, log = Ledger(":memory:"), tmp_path / "metrics.jsonl"
    stage = kind(tiny_policy("llama"), SFT(config), data, folder=tmp_path / "sft", run="run", ledger=ledger, log=log)
    stage.train()
    shown = {line["step"]: line["epsilon_of_stage"] for line in map(json.loads, log.read_text().splitlines())}
    spent = {n: epsilon([stage.plan.mechanism(n)], 1e-5, quick=True) for n in (1, 2, 4, 5, 149, steps)}
    behind = [n for n, value in spent.items() if shown[n] < value - 1e-6]
    assert bool(behind) == (kind is Stale)
    assert shown[steps] == pytest.approx(spent[steps], rel=1e-6)


def test_a_release_that_spent_more_since_is_another_model(two, capsys):
    folder, run = two
    file = folder / "one" / "release" / "privacy.json"
    value = json.loads(file.read_text())
    value["stages"][0]["mechanisms"][0]["steps"] += 1
    file.write_text(json.dumps(value))
    refused = call(capsys, *run, "--model.name_or_path", folder / "one" / "release").error
    assert "itself has changed" in refused


def test_a_model_that_the_recipe_dropped_stays_in_the_statement(tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "run.json").write_text('{"run": "r", "ledger": "l"}')
    began = {"model": ORIGIN, "ppo.reward": Origin("rewards", (SPENT,), ("assumed",))}
    assert same_origins(private, began, []) == began
    Workspace(tmp_path, Ledger(":memory:"), "r").remember(began)
    assert same_origins(private, {"model": replace(ORIGIN, name="new")}, [])["model"].name == "new"  # nothing drawn
    later = same_origins(private, {"model": ORIGIN}, [INTENT])
    assert later["ppo.reward"].stages[0].spendings() == SPENT.spendings()
    with pytest.raises(DPAlignError, match="'old' and is now 'new'"):
        same_origins(private, {"model": replace(ORIGIN, name="new")}, [INTENT])
    (private / "ppo" / "step-00000000").mkdir(parents=True)  # what was learned without a draw rests on it too
    with pytest.raises(DPAlignError, match="is now"):
        same_origins(private, {"model": replace(ORIGIN, name="new")}, [])


def test_updates_without_a_draw_belong_to_their_settings_and_model(tmp_path, capsys, monkeypatch):
    """A run that was stopped within its free updates has checkpoints and no intent."""
    own = {"prompts": "self_written", "expected_batch_size": 8}
    recipe = write_recipe(tmp_path, sft=None, ppo=own)
    save = OwnTextStage._save

    def stops(self, step, where):
        save(self, step, where)
        raise DPAlignError("stopped.")

    with monkeypatch.context() as patch:
        patch.setattr(OwnTextStage, "_save", stops)
        assert "stopped" in call(capsys, "run", recipe).error
    assert not (tmp_path / "ledger.sqlite").exists() or ledger_rows(tmp_path) == 0
    assert list((tmp_path / "run" / "private" / "ppo").glob("step-00000001"))
    assert "settings of stage ppo have changed" in call(capsys, "run", recipe, "--ppo.beta", 0.5).error
    other = call(capsys, "sft", write_recipe(tmp_path, ppo=None, output_dir=str(tmp_path / "other")), "--json").json
    recipe = write_recipe(tmp_path, sft=None, ppo=own)
    drawn = ledger_rows(tmp_path)
    refused = call(capsys, "run", recipe, "--model.name_or_path", other["release"], "--target_epsilon", 9).error
    assert "models of the run" in refused and ledger_rows(tmp_path) == drawn
    done = call(capsys, "run", recipe, "--json").json
    assert "stage ppo read prompts that the model wrote itself; it drew nothing" in done["assumptions"]


def test_what_is_declared_is_in_the_statement(tmp_path, capsys):
    reward = {"source": "mine:score", "is_public": True, "low": 0, "high": 1}
    recipe = write_recipe(tmp_path, sft=None, ppo={"max_steps": 1, "reward": reward})
    found = call(capsys, "plan", recipe, "--no_data", "--json").json["assumptions"]
    assert any("scores each row by itself (declared)" in a and "mine:score" in a for a in found)


# The ledger ----------------------------------------------------------------------------------------------------


def test_a_copy_of_a_run_cannot_go_on_once_another_has(tmp_path):
    """Copies begin with attempts of their own: the older one is stopped at its next draw, and may not even start."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.write([INTENT])
    ledger.write([replace(INTENT, step=1)])
    ledger.write([replace(INTENT, step=1, attempt=1)])  # the copy resumed
    with pytest.raises(DPAlignError, match="only one copy"):
        ledger.write([replace(INTENT, step=2)])
    ledger.write([replace(INTENT, step=2, attempt=1), replace(INTENT, step=3, attempt=1)])
    ledger.write([replace(INTENT, step=2, stage="ppo"), replace(INTENT, step=2, run="another")])
    assert len(ledger.intents()) == 7


def copied(folder, name):
    """A copy of a run's folder with its ledger and recipe, as `cp -r` makes one; the recipe's arguments for it."""
    shutil.copytree(folder / "here", folder / name)
    where = folder / name
    return ("run", where / "recipe.yaml", "--output_dir", where / "run", "--ledger", where / "ledger.sqlite")


def stages_of(folder):
    return read_statement(folder / "run" / "release")[1]


def steps_in(stages):
    return sum(m.steps for stage in stages for m in stage.mechanisms)


@pytest.mark.parametrize("stopped_at", [0, 2])
def test_what_two_copies_of_a_folder_draw_adds_up(stopped_at, tmp_path, capsys, monkeypatch):
    """Folder and ledger are copied before the stage begins, or in its midst; both copies go on to the end."""
    here = tmp_path / "here"
    here.mkdir()
    sft = {"max_steps": 4, "save_steps": 1, "noise_multiplier": 2}
    recipe = write_recipe(here, split=None, target_epsilon=100, sft=sft, ppo=None)
    step = Stage._step

    def dies(self, rows, positions, sample, number):
        if number == stopped_at:
            raise KeyboardInterrupt
        return step(self, rows, positions, sample, number)

    monkeypatch.setattr(Stage, "_step", dies)
    assert call(capsys, "run", recipe).status == 130
    lost = ledger_rows(here)
    assert lost == stopped_at + 1
    monkeypatch.setattr(Stage, "_step", step)
    for name in "ab":
        call(capsys, *copied(tmp_path, name))
    a, b = stages_of(tmp_path / "a"), stages_of(tmp_path / "b")
    rest = 4 - stopped_at
    assert steps_in(a) == steps_in(b) == lost + rest
    together = merge_stages([*a, *b])
    assert steps_in(together) == lost + 2 * rest  # what was drawn before the copy is drawn once
    assert steps_in(merge_stages([*b, *a, *a, *together])) == steps_in(together)
    intents = {name: Ledger(tmp_path / name / "ledger.sqlite").intents() for name in "ab"}
    truth = epsilon([i.mechanism for i in [*intents["a"], *(i for i in intents["b"] if i.attempt == 1)]], 1e-5)
    assert epsilon_of(together, 1e-5) == pytest.approx(truth, rel=1e-3) and truth > 1.02 * epsilon_of(a, 1e-5)
    assert not {s.id for s in a} & {s.id for s in b}  # older readers add them up
    again = call(capsys, "run", tmp_path / "a" / "recipe.yaml", "--output_dir", tmp_path / "a" / "run",
                 "--ledger", tmp_path / "a" / "ledger.sqlite")  # fmt: skip
    assert again.status == 0 and stages_of(tmp_path / "a") == a


def test_an_attempt_that_another_copy_began_is_never_taken_for_a_known_one():
    """One ledger, two folders: what the other folder's process drew has no name here, and is counted whenever stated."""
    known = replace(SPENT, attempts={"a1": [2]})
    assert steps_in(merge_stages([known, known])) == 2 + 1 + 1
    assert steps_in(merge_stages([replace(SPENT, attempts={"a1": [3]})] * 2)) == 3
    assert steps_in(merge_stages([SPENT, SPENT])) == 3  # of an older release: by its id
    assert steps_in(merge_stages([replace(SPENT, id="")] * 2)) == 6


@pytest.mark.parametrize("attempts", [{"a": [4]}, {"a": [-1], "b": [1]}, {"a": [1, 1]}, {"unnamed 0": [3]}, {"a": 3}])
def test_attempts_that_cannot_be_are_no_statement(attempts, tmp_path):
    value = {"private": True, "epsilon": 1, "assumptions": [], "stages": [asdict(replace(SPENT, attempts=attempts))]}
    (tmp_path / "privacy.json").write_text(json.dumps(value))
    with pytest.raises(DPAlignError, match="not a privacy statement"):
        read_statement(tmp_path)


@pytest.mark.parametrize("where", ["noise_multiplier", "sampling_rate", "epsilon", "declared_units"])
@pytest.mark.parametrize("number", ["inf", 10**400, 1e-200])
def test_numbers_that_no_arithmetic_holds_are_no_statement(where, number, tmp_path):
    value = {"private": True, "epsilon": 1, "assumptions": [], "stages": [asdict(SPENT)]}
    stated = value["stages"][0]
    of = {"epsilon": value, "declared_units": stated}.get(where, stated["mechanisms"][0])
    of[where] = number
    (tmp_path / "privacy.json").write_text(json.dumps(value))
    if (where, number) in (("epsilon", "inf"), ("epsilon", 1e-200), ("declared_units", 1e-200), ("sampling_rate", 1e-200)):
        return  # these are numbers
    with pytest.raises(DPAlignError, match="not a privacy statement"):
        read_statement(tmp_path)


def test_runs_that_protect_different_units_have_no_epsilon_together(tmp_path, capsys):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.secret("d")
    ledger.write([INTENT])
    entry = account(ledger, "d", 1e-5)
    assert 0 < entry["epsilon_of_all_private_runs"] < 10 and entry["unit_kinds"] == ["record"]
    ledger.write([replace(INTENT, run="b", unit="customer")])
    entry = account(ledger, "d", 1e-5)
    assert entry["epsilon_of_all_private_runs"] == float("inf") and entry["unit_kinds"] == ["customer", "record"]
    ledger.close()
    shown = call(capsys, "ledger", "--ledger", tmp_path / "ledger.sqlite")
    assert "they protect different units (customer, record)" in " ".join(shown.out.split())


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (3.9971, 2, "4.00"),
        (3.9971, 3, "3.998"),
        (2.3, 1, "2.3"),
        (4, 3, "4.000"),
        (float("inf"), 2, "inf"),
        (0, 2, "0.00"),
    ],
)
def test_no_text_rounds_epsilon_down(value, digits, text):
    assert at_most(value, digits) == text


# Held-out units ------------------------------------------------------------------------------------------------


def test_a_private_measurement_states_what_it_and_the_model_spent(two, capsys):
    folder, _ = two
    data = write_jsonl(folder / "held_out.jsonl", reviews(40, "noon"))
    ask = ("evaluate", folder / "one" / "release", "--private", "--data", data, "--prompt_tokens", 4, "--prepend_bos")
    ask += ("--max_prompt_length", 5, "--max_completion_length", 6, "--ledger", folder / "ledger.sqlite", "--json")
    apart = (*ask, "--dataset_name", "apart", "--output_dir", folder / "apart")
    assert "without noise" in call(capsys, *apart, "--noise_multiplier", 0).error
    assert "without noise" in call(capsys, *apart, "--epsilon", "inf").error
    found = call(capsys, *apart, "--epsilon", 2).json
    sft = statement(folder / "one")["epsilon"]
    assert found["epsilon"] <= 2 and found["epsilon_with_the_models"] == pytest.approx(max(found["epsilon"], sft))
    assert any("'apart', 'reviews' are disjoint" in a for a in found["assumptions"])
    again = (*ask, "--dataset_name", "reviews", "--output_dir", folder / "same", "--epsilon", 2)
    assert "40 of the 40 records of 'reviews'" in call(capsys, *again).error  # they are 'apart' already
    others = write_jsonl(folder / "others.jsonl", reviews(40, "dusk"))
    same = call(capsys, *again, "--data", others).json
    assert same["epsilon_with_the_models"] > 1.01 * max(same["epsilon"], sft)  # the units have paid for SFT too
    # The folder belongs to this model: with other weights at its place it is another measurement.
    assert call(capsys, *apart, "--epsilon", 2).json == found
    weights = folder / "one" / "release" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    assert "have changed since it was measured" in call(capsys, *apart, "--epsilon", 2).error
    (folder / "one" / "release" / "privacy.json").unlink()
    assert "must be declared public" in call(capsys, *apart, "--epsilon", 2).error
