"""One YAML recipe: the model, the private data, the budget and the stages."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .domains import COUNT, SEEDS, check_settings, within
from .errors import DPAlignError
from .settings.base import StageConfig
from .settings.data import DataConfig
from .settings.dpo import DPOConfig
from .settings.grpo import GRPOConfig
from .settings.measurement import MeasurementConfig
from .settings.models import ModelConfig
from .settings.offline import OfflineConfig
from .settings.ppo import PPOConfig
from .settings.reward_model import RewardModelConfig
from .settings.reward_query import RewardQueryConfig
from .settings.rewards import RewardConfig
from .settings.rloo import RLOOConfig
from .settings.rollouts import CompletionConfig, samples
from .settings.sft import SFTConfig
from .stages import STAGES, kind


@dataclass(kw_only=True)
class Recipe:
    """Private alignment of one model: SFT, a reward model, DPO, then PPO, RLOO or GRPO, under one (epsilon, delta).

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
        reward_model: settings of the DP reward model, or nothing to skip it.
        reward_query: settings of the reward from one query, instead of reward_model.
        dpo: settings of DP-DPO, or nothing to skip it.
        ppo: settings of DP-PPO, or nothing to skip it.
        rloo: settings of DP-RLOO, instead of ppo.
        grpo: settings of DP-GRPO, instead of ppo.
        offline: settings of learning from scored completions, instead of ppo.
        measurement: one noisy measurement on held-out private units, or nothing to skip it.
        split: what each stage takes of the data's units: a fraction, or a range [low, high] within [0, 1]; ranges may
            overlap in sequential composition. Default: equal parts, or everything in sequential composition.
        sft_data: another dataset for SFT alone.
        reward_model_data: another dataset for the reward model alone.
        reward_query_data: another dataset for the reward from one query alone.
        dpo_data: another dataset for DPO alone.
        ppo_data: another dataset for PPO alone.
        rloo_data: another dataset for RLOO alone.
        grpo_data: another dataset for GRPO alone.
        offline_data: another dataset for learning from scored completions alone.
        measurement_data: another dataset for the measurement alone.
        units_disjoint: `checked` compares the unit columns of separate datasets; `declared` takes your word,
            and the statement says so.
        shared_texts: `checked` compares the texts of all datasets with each other, with public records and with what
            the ledger has drawn from under other names; `declared` takes your word that equal ones are different units'
            or public (form letters, say), and the statement says so.
        eval_prompts: most public prompts that are measured at the end; default: all.
        eval_seed: seed of the sampling that is measured.
        eval_best_of: measure also what the reward is worth where it is used: among so many completions of each public
            prompt, by the model that the policy stage starts from, what does the reference reward say of the one that
            the reward chooses? And of the one that the free rewards do, if it starts from some.
        reference_reward: a second reward for the measurement at the end, which trains nothing and decides nothing: a
            reward model without privacy, say. Its numbers are outside the guarantee, and stay in private/ unless all
            data is demo data.
        free_reward: the strongest reward that needs no people, which a comparison trains its free policy against;
            default: the reward itself if it is not learned, else the reference reward if that is not.
        ledger: the private file that records every spending; default: $DPALIGN_LEDGER, else
            ~/.local/share/dpalign/ledger.sqlite.
        report_to: a tracker that accelerate knows, or `none`. It is told noised metrics, public measurements and
            epsilon; those of a private stage when the stage ends: sent step by step they would tell each step's time.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`.
        num_threads: CPU threads; default: torch's choice.
    """

    output_dir: str = "runs/run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    target_epsilon: float = within(4.0, "(0, 1000]", or_inf=True)
    target_delta: float | None = within(None, "(0, 1)")
    composition: Literal["parallel", "sequential"] = "parallel"
    allocation: Literal["equal", "minimal"] | dict[str, float] = within("equal", "(0, 1e6]")
    sft: SFTConfig | None = None
    reward_model: RewardModelConfig | None = None
    reward_query: RewardQueryConfig | None = None
    dpo: DPOConfig | None = None
    ppo: PPOConfig | None = None
    rloo: RLOOConfig | None = None
    grpo: GRPOConfig | None = None
    offline: OfflineConfig | None = None
    measurement: MeasurementConfig | None = None
    split: dict[str, float | list[float]] | None = within(None, "[0, 1]")
    sft_data: DataConfig | None = None
    reward_model_data: DataConfig | None = None
    reward_query_data: DataConfig | None = None
    dpo_data: DataConfig | None = None
    ppo_data: DataConfig | None = None
    rloo_data: DataConfig | None = None
    grpo_data: DataConfig | None = None
    offline_data: DataConfig | None = None
    measurement_data: DataConfig | None = None
    units_disjoint: Literal["checked", "declared"] = "checked"
    shared_texts: Literal["checked", "declared"] = "checked"
    eval_prompts: int | None = within(None, COUNT)
    eval_seed: int = within(0, SEEDS)
    eval_best_of: int | None = within(None, "[2, 1024]")
    reference_reward: RewardConfig | None = None
    free_reward: RewardConfig | None = None
    ledger: str | None = None
    report_to: Literal[
        "none", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
    ] = "none"
    device: str = "auto"
    num_threads: int | None = within(None, "[1, 4096]")

    def __post_init__(self) -> None:
        for name, section in self.stages.items():
            if isinstance(section, StageConfig):  # else `check` says so
                setattr(self, name, section.as_section())

    @property
    def stages(self) -> dict[str, StageConfig]:
        """Settings of the stages that there are, in the order in which they run."""
        sections = {name: getattr(self, name, None) for name in STAGES}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def drawing(self) -> dict[str, StageConfig]:
        """Of these, the ones that draw private units; each of the others is a post-processing of what came before."""
        return {name: section for name, section in self.stages.items() if section.draws}

    @property
    def rollouts(self) -> CompletionConfig | None:
        """Settings of the stage that samples completions."""
        return next((c for c in self.stages.values() if samples(c)), None)

    def kind_of(self, stage: str) -> Any:
        """The class that a stage's section stands for: see `StageKind`."""
        return kind(stage).of(self.stages[stage])

    def data_of(self, stage: str) -> DataConfig:
        """The dataset of a stage."""
        own: DataConfig | None = getattr(self, f"{stage}_data", None)
        return own or self.data

    def check(self) -> None:
        """Raises DPAlignError for a value that cannot be, stages that cannot be together, and a section that nothing
        would read."""
        check_settings(self)
        commands = [name for name, listed in STAGES.items() if listed.is_command]
        if not self.stages:
            raise DPAlignError(f"the recipe has no stage: give it a section {', '.join(commands)}.")
        sampling = [name for name, config in self.stages.items() if samples(config)]
        if len(sampling) > 1:
            raise DPAlignError(f"the recipe has both {' and '.join(sampling)}: keep one of them.")
        scoring = [name for name, config in self.stages.items() if isinstance(config, RewardModelConfig)]
        if len(scoring) > 1:
            raise DPAlignError(f"the recipe has both {' and '.join(scoring)}: keep one of them.")
        if self.eval_best_of is not None and (self.reference_reward is None or not sampling):
            raise DPAlignError(
                "eval_best_of has a judge say what the reward chooses among completions: it needs a reference_reward, "
                "and a stage that samples."
            )
        for name in self.stages.keys() - self.drawing.keys():
            self._check_without_records(name)
        for name in STAGES:
            if getattr(self, f"{name}_data", None) is not None and name not in self.stages:
                raise DPAlignError(
                    f"{name}_data is given, and the recipe has no stage {name}: give it that section, or leave "
                    f"{name}_data out (--{name}_data null)."
                )

    def _check_without_records(self, name: str) -> None:
        """Refuses what would give records to a stage that reads none; where it is measured may be said."""
        own, plain = getattr(self, f"{name}_data", None), DataConfig()
        given = [] if own is None else [f.name for f in fields(own) if getattr(own, f.name) != getattr(plain, f.name)]
        unread = [f"{name}_data.{field}" for field in given if not field.startswith("eval_")]
        unread += ["split"] if name in (self.split or {}) else []
        unread += ["allocation"] if isinstance(self.allocation, dict) and name in self.allocation else []
        if unread:
            raise DPAlignError(
                f"{', '.join(unread)} names stage {name}, whose prompts are not private: it draws no records, so leave "
                "that out."
            )
