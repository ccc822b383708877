"""A reward by its source alone, or by all the fields of a recipe's section `reward` in a YAML file."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..domains import SCALE, check_settings, shown
from ..errors import DPAlignError
from ..parsing import LARGEST_RECIPE, load_yaml
from ..settings.rewards import RewardConfig
from .arguments import number

SOURCES = (
    "classifier:PATH, reward_model:PATH, module:function, FILE.yaml (all fields of a recipe's section `reward`: judge, "
    "contrast, mean), fitted:FOLDER"
)


def add_reward(group: argparse._ActionsContainer, default: str | None) -> None:
    """`--reward`, and what is declared of it."""
    vader = "vader (default)" if default == "vader" else "vader"
    group.add_argument("--reward", default=default, help=f"{vader}, {SOURCES}")
    group.add_argument("--reward_is_public", action="store_true", help="declare a classifier or function public")
    group.add_argument(
        "--reward_low", type=number(float, SCALE), help="declared range of the reward, for module:function"
    )
    group.add_argument("--reward_high", type=number(float, SCALE))
    group.add_argument("--reward_columns", nargs="*", default=[], help="columns of the data that functions are given")


def reward_of(given: argparse.Namespace, name: str = "reward") -> RewardConfig:
    """What these options say; those of a second reward have its name in front.

    Raises:
        DPAlignError: a file that is no section `reward`.
    """
    return reward_section(
        getattr(given, name),
        is_public=getattr(given, f"{name}_is_public"),
        low=getattr(given, f"{name}_low"),
        high=getattr(given, f"{name}_high"),
        columns=given.reward_columns,
    )


def reward_section(asked: str, **options: Any) -> RewardConfig:
    """What `--reward` names; options that were given win over the file.

    Raises:
        DPAlignError: a file that is no such section.
    """
    named = RewardConfig(source=asked)
    if asked.endswith((".yaml", ".yml")):
        named = RewardConfig(**_read(Path(asked)))
    given = {name: value for name, value in options.items() if not (value is None or value is False or value == [])}
    named = replace(named, **given)
    check_settings(named, "reward")
    return named


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_RECIPE:
            raise DPAlignError(f"reward {path} has more than {LARGEST_RECIPE} bytes.")
        section = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DPAlignError(f"reward {path} cannot be read as YAML: {type(error).__name__}.") from None
    if isinstance(section, dict) and set(section) == {"reward"}:
        section = section["reward"]
    if not isinstance(section, dict):
        raise DPAlignError(f"reward {path}: expected the fields of a section `reward`, got {shown(section)}.")
    unknown = sorted(map(str, section.keys() - {f.name for f in fields(RewardConfig)}))
    if unknown:
        raise DPAlignError(f"reward {path} has an unknown field {shown(unknown[0])}.")
    return section
