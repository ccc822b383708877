"""Models side by side on the same public prompts, and which of their numbers no guarantee covers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..algorithms.completions import PROMPT_COLUMNS, check_prompts
from ..data.columns import require_columns
from ..data.load import Record, read_records, with_system
from ..data.overlap import DECLARED, check_contents, hash_texts
from ..errors import DPAlignError
from ..files import check_is_there
from ..models import ModelConfig, Policy
from ..models.generation import padded
from ..models.loading import device_of, positions_of
from ..privacy.ledger import Ledger
from ..rewards import Reward, load_reward
from ..rewards.written import PublicModels
from ..settings.models import Dtype
from ..settings.rewards import RewardConfig
from ..settings.rollouts import SamplingConfig
from .guarantee import is_outside_the_guarantee, stated_epsilon
from .metrics import Evaluation, Measured, PublicPrompts, measure_policy, public_prompts
from .text_overlap import lacking_references, reference_texts
from .win_rate import Judge, WinRate, higher_wins, judged, load_judge, win_rate

INTERVALS = "95% over prompts: normal (ci95 is the half-width), delta method for perplexity, Wilson for win_rate"
GIVEN = "the given list"  # in messages, and as `data`, where the records come from no file


@dataclass(frozen=True)
class Compared:
    """One model of a comparison.

    epsilon: what its own statement says, infinite if it was trained without privacy; None without a statement.
    won: how often it is better than the baseline; None of the baseline itself, and where there is none.
    """

    evaluation: Evaluation
    epsilon: float | None = None
    won: WinRate | None = None

    @property
    def is_outside_the_guarantee(self) -> bool:
        """Whether its own statement says that it was trained without privacy."""
        return self.epsilon == math.inf

    def as_dict(self) -> dict[str, Any]:
        """Without what was not measured."""
        row: dict[str, Any] = self.evaluation.as_dict()
        if self.epsilon is not None:
            row["epsilon"] = self.epsilon
        if self.won is not None:
            row |= {"win_rate": self.won.win_rate, "win_rate_low": self.won.low, "win_rate_high": self.won.high}
            row["win_rate_pairs"] = self.won.pairs
            if self.won.position_bias is not None:
                row["judge_position_bias"] = self.won.position_bias
        return row


@dataclass(frozen=True)
class Comparison:
    """Models side by side on the same public prompts.

    models: by name, in the order in which they were given; last a baseline that was not among them. data: the file of
    the prompts. reward, reference_reward, judge: their sources; without a judge the higher reward wins.
    reference_column: column of the texts for ROUGE; no_rouge: why there is none, where a reader may wonder.
    columns_outside: `reward`, `reference_reward` and `win_rate` where their numbers rest on private data without a
    guarantee, or on something that nobody declares public. assumptions: what was declared instead of checked.
    """

    data: str
    seed: int
    models: Mapping[str, Compared]
    reward: str
    reference_reward: str | None = None
    baseline: str | None = None
    judge: str | None = None
    reference_column: str | None = None
    no_rouge: str | None = None
    columns_outside: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def prompts(self) -> int:
        """How many were measured."""
        return next(iter(self.models.values())).evaluation.prompts

    @property
    def models_outside(self) -> list[str]:
        """Those whose own statement says that they were trained without privacy."""
        return [name for name, model in self.models.items() if model.is_outside_the_guarantee]

    def to_json(self) -> dict[str, Any]:
        """What `dpalign evaluate --output` writes."""
        outside = self.columns_outside
        value: dict[str, Any] = {"data": self.data, "reward": self.reward, "seed": self.seed, "intervals": INTERVALS}
        value["assumptions"] = list(self.assumptions)
        if self.reference_reward is not None:
            labelled = "reference_reward" in outside
            value["reference_reward"] = {"source": self.reference_reward, "outside_the_guarantee": labelled}
        if self.baseline is not None:
            value["baseline"] = self.baseline
            value["judge"] = {"source": self.judge or self.reward, "outside_the_guarantee": "win_rate" in outside}
        if self.reference_column:
            value["reference_column"] = self.reference_column
        value["outside_the_guarantee"] = {"columns": list(outside), "models": self.models_outside}
        return value | {"models": {name: model.as_dict() for name, model in self.models.items()}}


def compare(
    models: Sequence[str | Path],
    records: str | Path | list[Record],
    sampling: SamplingConfig,
    *,
    prompts_are_public: bool,
    num_prompts: int | None = None,
    baseline: str | Path | None = None,
    judge: str | None = None,
    judge_is_public: bool = False,
    reference_reward: RewardConfig | None = None,
    reference_column: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "auto",
    shared_texts: Literal["checked", "declared"] = "checked",
    ledger: str | Path | None = None,
    status: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Comparison:
    """Samples one completion per public prompt from each model, with the same seed, and measures them side by side.

    Everything is exact and without noise, so the prompts must be public. Rewards, judges and models that were made from
    private data without a guarantee may take part, but the result names them: do not publish their numbers.

    Args:
        models: releases or base models.
        records: the prompts, or a file of them; they have `prompt`, or `text` to cut prompts from.
        sampling: how prompts are cut, completed and scored.
        prompts_are_public: declares them so; without the declaration nothing is measured.
        num_prompts: use only the first so many.
        baseline: a model: how often is each of the others better on the same prompt?
        judge: `module:function` that says so, f(prompts, completions_a, completions_b) -> probabilities in [0, 1] that
            a is better, asked in both orders and averaged; default: the higher reward wins.
        judge_is_public: declares that no private data made the judge; without it, the win rates are labelled.
        reference_reward: a second reward, which may be non-private: its numbers are labelled unless it is public.
        reference_column: column of reference texts for ROUGE; default: `completion` if every record has one.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`.
        dtype: of every model's frozen weights; `auto`: of each by what the device computes faster.
        shared_texts: `checked`: no prompt is in private data that the `ledger` (default: as for a run) knows;
            `declared`: one that is, is public all the same.
        status: called with what is being done; the context that it returns is open for as long.

    Raises:
        DPAlignError: the prompts are not declared public, or the ledger knows them as private; or what cannot be
            measured, wherever that is possible before the first model is loaded.
    """
    asked, against = [str(model) for model in models], str(baseline) if baseline else None
    _check(asked, against, judge, prompts_are_public, num_prompts, sampling)
    names = list(dict.fromkeys([*asked, *filter(None, [against])]))
    inputs = _Inputs.read(records, sampling, num_prompts, reference_reward, reference_column, seed, device, dtype)
    assumptions, judging = inputs.check_contents(shared_texts, ledger), load_judge(judge) if judge else None
    epsilons = {name: stated_epsilon(name) for name in names}
    measured = inputs.measure(sorted(names, key=lambda name: name != against), status)  # the baseline first
    won = {name: _won(name, against, measured, judge, judging) for name in names}
    found = {name: Compared(measured[name].evaluation, epsilons[name], won[name]) for name in names}
    outside = _columns_outside(sampling.reward, reference_reward, against, judge, judge_is_public)
    return inputs.comparison(found, against, judge, outside, assumptions)


def _check(
    models: list[str],
    baseline: str | None,
    judge: str | None,
    prompts_are_public: bool,
    num_prompts: int | None,
    sampling: SamplingConfig,
) -> None:
    # What can be refused is refused before the first model is loaded.
    if not prompts_are_public:
        raise DPAlignError(
            "evaluation is exact and shows no noise: declare the prompts public with --eval_is_public (in Python "
            "prompts_are_public=True)."
        )
    lengths = ("prompt_max_tokens", "max_prompt_length", "max_completion_length")
    for name, value in [("num_prompts", num_prompts), *((name, getattr(sampling, name)) for name in lengths)]:
        if value is not None and value < 1:
            raise DPAlignError(f"{name} {value} must be at least 1.")
    if not models:
        raise DPAlignError("there is no model to measure: name at least one.")
    twice = next((name for name in models if models.count(name) > 1), None)
    if twice:
        raise DPAlignError(f"model {twice!r} is given twice: name each model once.")
    for name in [*models, *([baseline] if baseline else [])]:
        check_is_there(name)
    if judge and not baseline:
        raise DPAlignError(
            "a judge compares two models: name the one to compare with by --baseline (in Python baseline)."
        )


@dataclass(frozen=True)
class _Inputs:
    """What all models are measured with, read before the first of them is loaded."""

    records: list[Record]
    data: str
    sampling: SamplingConfig
    num_prompts: int | None
    reward: Reward
    reference_reward: Reward | None
    reference_source: str | None
    reference_column: str | None
    no_rouge: str | None
    seed: int
    device: str
    dtype: Dtype

    @staticmethod
    def read(
        given: str | Path | list[Record],
        sampling: SamplingConfig,
        num_prompts: int | None,
        reference_reward: RewardConfig | None,
        reference_column: str | None,
        seed: int,
        device: str,
        dtype: Dtype,
    ) -> _Inputs:
        """Raises DPAlignError for what cannot be read, or loaded."""
        data = GIVEN if isinstance(given, list) else str(given)
        records = with_system(given, data) if isinstance(given, list) else read_records(data)
        if not records:
            raise DPAlignError(f"{data} is empty: there is nothing to measure on.")
        require_columns(records, list(PROMPT_COLUMNS), data)
        column, no_rouge = _reference_column(reference_column, records, data)
        device = device_of(device)
        public = PublicModels(None, device, sampling.prompt_tokens, sampling.max_completion_length)
        reward = load_reward(sampling.reward, device, public=public)
        source = reference = None
        if reference_reward is not None:
            # Declared or not: it decides nothing here, and its numbers are labelled by `_columns_outside`.
            source, declared = reference_reward.source, replace(reference_reward, is_public=True)
            reference = load_reward(declared, device, public=public)
        how = seed, device, dtype
        return _Inputs(records, data, sampling, num_prompts, reward, reference, source, column, no_rouge, *how)

    def comparison(
        self,
        models: Mapping[str, Compared],
        baseline: str | None,
        judge: str | None,
        outside: tuple[str, ...],
        assumptions: tuple[str, ...],
    ) -> Comparison:
        """The models' numbers, with what they were measured by."""
        return Comparison(
            data=self.data,
            seed=self.seed,
            models=models,
            reward=self.sampling.reward.source,
            reference_reward=self.reference_source,
            baseline=baseline,
            judge=judge or None,
            reference_column=self.reference_column,
            no_rouge=self.no_rouge,
            columns_outside=outside,
            assumptions=assumptions,
        )

    def check_contents(self, shared_texts: str, path: str | Path | None) -> tuple[str, ...]:
        """Compares the texts with those of private data that the ledger knows; returns what is declared instead.

        Raises:
            DPAlignError: some are there, or there is no such ledger.
        """
        if shared_texts == "declared":
            return (DECLARED,)
        if path is not None and not Path(path).is_file():
            raise DPAlignError(f"there is no ledger {path}: leave it out if nothing was spent here.")
        columns = [column for columns in PROMPT_COLUMNS for column in columns]
        columns += [self.reference_column] if self.reference_column else []
        with closing(Ledger.copy_of(path)) as ledger:
            source = f"{self.data} (declared public)"
            check_contents(
                [hash_texts(self.records, columns, ledger, name=None, is_public=True, source=source)], ledger
            )
        return ()

    def measure(self, names: list[str], status: Callable[[str], AbstractContextManager[object]]) -> dict[str, Measured]:
        """Every model on the same prompts."""
        measured: dict[str, Measured] = {}
        first: tuple[PublicPrompts, list[str]] | None = None
        for name in names:
            with status(f"measuring {name}"):
                policy = Policy.load(ModelConfig(name_or_path=name, dtype=self.dtype), self.device)
                prompts = same_prompts(policy, self.records, self.sampling, self.data, first, self.num_prompts)
                column = self.reference_column
                measured[name] = measure_policy(
                    policy,
                    prompts,
                    self.reward,
                    self.sampling,
                    seed=self.seed,
                    reference_reward=self.reference_reward,
                    references=reference_texts(prompts.records, column, self.data) if column else None,
                )
                first = first or (prompts, measured[name].prompts)
        return measured


def _reference_column(given: str | None, records: list[Record], data: str) -> tuple[str | None, str | None]:
    """The column of reference texts, and a note if `completion` would be it but for records without a text."""
    column, no_rouge = given, None
    lacking = lacking_references(records, "completion")
    if column is None and not lacking:
        column = "completion"
    elif column is None and lacking < len(records):
        no_rouge = f"no ROUGE: {lacking} of {len(records)} records have no text in column 'completion'"
    if column:
        reference_texts(records, column, data)
    return column, no_rouge


def same_prompts(
    policy: Policy,
    records: list[Record],
    sampling: SamplingConfig,
    data: str,
    first: tuple[PublicPrompts, list[str]] | None = None,
    num_prompts: int | None = None,
) -> PublicPrompts:
    """The model's prompts: those of the first model, also where another tokenizer would cut texts elsewhere.

    Args:
        data: where the records are from, for messages.
        first: the first model's prompts, and their texts.

    Raises:
        DPAlignError: a prompt is too long or has no token, or the model has too few positions.
    """
    prompts = public_prompts(policy, records, sampling, num_prompts)
    if first is not None and "prompt" not in records[0]:
        earlier, texts = first
        if prompts.texts != texts:
            cut = [{**r, "prompt": text} for r, text in zip(earlier.records, texts, strict=True)]
            prompts = public_prompts(policy, cut, sampling)
    check_prompts(policy.tokenizer, prompts.records, sampling, data)
    if not all(prompt.ids for prompt in prompts.prompts):
        raise DPAlignError(f"a prompt of {data} has no token: give every record text, or prepend BOS (--prepend_bos).")
    needed = padded(policy, prompts.prompts)[0].shape[1] + sampling.max_completion_length
    limit = positions_of(policy.model.config)
    if limit is not None and needed > limit:
        raise DPAlignError(
            f"prompt and completion need {needed} positions and a model has {limit}: lower --max_completion_length (in "
            "Python max_completion_length) or shorten the prompts."
        )
    return prompts


def _won(
    name: str, baseline: str | None, measured: Mapping[str, Measured], judge: str | None, judging: Judge | None
) -> WinRate | None:
    """Against the baseline; None of the baseline itself."""
    if baseline is None or name == baseline:
        return None
    ours, theirs = measured[name], measured[baseline]
    if judging is None:
        return win_rate(higher_wins(ours.rewards, theirs.rewards))
    return win_rate(*judged(judging, str(judge), theirs.prompts, ours.completions, theirs.completions))


def _columns_outside(
    reward: RewardConfig,
    reference_reward: RewardConfig | None,
    baseline: str | None,
    judge: str | None,
    judge_is_public: bool,
) -> tuple[str, ...]:
    """Columns whose numbers rest on private data without a guarantee, or on something undeclared."""
    outside = []
    if is_outside_the_guarantee(reward):
        outside.append("reward")
    if reference_reward and is_outside_the_guarantee(reference_reward):
        outside.append("reference_reward")
    if baseline and (not judge_is_public if judge else "reward" in outside):
        outside.append("win_rate")
    return tuple(outside)
