"""Recipes from YAML and the command line; every field can be overridden as --section.field value."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_loader  # type: ignore[attr-defined]

from .errors import DPAlignError
from .recipe import Recipe
from .stages import RENAMED


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML in which 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(stream: Any) -> Any:
    """Safe YAML; the string `inf` is infinity, as in our JSON."""
    return _with_infinity(yaml.load(stream, _Loader))


def recipe_from(command: str, arguments: list[str], description: str) -> Recipe:
    """Parses `[RECIPE.yaml] --field value ...`.

    Raises:
        DPAlignError: an unknown field or a wrong type, in one sentence.
    """
    set_loader("dpalign", load_yaml, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog=f"dpalign {command}",
        description=description,
        exit_on_error=False,
        parser_mode="dpalign",
        epilog="A recipe's fields, in YAML or here; see --sft.help and --ppo.help for the stages.",
    )
    parser.add_argument("--config", "--recipe", action=ActionConfigFile, help="the recipe (may also come first)")
    parser.add_class_arguments(Recipe)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    arguments = [re.sub(r"^(--[\w.]+=)?(-?)inf$", r"\1\2.inf", a) for a in arguments]
    try:
        fields = vars(parser.instantiate(parser.parse_args(arguments)))
    except argparse.ArgumentError as error:
        raise DPAlignError(_in_one_sentence(" ".join(str(error).split()))) from None
    return Recipe(**{f.name: fields[f.name] for f in dataclasses.fields(Recipe)})


def _in_one_sentence(message: str) -> str:
    # jsonargparse lists every alternative that it tried: say the one that people mean.
    keys = re.findall(r'Parser key "([\w.]+)":', message)
    prefix = f"{keys.pop(0)}." if "Problem with given class_path" in message else ""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    unknown = re.search(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: --([\w.]+)", message)
    if group or unknown:
        name = ".".join(filter(None, (group or unknown).groups()))  # type: ignore[union-attr]
        now = RENAMED.get(f"{prefix}{name}".split(".")[0].removesuffix("_data"))
        if now:
            return f"unknown field {prefix}{name}: that stage is called {now} now, and its data {now}_data."
        return f"unknown field {prefix}{name}: see --help, --sft.help and --ppo.help for the fields there are."
    if not keys or "Expected a" not in message:
        return message
    tried = message.rpartition(f'Parser key "{keys[-1]}":')[2]
    types = re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.(\w+\[.*?\])\.)", tried)
    expected = " or ".join(dict.fromkeys(a or b for a, b in types if a != "NoneType")) or "a section of settings"
    value = re.search(r"(?:Got|Given) value: (.+?)(?: - Expected|$)", tried)
    return f"field {prefix}{keys[-1]}: expected {expected}, got {value[1] if value else None!r}."


def _with_infinity(value: Any) -> Any:
    if value in ("inf", "-inf"):
        return math.inf if value == "inf" else -math.inf
    if isinstance(value, dict):
        return {k: _with_infinity(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_infinity(v) for v in value]
    return value
