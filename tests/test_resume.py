"""`kill -9`, roll-backs, other data: the same command goes on, and epsilon never falls below the draws made."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from dpalign.algorithms import SFT, SFTConfig
from dpalign.errors import DPAlignError
from dpalign.privacy.accountant import epsilon
from dpalign.privacy.ledger import Ledger
from dpalign.training import Stage
from dpalign.training.loop import hash_of
from helpers import call, in_fresh_process, ledger_rows, reviews, start, statement, write_jsonl, write_recipe
from tiny import dataset, tiny_policy, words

STEPS, SAVED = 14, 5
LONG = {"sft": {"max_steps": STEPS, "save_steps": SAVED}, "ppo": {"max_steps": STEPS, "save_steps": SAVED}}


def kill_after(folder: Path, steps: int) -> None:
    """Starts the recipe in a fresh process and kills it once metrics.jsonl has `steps` lines."""
    log = folder / "run" / "metrics.jsonl"
    process = start(folder, "run", folder / "recipe.yaml", "--json")
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < steps:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "run" / "release").exists() and not (folder / "run" / "summary.json").exists()


def spent(capsys, folder: Path) -> float:
    """Epsilon of all runs in the ledger of `folder`."""
    datasets = call(capsys, "ledger", "--ledger", folder / "ledger.sqlite", "--json").json["datasets"]
    return datasets[0]["epsilon_of_all_private_runs"]


@pytest.fixture(scope="module")
def killed_in_sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_recipe(folder, **LONG)
    kill_after(folder, 6)
    return folder


@pytest.fixture
def fork(killed_in_sft, tmp_path):
    """A copy of the run killed in SFT, with its own ledger."""
    shutil.copytree(killed_in_sft, tmp_path, dirs_exist_ok=True)
    write_recipe(tmp_path, **LONG)
    return tmp_path


@pytest.fixture(scope="module")
def finished(killed_in_sft, tmp_path_factory):
    """The run killed in SFT, resumed, killed in PPO, resumed to its end: folder, standard output and error."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(killed_in_sft, folder, dirs_exist_ok=True)
    write_recipe(folder, **LONG)
    log = folder / "run" / "metrics.jsonl"
    lines = log.read_text().count("\n")
    kill_after(folder, lines + STEPS - SAVED + 6)  # the rest of SFT, then 6 steps of PPO
    assert json.loads(log.read_text().splitlines()[-1])["stage"] == "ppo"
    status, out, err = in_fresh_process(folder, "run", folder / "recipe.yaml", "--json")
    assert status == 0, err
    return folder, out, err


def test_a_run_killed_in_both_stages_finishes_within_its_target(finished):
    folder, out, err = finished
    summary, value = json.loads(out), statement(folder / "run")
    assert value["epsilon"] == summary["epsilon"] <= 2
    assert all(s["epsilon_alone"] <= 2 for s in value["stages"])
    assert "stage sft is already done" in err and "stage ppo resumes after step 5 of 14" in err


def test_every_attempt_is_counted(finished):
    folder, _, err = finished
    for stage in statement(folder / "run")["stages"]:
        name = stage["stage"]
        rows, first = ledger_rows(folder, stage=name), ledger_rows(folder, stage=name, attempt=0)
        # 5 steps were saved before the crash; at least 1 more had been drawn, and all are drawn again.
        assert first >= 6 and ledger_rows(folder, stage=name, attempt=1) == STEPS - SAVED
        assert rows == first + STEPS - SAVED > STEPS
        assert sum(m["steps"] for m in stage["mechanisms"]) == rows
        before, after = (m["noise_multiplier"] for m in stage["mechanisms"])
        assert after > before  # what was lost stays spent: the rest is noisier
    assert f"{ledger_rows(folder, stage='ppo', attempt=0) - SAVED} drawn steps were lost" in err


def test_a_finished_run_is_not_run_again(finished, capsys):
    folder = finished[0]
    rows = ledger_rows(folder)
    assert call(capsys, "run", folder / "recipe.yaml", "--json").json["epsilon"] == json.loads(finished[1])["epsilon"]
    assert ledger_rows(folder) == rows


CHANGES = {
    "one more": lambda rows: [*rows, *reviews(65)[64:]],
    "one less": lambda rows: rows[1:],
    "one changed": lambda rows: [rows[0] | {"text": "Another evening."}, *rows[1:]],
    "all changed": lambda rows: [r | {"text": f"Another {r['text']}"} for r in rows],
}


@pytest.mark.parametrize(
    ("state", "change"),
    [("fork", "one more"), ("fork", "one less"), ("fork", "all changed"), ("finished", "one changed")],
)
def test_other_rows_are_refused(state, change, request, capsys, tmp_path):
    folder = request.getfixturevalue(state)
    folder = folder[0] if state == "finished" else folder
    rows = ledger_rows(folder)
    data = write_jsonl(tmp_path / "changed.jsonl", CHANGES[change](reviews(64)))
    refused = call(capsys, "run", folder / "recipe.yaml", "--data.path", data)
    assert "has changed since this run began" in refused.error
    assert "evening" not in refused.err and ledger_rows(folder) == rows


def test_the_same_rows_in_another_order_are_the_same_data(finished, capsys, tmp_path):
    data = write_jsonl(tmp_path / "reversed.jsonl", reviews(64)[::-1])
    again = call(capsys, "run", finished[0] / "recipe.yaml", "--data.path", data, "--json")
    assert again.json["epsilon"] == json.loads(finished[1])["epsilon"]


@pytest.mark.parametrize(
    "change", [("--sft.learning_rate", 0.5), ("--sft.max_steps", 15), ("--target_epsilon", 3)], ids=str
)
def test_other_settings_are_refused(change, fork, capsys):
    rows = ledger_rows(fork)
    assert "settings of stage sft have changed" in call(capsys, "run", fork / "recipe.yaml", *change).error
    assert ledger_rows(fork) == rows


@pytest.mark.parametrize(
    "change",
    [
        ("--sft.micro_batch_size", 3, "--ppo.micro_batch_size", 5, "--num_threads", 1),
        ("--sft.gradient_checkpointing", "true", "--sft.save_steps", 2, "--sft.logging_steps", 3),
    ],
    ids=str,
)
def test_a_run_goes_on_on_a_smaller_machine(change, fork, capsys):
    """What costs memory or time only is no other setting: nothing that is released depends on it."""
    done = call(capsys, "run", fork / "recipe.yaml", *change, "--json")
    assert done.json["epsilon"] <= 2 and "stage sft resumes after step 5 of 14" in done.err
    assert ledger_rows(fork, stage="sft", attempt=1) == STEPS - SAVED


def test_a_run_of_the_version_before_goes_on_with_the_same_settings(tmp_path, capsys, monkeypatch):
    """Version 0.1.0 hashed the settings of memory and time too."""
    recipe = write_recipe(tmp_path, ppo=None)
    with monkeypatch.context() as before:
        before.setattr("dpalign.training.loop.MACHINE_SETTINGS", frozenset())
        first = call(capsys, "run", recipe, "--json").json
    again = call(capsys, "run", recipe, "--json")
    assert "stage sft is already done" in again.err and again.json["epsilon"] == first["epsilon"]
    assert "settings of stage sft have changed" in call(capsys, "run", recipe, "--sft.micro_batch_size", 4).error


def test_a_setting_that_came_later_does_not_change_the_hash_of_a_run_without_it():
    new = {"beta": 0.1, "reward": {"source": "vader", "batched": False}}
    assert hash_of(new) == hash_of({"beta": 0.1, "reward": {"source": "vader"}})
    assert hash_of(new) != hash_of({"beta": 0.1, "reward": {"source": "vader", "batched": True}})


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_corrupt_checkpoint_is_one_sentence_and_its_loss_a_roll_back(file, fork, capsys):
    rows, epsilon = ledger_rows(fork), spent(capsys, fork)
    newest = sorted((fork / "run" / "private" / "sft").glob("step-*"))[-1]
    damaged = bytearray((newest / file).read_bytes())
    for place in range(len(damaged) // 2, len(damaged) // 2 + 8):
        damaged[place] ^= 0xFF
    (newest / file).write_bytes(damaged)
    refused = call(capsys, "run", fork / "recipe.yaml", "--json")
    assert f"checkpoint {newest} is corrupt: delete that folder" in refused.error
    assert ledger_rows(fork) == rows and not (fork / "run" / "release").exists()
    shutil.rmtree(newest)
    assert spent(capsys, fork) == epsilon
    done = call(capsys, "run", fork / "recipe.yaml", "--json")
    assert done.json["epsilon"] <= 2 and spent(capsys, fork) >= epsilon
    assert ledger_rows(fork, stage="sft", attempt=1) == STEPS  # there was no older checkpoint: from the start
    assert ledger_rows(fork, stage="sft") == rows + STEPS


def test_rolling_back_never_gives_budget_back(finished, capsys, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    recipe = write_recipe(tmp_path, **LONG)
    rows, epsilon = ledger_rows(tmp_path), spent(capsys, tmp_path)
    private = tmp_path / "run" / "private" / "ppo"
    shutil.rmtree(private / "final")
    shutil.rmtree(sorted(private.glob("step-*"))[-1])
    again = call(capsys, "run", recipe, "--json")
    # All draws stay spent. What is left would drown the 4 lost steps in noise, so they are dropped.
    assert "stage ppo resumes after step 10 of 14" in again.err
    assert "0 of the remaining 4 steps run" in again.err and ledger_rows(tmp_path) == rows
    assert epsilon == spent(capsys, tmp_path) <= 2 and again.json["epsilon"] == json.loads(finished[1])["epsilon"]
    # A new folder is a new run: it may spend again, and the ledger adds it.
    shutil.rmtree(tmp_path / "run")
    assert call(capsys, "run", recipe, "--json").json["ledger"][0]["epsilon_of_all_private_runs"] > 1.2 * epsilon


class CrashAtTheEnd(Stage):
    """Dies when the last step is drawn, released and not yet saved."""

    def _save(self, step: int, where: str) -> None:
        if step == self.plan.steps and where == ".":
            raise KeyboardInterrupt
        super()._save(step, where)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_crash_in_the_last_step_leaves_a_run_that_can_end(steps, tmp_path):
    """Hardly any budget is left for the lost step: it is dropped, not drowned in noise."""
    ledger, told = Ledger(tmp_path / "ledger.sqlite"), []
    data = dataset([[{"id": f"r{i}", "text": words(6, i)}] for i in range(40)])

    def stage(kind: type[Stage]) -> Stage:
        config = SFTConfig(
            target_epsilon=4.0, target_delta=1e-5, expected_batch_size=8, max_steps=steps, max_length=8,
        )  # fmt: skip
        return kind(
            tiny_policy("llama"), SFT(config), data, folder=tmp_path / "sft", run="run", ledger=ledger, tell=told.append
        )

    with pytest.raises(KeyboardInterrupt):
        stage(CrashAtTheEnd).train()
    resumed = stage(Stage)
    if steps == 1:
        with pytest.raises(DPAlignError, match="before its first checkpoint"):
            resumed.train()
        return
    resumed.train()
    assert resumed.is_finished and resumed.end == steps - 1
    assert len(ledger.intents()) == steps
    assert epsilon([s.mechanism for s in ledger.spendings()], 1e-5) <= 4.0
    assert any("stay spent: 0 of the remaining 1 steps" in message for message in told)
