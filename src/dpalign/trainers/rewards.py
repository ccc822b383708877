"""`reward_funcs` as TRL's users give them: functions, objects, partials, names of models, or a list with weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ..data.load import Record
from ..domains import check_settings
from ..errors import DPAlignError
from ..models.reward_model import FORMAT_FILE
from ..rewards.classifier import classifier
from ..rewards.foreign import signature_of
from ..rewards.load import asked_columns, released
from ..rewards.weighted import PLUS, Weighted, sum_of
from ..settings.rewards import FITTED, JUDGE, RELEASED, RewardConfig

Function: TypeAlias = Callable[..., Any]
RewardFuncs: TypeAlias = Function | str | RewardConfig | Sequence[Function | str]
NOT_GIVEN = {
    "completion_ids": "a reward reads text",
    "trainer_state": "a reward may depend on its row alone",
    "log_extra": "what it logs would be private",
    "log_metric": "what it logs would be private",
}


def read_reward_funcs(
    given: RewardFuncs, weights: list[float] | None, config: RewardConfig, records: Sequence[Record]
) -> tuple[RewardConfig, list[Function | str]]:
    """The section `reward` that stands for them, and what `reward_function` then makes one function of (if any).

    Raises:
        DPAlignError: not a function or name; a number of weights; a column that no record has.
    """
    if isinstance(given, RewardConfig):
        return _section(given, weights, config, records), []
    parts: list[Function | str] = [given] if isinstance(given, str) or callable(given) else list(given)
    if not parts:
        raise DPAlignError("reward_funcs is empty: give a function, or leave it out and say args.reward")
    if weights is not None and len(weights) != len(parts):
        raise DPAlignError(f"reward_weights has {len(weights)} numbers for {len(parts)} reward functions")
    for part in parts:
        _check(part)
    if any(isinstance(part, str) for part in parts):
        config = replace(config, text=config.text or "prompt+completion", use_logit=True)
    needed = [name for part in parts if not isinstance(part, str) for name in signature_of(part).needs]
    columns = list(dict.fromkeys([*config.columns, *needed]))
    _check_columns(columns, records)
    names = [_name(part) for part in parts]
    if len(parts) > 1 or weights is not None:
        if any(PLUS in name for name in names):
            raise DPAlignError(f"reward_funcs: the path of a model that is one of several must not hold {PLUS!r}")
        names = [sum_of(weights or [1.0] * len(parts), names)]
    if isinstance(parts[0], str) and len(parts) == 1 and weights is None:
        return replace(config, source=names[0], columns=columns, use_logit=not _is_release(parts[0])), []
    return replace(config, source=names[0], columns=columns), parts


def _section(
    given: RewardConfig, weights: list[float] | None, config: RewardConfig, records: Sequence[Record]
) -> RewardConfig:
    """A section `reward` in the place of functions."""
    check_settings(given, "reward_funcs")
    if weights is not None:
        raise DPAlignError("reward_weights is for functions: give RewardConfig(source='mean', of=[...], weights=[...])")
    if config != RewardConfig():
        raise DPAlignError("reward_funcs is a RewardConfig and args.reward is another one: give one of them")
    _check_columns(asked_columns(given), records)
    return given


def _check_columns(columns: list[str], records: Sequence[Record]) -> None:
    for name in columns:
        if records and not any(name in record for record in records):
            why = NOT_GIVEN.get(name, "no record of train_dataset has such a column")
            raise DPAlignError(f"a reward function takes {name!r}: {why}")


def reward_function(
    parts: list[Function | str], weights: list[float] | None, config: RewardConfig, device: str
) -> Function | None:
    """One function of all; a model's is loaded. None where the section `reward` names all there is."""
    functions = [_of_model(part, config, device) if isinstance(part, str) else part for part in parts]
    if len(functions) == 1 and weights is None:
        return functions[0]
    return Weighted(functions, weights or [1.0] * len(functions)) if functions else None


def _check(part: Any) -> None:
    if isinstance(part, RewardConfig):
        raise DPAlignError(
            "reward_funcs: a RewardConfig stands alone: of several make RewardConfig(source='mean', of=[...])"
        )
    if isinstance(part, str):
        return
    if not callable(part) or hasattr(part, "from_pretrained"):
        raise DPAlignError(
            f"reward_funcs: a {type(part).__name__} is no function: give a function, or a model's name or folder"
        )
    if inspect.iscoroutinefunction(part) or inspect.iscoroutinefunction(type(part).__call__):
        raise DPAlignError(f"reward_funcs: {_name(part)} is a coroutine: rows are scored one after the other")


def _is_release(name: str) -> bool:
    return (Path(name) / FORMAT_FILE).is_file()


def _name(part: Any) -> str:
    if isinstance(part, str):
        return f"{RELEASED if _is_release(part) else 'classifier'}:{part}"
    if isinstance(part, partial):
        return f"{_name(part.func)} (partial)"
    named = part if hasattr(part, "__qualname__") else type(part)
    module = named.__module__ + (".py" if named.__module__ in (JUDGE, FITTED) else "")  # it is none of ours
    return f"{module}:{named.__qualname__}"


def _of_model(name: str, config: RewardConfig, device: str) -> Function:
    if _is_release(name):
        return released(replace(config, source=_name(name)), device)
    return classifier(name, config, device)
