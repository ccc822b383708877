"""One YAML recipe: the model, the private data, the budget and the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .algorithms import PPOConfig, RewardModelConfig, RLOOConfig, RolloutConfig, SFTConfig
from .data.load import DataConfig
from .evaluation.private import PrivateEvaluationConfig
from .models import ModelConfig
from .rewards import RewardConfig

STAGES = ("sft", "reward", "ppo", "rloo", "evaluation")  # in the order in which they run


@dataclass(kw_only=True)
class Recipe:
    """Private alignment of one model: SFT, a reward model, then PPO or RLOO, under one (epsilon, delta).

    Stages without a section are skipped. In parallel composition no unit is in two stages, and every stage gets the
    whole budget; in sequential composition units may be in several, which share it.

    Args:
        output_dir: the run's folder; the same command resumes it, other data or settings are refused.
        model: the model to align.
        data: the private data of all stages, split between them by a keyed hash of the unit.
        target_epsilon: epsilon of the whole run, or inf for a run without privacy (a baseline).
        target_delta: delta of the whole run; default: min(1e-5, 1/(10 units)).
        composition: `parallel`: the stages' units are disjoint. `sequential`: a unit may be in all stages that use a
            dataset of one name; their noise is raised until the whole keeps the target.
        allocation: who gets how much of a sequential budget: `equal` (all noise raised by one factor), `minimal` (least
            total noise variance), or a weight for each stage, such as {sft: 1, ppo: 2}.
        sft: settings of DP-SFT, or nothing to skip it.
        reward: settings of the DP reward model, or nothing to skip it.
        ppo: settings of DP-PPO, or nothing to skip it.
        rloo: settings of DP-RLOO, instead of ppo.
        evaluation: one noisy measurement on held-out private units, or nothing to skip it.
        split: what each stage takes of the data's units: a fraction, or a range [low, high] within [0, 1]; ranges may
            overlap in sequential composition. Default: equal parts, or everything in sequential composition.
        sft_data: another dataset for SFT alone.
        reward_data: another dataset for the reward model alone.
        ppo_data: another dataset for PPO or RLOO alone.
        evaluation_data: another dataset for the private evaluation alone.
        units_disjoint: `checked` compares the unit columns of separate datasets; `declared` takes your word,
            and the statement says so.
        eval_prompts: most public prompts that are measured at the end; default: all.
        eval_seed: seed of the sampling that is measured.
        reference_reward: a second reward for the measurement at the end, which trains nothing and decides nothing: a
            reward model without privacy, say. Its numbers are outside the guarantee, and stay in private/ unless all
            data is demo data.
        ledger: the private file that records every spending; default: $DPALIGN_LEDGER, else
            ~/.local/share/dpalign/ledger.sqlite.
        report_to: `tensorboard` writes the noised metrics for it, through accelerate; `none`.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`.
        num_threads: CPU threads; default: torch's choice.
    """

    output_dir: str = "runs/run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    target_epsilon: float = 4.0
    target_delta: float | None = None
    composition: Literal["parallel", "sequential"] = "parallel"
    allocation: Literal["equal", "minimal"] | dict[str, float] = "equal"
    sft: SFTConfig | None = None
    reward: RewardModelConfig | None = None
    ppo: PPOConfig | None = None
    rloo: RLOOConfig | None = None
    evaluation: PrivateEvaluationConfig | None = None
    split: dict[str, float | list[float]] | None = None
    sft_data: DataConfig | None = None
    reward_data: DataConfig | None = None
    ppo_data: DataConfig | None = None
    evaluation_data: DataConfig | None = None
    units_disjoint: Literal["checked", "declared"] = "checked"
    eval_prompts: int | None = None
    eval_seed: int = 0
    reference_reward: RewardConfig | None = None
    ledger: str | None = None
    report_to: Literal["none", "tensorboard"] = "none"
    device: str = "auto"
    num_threads: int | None = None

    @property
    def stages(self) -> dict[str, Any]:
        """Settings of the stages that there are, in the order in which they run."""
        return {name: getattr(self, name) for name in STAGES if getattr(self, name) is not None}

    @property
    def rollouts(self) -> RolloutConfig | None:
        """Settings of the stage that samples completions."""
        return self.ppo or self.rloo

    def data_of(self, stage: str) -> DataConfig:
        """The dataset of a stage."""
        return getattr(self, f"{'ppo' if stage == 'rloo' else stage}_data") or self.data
