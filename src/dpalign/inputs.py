"""What stages are given, before anything is drawn: records, prompts and lengths that they can use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from .algorithms.base import Reading, check_records, checked
from .algorithms.basis import check_own_text
from .data.load import Record
from .errors import DPAlignError
from .evaluation.during import check_public
from .loaded import Models
from .models import Policy
from .models.loading import check_ids, check_targets, embedding_rows, positions_of
from .models.sharded import refuse_whole
from .plan import Plan, RecipeStage
from .recipe import Recipe
from .records import Public, Records, read_by
from .rewards.load import asked_columns
from .settings.base import TrainingConfig
from .settings.rollouts import samples
from .survey import Survey, survey


def check_inputs(plan: Plan, models: Models, records: Records, public: Public, prompts: Public) -> dict[str, Survey]:
    """What the data does to each stage that can say so; for the data holder alone.

    Args:
        public: records to measure on. prompts: those that a stage learns from instead of private ones.

    Raises:
        DPAlignError: lengths or records that a stage cannot use.
    """
    surveys: dict[str, Survey] = {}
    chats = chats_of(plan, records, prompts)
    for name, stage in plan.order.items():
        model, source = models.reader(stage.kind.model_kind), plan.recipe.data_of(name)
        check_lengths(name, stage.kind.longest(stage.config), model.model.config)
        if isinstance(stage.config, TrainingConfig):
            adapter = stage.config.adapter
            check_targets(model.model, adapter.target_modules, adapter.layers)
            if adapter.init_a == "synthetic_gradient":
                refuse_whole(model.shards, f"{name}.adapter.init_a synthetic_gradient")
        of_stage = partial(stage.kind.check, stage.config, model.tokenizer)
        check = partial(read_record, of_stage, embedding_rows(model.model))
        if name in records:
            readings = checked(records[name], source.path or source.name, stage.kind.columns, check)
            found = survey(readings, records[name], source.unit, padded=samples(stage.config))
            surveys |= {} if found is None else {name: found}
        if name in public:
            check_public(stage.kind, check_records(*public[name], stage.kind.columns, check), *public[name])
        elif isinstance(stage.config, TrainingConfig) and stage.config.eval_steps is not None:
            raise DPAlignError(
                f"{name}.eval_steps measures on public records, and stage {name} has none: give its data an eval_path "
                "and eval_is_public: true (a trainer its eval_dataset), or leave eval_steps out."
            )
        if name in prompts:
            check_records(*prompts[name], stage.kind.columns, check)
            check_number_of_prompts(stage, *prompts[name])
        read = records.get(name) or prompts.get(name, ([], ""))[0]
        if isinstance(model, Policy) and read:  # prompts that it writes itself are as those of the last stage
            model.asks_in_chats = chats[name]
        config = stage.config
        if isinstance(model, Policy) and isinstance(config, TrainingConfig) and config.adapter.init_a == "activations":
            check_own_text(name, model, stage.kind.longest(config))
        if not read:
            stage.kind.check_writing(stage.config, model)
    return surveys


def check_number_of_prompts(stage: RecipeStage, prompts: Sequence[Record], path: str) -> None:
    """Raises DPAlignError if public prompts are fewer than an update asks for."""
    config = stage.config
    assert isinstance(config, TrainingConfig)
    asked = config.expected_batch_size * config.minibatches
    if len(prompts) < asked:
        raise DPAlignError(
            f"stage {stage.name} asks for {asked} different prompts at once, and {path} has {len(prompts)}: lower "
            "expected_batch_size."
        )


def read_record(check: Callable[[Record], Reading | None], embeddings: int, record: Record) -> Reading | None:
    """What a stage reads of a record.

    Args:
        check: the stage's. embeddings: tokens that the model has an embedding for.

    Raises:
        DPAlignError: it cannot be used, or has a token that the model has no embedding for.
    """
    reading = check(record)
    if reading is not None and reading.largest >= embeddings:
        check_ids([reading.largest], embeddings)
    return reading


def public_by(recipe: Recipe, public: Public) -> Public:
    """The same of records that are declared public; what the reference reward is given of them stays, too."""
    judged = [] if recipe.reference_reward is None else asked_columns(recipe.reference_reward)
    return {name: (read_by(recipe, name, rows, judged), source) for name, (rows, source) in public.items()}


def chats_of(plan: Plan, records: Records, prompts: Public) -> dict[str, bool]:
    """Of each stage that reads something: whether it is chats."""
    read = {name: records.get(name) or prompts.get(name, ([], ""))[0] for name in plan.order}
    return {name: are_chats(rows, plan.order[name].kind.columns) for name, rows in read.items() if rows}


@contextmanager
def asked_as(policy: Policy | None, chats: bool | None) -> Iterator[None]:
    """A policy whose own text is of the kind that a stage reads; with None as it is."""
    if policy is None or chats is None:
        yield
        return
    before, policy.asks_in_chats = policy.asks_in_chats, chats
    try:
        yield
    finally:
        policy.asks_in_chats = before


def are_chats(records: Sequence[Record], columns: tuple[tuple[str, ...], ...]) -> bool:
    """Whether the columns that are read hold chat messages; one kind in all records."""
    first = records[0]
    return any(isinstance(first.get(name), list) for names in columns for name in names)


def check_lengths(name: str, needed: int, model_config: Any) -> None:
    """Refuses lengths that the model cannot hold: otherwise the one long record that is drawn would tell.

    Raises:
        DPAlignError: too long, or positions whose scaling depends on the longest row of a batch.
    """
    model = model_config.get_text_config()
    limit = positions_of(model_config)
    if limit is not None and needed > limit:
        raise DPAlignError(
            f"stage {name} needs {needed} positions and the model has {limit}: lower the stage's lengths."
        )
    scaling = getattr(model, "rope_parameters", None) or {}
    if scaling.get("rope_type") in ("dynamic", "longrope") and needed > scaling.get(
        "original_max_position_embeddings", limit or needed
    ):
        raise DPAlignError("the model scales positions by the longest row of a batch: lower the stage's lengths.")
