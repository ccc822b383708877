"""With an `insecure_seed`, every stage still takes the steps it took when trajectories.json was written."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpalign import run
from dpalign.privacy import accountant
from dpalign.privacy.ledger import Ledger
from helpers import call, judged, merged, reviews, settings, write_jsonl, write_recipe

COMMITTED = Path(__file__).with_name("trajectories.json")
TOLERANCE = 1e-4  # float32, and other CPUs add up in another order; on one CPU they agree to 1e-6
STEPS = 3
# Little noise, so that a change of the gradients is not lost in it.
SEEDED = {
    "expected_batch_size": 8, "max_steps": STEPS, "insecure_seed": 7, "noise_multiplier": 0.1, "prepend_bos": True,
    "adapter": {"r": 2},
}  # fmt: skip
ROLLOUTS = {
    "learning_rate": 3e-3,
    "prompt_max_tokens": 4,
    "max_prompt_length": 5,
    "max_completion_length": 6,
    "beta": 0.05,
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": SEEDED | {"learning_rate": 3e-4, "max_length": 16},
    "reward_model": SEEDED | {"learning_rate": 2e-4, "max_length": 20},
    "ppo": SEEDED | ROLLOUTS,
    # With 7 one token of a completion falls on a boundary: which one comes depends on how a CPU rounds.
    "rloo": SEEDED | ROLLOUTS | {"insecure_seed": 8},
    "grpo": SEEDED | ROLLOUTS | {"num_iterations": 2},
}
SMALL, RECOMPUTED = {"micro_batch_size": 3}, {"gradient_checkpointing": True}
# Command, stage and settings that may cost other memory or time, but must not lead anywhere else.
AGREEING: list[tuple[str, str, dict[str, Any]]] = [
    ("sft", "sft", {}), ("sft", "sft", SMALL), ("sft", "sft", RECOMPUTED),
    ("reward_model", "reward_model", {}), ("reward_model", "reward_model", SMALL), ("reward_model", "reward_model", RECOMPUTED),
    ("ppo", "ppo", {}), ("ppo", "ppo", SMALL), ("run", "ppo", {}),
    ("rloo", "rloo", {}), ("rloo", "rloo", SMALL),
    ("grpo", "grpo", {}), ("grpo", "grpo", SMALL),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _only_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With so little noise the accountant takes seconds, and so does a reward's scale: no step depends on them."""
    monkeypatch.setattr(run, "NORMALIZATION_ROWS", 16)
    monkeypatch.setattr(accountant, "_epsilon", lambda steps, delta, interval: 1.0)
    monkeypatch.setattr(accountant, "_true_positives", lambda steps, interval, false_positives: false_positives)


def fix_secret(path: Path, dataset: str) -> None:
    """A new ledger in which the dataset's secret, and so the order of its units, is always the same."""
    Ledger(path).close()
    database = sqlite3.connect(path)
    database.execute("INSERT INTO datasets (name, secret) VALUES (?, ?)", (dataset, bytes(range(32))))
    database.commit()
    database.close()


def trajectory(
    capsys: pytest.CaptureFixture[str], folder: Path, command: str, stage: str, changes: dict[str, Any]
) -> dict[str, Any]:
    """The noised metrics of every step, and the norm of every released tensor, of `stage` alone."""
    fix_secret(folder / "ledger.sqlite", settings(folder)["data"]["name"])
    write_jsonl(folder / "data.jsonl", judged(64) if stage == "reward_model" else reviews(64))
    others: dict[str, Any] = {"sft": None, "ppo": None}
    section = merged(STAGES[stage], changes)
    model = {"name_or_path": "tiny-review-lm"}  # whose steps are committed
    recipe = write_recipe(folder, model=model, target_epsilon=1000, eval_prompts=2, **others | {stage: section})
    done = call(capsys, command, recipe, "--json").json
    assert not done["private"] and [s["stage"] for s in done["stages"]] == [stage]
    place = folder / "run"
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    released = place / ("reward_model" if stage == "reward_model" else "release") / "adapter_model.safetensors"
    norms = {name: float(torch.linalg.vector_norm(t.double())) for name, t in sorted(load_file(released).items())}
    return {"noised_metrics": [line["noised_metrics"] for line in lines], "norms": norms}


def assert_agrees(found: dict[str, Any], stage: str) -> None:
    """Compares with the committed trajectory."""
    expected = json.loads(COMMITTED.read_text(encoding="utf-8"))[stage]
    assert len(expected["noised_metrics"]) == len(found["noised_metrics"]) == STEPS
    for step, (old, new) in enumerate(zip(expected["noised_metrics"], found["noised_metrics"], strict=True)):
        assert new == pytest.approx(old, rel=TOLERANCE), f"step {step}"
    assert found["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("command", "stage", "changes"), AGREEING, ids=[f"{c}-{s}-{'-'.join(x) or 'default'}" for c, s, x in AGREEING]
)
def test_configurations_that_must_agree_take_the_committed_steps(tmp_path, capsys, command, stage, changes):
    assert_agrees(trajectory(capsys, tmp_path, command, stage, changes), stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_learning_rate_one_percent_off_is_noticed(tmp_path, capsys, stage):
    changes = {"learning_rate": 1.01 * STAGES[stage]["learning_rate"]}
    other = trajectory(capsys, tmp_path, stage, stage, changes)
    with pytest.raises(AssertionError):
        assert_agrees(other, stage)
