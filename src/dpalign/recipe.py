"""One YAML recipe: the model, the private data, the budget and the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .algorithms.ppo import PPOConfig
from .algorithms.sft import SFTConfig
from .data.load import DataConfig
from .models.policy import ModelConfig


@dataclass(kw_only=True)
class Recipe:
    """Private alignment of one model: SFT, then PPO, under one (epsilon, delta).

    Stages without a section are skipped. Every stage gets the whole budget, because no unit is in two stages.

    Args:
        output_dir: the run's folder; the same command resumes it, other data or settings are refused.
        model: the model to align.
        data: the private data of all stages, split between them by a keyed hash of the unit.
        target_epsilon: epsilon of the whole run, or inf for a run without privacy (a baseline).
        target_delta: delta of the whole run; default: min(1e-5, 1/(10 units)).
        sft: settings of DP-SFT, or nothing to skip it.
        ppo: settings of DP-PPO, or nothing to skip it.
        split: fraction of the data's units for each stage; default: equal parts.
        sft_data: another dataset for SFT alone.
        ppo_data: another dataset for PPO alone.
        units_disjoint: `checked` compares the unit columns of separate datasets; `declared` takes your word,
            and the statement says so.
        eval_prompts: most public prompts that are measured at the end; default: all.
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
    sft: SFTConfig | None = None
    ppo: PPOConfig | None = None
    split: dict[str, float] | None = None
    sft_data: DataConfig | None = None
    ppo_data: DataConfig | None = None
    units_disjoint: Literal["checked", "declared"] = "checked"
    eval_prompts: int | None = None
    ledger: str | None = None
    report_to: Literal["none", "tensorboard"] = "none"
    device: str = "auto"
    num_threads: int | None = None
