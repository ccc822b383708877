"""The stages that a recipe may have, in the order in which they run: the only list of them.

Imports nothing of ours, so that `dpalign --help` answers at once; what a stage is says its kind, which `kind` imports.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Listed:
    """A stage in the list: `module:class` of its kind, and what it is in one line.

    is_command: whether `dpalign NAME` runs it alone.
    """

    home: str
    help: str
    is_command: bool = True


STAGES: dict[str, Listed] = {
    "sft": Listed("dpalign.algorithms.sft:SFT", "private supervised fine-tuning"),
    "reward_model": Listed("dpalign.algorithms.reward:RewardModelling", "private reward model on pairwise preferences"),
    "reward_query": Listed("dpalign.algorithms.reward_query:RewardQuery", "private reward from one query over pairs"),
    "dpo": Listed("dpalign.algorithms.dpo:DPO", "private DPO: the policy learns pairwise preferences directly"),
    "ppo": Listed("dpalign.algorithms.ppo:PPO", "private PPO against a public reward or a private reward model"),
    "rloo": Listed("dpalign.algorithms.rloo:RLOO", "private RLOO: PPO's simpler relative without a value head"),
    "grpo": Listed("dpalign.algorithms.grpo:GRPO", "private GRPO: rewards standardised in each prompt's own group"),
    "offline": Listed("dpalign.algorithms.offline:Offline", "private learning from scored completions, without RL"),
    "measurement": Listed(
        "dpalign.evaluation.private:Measurement", "one noisy measurement on held-out private units", False
    ),
}

RENAMED = {"reward": "reward_model", "evaluation": "measurement"}  # since 0.1.0


def kind(name: str) -> Any:
    """The class of a stage: a `StageKind`, with its settings and what enters it."""
    module, _, attribute = STAGES[name].home.partition(":")
    return getattr(importlib.import_module(module), attribute)
