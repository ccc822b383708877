"""Recipes from YAML and the command line; every field can be overridden as --section.field value."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_loader  # type: ignore[attr-defined]

from .domains import hints_of, shown
from .errors import DPAlignError
from .names import instead
from .printable import printable
from .recipe import Recipe
from .stages import RENAMED, STAGES

LARGEST_RECIPE = 1_000_000  # bytes
LARGEST_TREE = 10_000  # values, each as often as it is named
DEEPEST = 50


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML in which 1e-3 is a number, and 1:30 is none; a key stands once in its section."""

    def get_single_node(self) -> Any:
        """The tree, if it is no larger than a recipe may be once every alias is written out."""
        try:
            node = super().get_single_node()
        except RecursionError:
            node = None
            raise _refused("sections are nested too deeply") from None
        if node is not None and _size(node, {}, DEEPEST) > LARGEST_TREE:
            raise _refused(f"with its aliases it has more than {LARGEST_TREE} values")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _refused(f"the key {shown(key.value)} stands twice in one section", key)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _refused("a text holds half of a character (a lone surrogate)", node)
        return value

    def construct_another_number(self, node: Any) -> Any:
        raise _refused(f"{node.value} is another number in YAML than it looks: write it otherwise, or in quotes", node)

    def construct_yaml_int(self, node: Any) -> Any:
        if len(node.value) > 40:
            raise _refused("a whole number has more than 40 digits", node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        value = super().construct_yaml_float(node)
        if math.isinf(value) and "inf" not in node.value.lower():
            raise _refused(f"{node.value} is larger than a number can be (infinity is written .inf)", node)
        return value


def _refused(why: str, node: Any = None) -> yaml.YAMLError:
    line = "" if node is None else f"line {node.start_mark.line + 1}: "
    return yaml.constructor.ConstructorError(None, None, f"{line}{why}")


def _size(node: Any, known: dict[int, int], depth: int) -> int:
    """Values below a node, each as often as it is reached."""
    if depth == 0:
        raise _refused(f"sections are nested more than {DEEPEST} deep, or an alias is inside itself")
    if id(node) not in known:
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        below = [one for pair in inner for one in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_size(one, known, depth - 1) for one in below)
    return known[id(node)]


# YAML 1.1 takes 1:30 for 90, 010 for 8 and 2001-01-01 for a date.
_OTHERWISE = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERWISE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "!another-number", re.compile(r"^[-+]?(0[0-9_]+|[0-9]+(:[0-9]+)+)$"), list("-+0123456789")
)
_Loader.add_constructor("!another-number", _Loader.construct_another_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\d[\d_]*\.[\d_]*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def load_yaml(stream: Any) -> Any:
    """Safe YAML; the string `inf` is infinity, as in our JSON.

    Raises:
        YAMLError: no YAML, a key that stands twice, or more than a recipe may be.
    """
    try:
        return _with_infinity(yaml.load(stream, _Loader))
    except (ValueError, IndexError, TypeError) as error:
        raise _refused(f"a value is not what its tag says ({type(error).__name__})") from None


def recipe_from(command: str, arguments: list[str]) -> Recipe:
    """Parses `[RECIPE.yaml] --field value ...`.

    Raises:
        DPAlignError: an unknown field or a wrong type, in one sentence.
    """
    set_loader("dpalign", load_yaml, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(prog=f"dpalign {command}", exit_on_error=False, parser_mode="dpalign", add_help=False)
    parser.add_argument("--config", "--recipe", action=ActionConfigFile)
    parser.add_class_arguments(Recipe)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    _check_files(arguments)
    arguments = [re.sub(r"^(--[\w.]+=)?(-?)inf$", r"\1\2.inf", a) for a in arguments]
    try:
        parsed = parser.parse_args(arguments)
        _check_sections(parsed, Recipe)
        fields = vars(parser.instantiate(parsed))
    except argparse.ArgumentError as error:
        raise DPAlignError(printable(_in_one_sentence(" ".join(str(error).split()), command))) from None
    return Recipe(**{f.name: fields[f.name] for f in dataclasses.fields(Recipe)})


def _check_sections(values: Namespace, kind: type[Any], path: str = "") -> None:
    """Refuses another value where a section of settings belongs, which jsonargparse sees only when it makes one."""
    values, hints = values.get("init_args", values), hints_of(kind)
    for name, hint in hints.items():
        section, value = section_of(name, kind), values.get(name)
        if section is None or (value is None and type(None) in get_args(hint)):
            continue
        if not isinstance(value, Namespace):
            raise DPAlignError(f"field {path}{name}: expected a section of settings, got {shown(value)}.")
        _check_sections(value, section, f"{path}{name}.")


def section_of(path: str, recipe: type[Any] = Recipe) -> type[Any] | None:
    """The settings at a dotted path such as `ppo.reward` (the whole recipe at an empty one); None if there are none."""
    found: type[Any] | None = recipe
    for name in filter(None, path.split(".")):
        hint = hints_of(found).get(name)
        found = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)  # type: ignore[assignment]
        if found is None:
            return None
    return found


def _check_files(arguments: list[str]) -> None:
    """Refuses a recipe that is no readable text of a recipe's size; `--config FILE` and `--config=FILE`."""
    for number, argument in enumerate(arguments):
        name, equals, path = argument.partition("=")
        if name not in ("--config", "--recipe"):
            continue
        path = path if equals else "".join(arguments[number + 1 : number + 2])
        try:
            if not Path(path).is_file():
                raise DPAlignError(f"there is no recipe {shown(path)}: give the path of a YAML file.")
            if Path(path).stat().st_size > LARGEST_RECIPE:
                raise DPAlignError(f"recipe {path} has more than {LARGEST_RECIPE} bytes.")
            Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DPAlignError(f"recipe {shown(path)} cannot be read: {type(error).__name__}.") from None


def _in_one_sentence(message: str, command: str) -> str:
    # jsonargparse lists every alternative that it tried: say the one that people mean.
    if message.startswith(("Problems parsing config", "Unexpected config")):
        return f"the recipe is not YAML of sections and fields: {message.partition(':')[2].strip() or 'it is empty'}"
    keys = re.findall(r'Parser key "([\w.]+)":', message)
    prefix = f"{keys.pop(0)}." if "Problem with given class_path" in message else ""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    unknown = re.search(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: --([\w.]+)", message)
    if group or unknown:
        name = ".".join(filter(None, (group or unknown).groups()))  # type: ignore[union-attr]
        return unknown_field(f"{prefix}{name}", command)
    if not keys or "Expected a" not in message:
        return message
    tried = message.rpartition(f'Parser key "{keys[-1]}":')[2]
    types = re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.(\w+\[.*?\])\.)", tried)
    expected = " or ".join(dict.fromkeys(a or b for a, b in types if a != "NoneType")) or "a section of settings"
    value = re.search(r"(?:Got|Given) value: (.+?)(?: - Expected|$)", tried)
    return f"field {prefix}{keys[-1]}: expected {expected}, got {value[1] if value else None!r}."


def unknown_field(name: str, command: str = "") -> str:
    """One sentence about a dotted name that no field has: what was meant, or what there is.

    Args:
        command: a stage's, whose section is where a setting without one belongs.
    """
    path, _, last = name.rpartition(".")
    while (section := section_of(path)) is None:  # a field of what is no section itself
        path, _, last = path.rpartition(".")
    renamed = RENAMED.get(name.split(".")[0].removesuffix("_data"))
    stages = [command] if command in STAGES else [stage for stage in STAGES if section_of(stage)]
    below = [place for part in ([path] if path else [*stages, "model", "data"]) for place in fields_below(part)]
    meant = instead(last if path else name, [field.name for field in dataclasses.fields(section)], below)
    if renamed and not meant.startswith("its place"):
        return f"unknown field {name}: that stage is called {renamed} now, and its data {renamed}_data."
    return f"unknown field {name}: {meant or f'--{path}.help lists those there are'}.".replace("--.help", "--help_all")


def fields_below(path: str) -> list[str]:
    """Dotted names of a section's fields, and of those of the sections inside."""
    section = section_of(path)
    own = [f"{path}.{field.name}" for field in dataclasses.fields(section)] if section else []
    return own + [name for place in own for name in fields_below(place)]


def _with_infinity(value: Any) -> Any:
    if value in ("inf", "-inf"):
        return math.inf if value == "inf" else -math.inf
    if isinstance(value, dict):
        return {k: _with_infinity(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_infinity(v) for v in value]
    return value
