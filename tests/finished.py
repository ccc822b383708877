"""The folder of a run that is over, without a run: made by the classes that write one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dpalign.evaluation import Evaluation, PairEvaluation
from dpalign.files import write_json
from dpalign.privacy.accountant import SampledGaussian, epsilon
from dpalign.privacy.statement import PrivacyStatement, StageStatement, attack_success_of
from dpalign.results import Results

DELTA = 1e-5
MECHANISM = SampledGaussian(0.32, 4.0, 60, 1, 40.0)
LONG = "Whenanotherwordwouldhavedone" * 12  # no space to break a line at
UPDATES = 60


def statement(said: str, unit: str = "customer", *, private: bool = True, demo: bool = False) -> PrivacyStatement:
    """Two stages on data that is called `said`."""
    spent = epsilon([MECHANISM], DELTA) if private else math.inf
    ledger = [{
        "dataset": said, "unit_kinds": [unit], "runs": 3, "runs_without_privacy": 1, "epsilon_of_all_private_runs": 7.3211,
        "delta": DELTA, "demo_data": demo,
    }]  # fmt: skip
    stages = [
        StageStatement(name, said, part, "split", unit, 12500.5, 0.5, spent, [MECHANISM], private)
        for name, part in (("sft", (0.0, 0.5)), ("rloo", (0.5, 1.0)))
    ]
    return PrivacyStatement(
        private,
        spent,
        DELTA,
        stages,
        versions={"dpalign": "0.2", "torch": "2.13"},
        assumptions=[f"assumed of {said}"],
        ledger=ledger,
        attack_success=attack_success_of(stages),
    )


def metrics(said: str) -> list[dict[str, Any]]:
    """What the log of the two stages has: RLOO's second update twice, for it was tried again."""
    common = {"private": True, "noise_multiplier": 4.0, "metrics_noise_multiplier": 40.0, "attempt": 0}
    lines = [
        common | {
            "stage": stage, "step": step, "epsilon_of_stage": step / 20,
            "noised_metrics": dict.fromkeys(names, 1.0 + step / 30), "noise_standard_deviation": dict.fromkeys(names, 0.25),
        }
        for stage, names in (("sft", ["loss"]), ("rloo", ["reward", "kl", said]))
        for step in (*range(1, UPDATES + 1), 2)
    ]  # fmt: skip
    return lines


def finished_run(
    folder: Path, said: str = "support-chats", unit: str = "customer", *, private: bool = True, demo: bool = False
) -> Path:
    """A run of SFT and RLOO, measured in every way there is; foreign text in all places is `said`."""
    measured = {
        name: Evaluation(
            reward, 0.05, 0.5, 12.25, 0.875, 15.5, prompts=1000, reference_reward=0.25, reference_reward_ci95=0.125
        )
        for name, reward in (("pretrained", 0.0625), ("sft", 0.125), ("rloo", 0.5625))
    }
    results = Results(
        statement(said, unit, private=private, demo=demo),
        release=folder / "release",
        pairs={"sft": PairEvaluation(0.75, 0.125, 0.0625, 0.5, 1.5, 0.25, 80)},
        evaluation=measured,
        outside_the_guarantee=["reference_reward"],
    )
    (folder / "private").mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", results.to_json())
    write_json(folder / "completions.json", [
        {"prompt": f"{said} asks {i}?", "pretrained": f" {said} base {i}", "sft": f" {said} tuned {i}", "rloo": f" {said} aligned {i}"}
        for i in range(3)
    ])  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(said)), encoding="utf-8")
    write_json(
        folder / "private" / "resources.json",
        {"seconds": 1234.5, "peak_memory_mb": 987.6, "command": f"dpalign run {said}"},
    )
    survey = {
        "records": 25000,
        "limit": 64,
        "cut": 4321,
        "longest": 999,
        "nine_in_ten": 128,
        "empty": 17,
        "units": 25001,
        "idle_units": 11,
    }
    write_json(folder / "private" / "data.json", {"sft": survey})
    write_json(folder / "private" / "reference_evaluation.json", {
        "outside_the_guarantee": True, "evaluation": {"rloo": {"reference_reward": 0.8125, "reference_reward_ci95": 0.03125}},
    })  # fmt: skip
    return folder
