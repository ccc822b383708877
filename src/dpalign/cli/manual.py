"""`--help` of the commands that read a recipe: what is required, what is set most, and where the rest is explained."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

from ..domains import hints_of
from ..parsing import section_of
from ..recipe import Recipe
from ..stages import STAGES

REQUIRED = ("data.name", "data.path")
RUN = ("data.unit", "model.name_or_path", "model.is_public", "target_epsilon", "output_dir")
STAGE = (
    "expected_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "micro_batch_size",
    "max_length",
    "max_prompt_length",
    "max_completion_length",
    "reward.source",
)  # set most, of those that a stage has
WIDEST = 110


def asked(command: str, arguments: list[str], example: str, about: str = "") -> str | None:
    """What `--help`, `--help_all` or `--SECTION.help` ask for; None if nobody asks.

    Args:
        about: what the command does; default: what its section, or the recipe, says of itself.
    """
    for argument in arguments:
        section = re.fullmatch(r"--([\w.]+)\.help", argument)
        if argument == "--help_all":
            return "\n".join(_everything())
        if argument in ("-h", "--help"):
            return "\n".join(_page(command, example, about))
        for path in (section[1], f"{command}.{section[1]}") if section else ():
            if section_of(path) is not None:
                return "\n".join(_fields(path))
    return None


def _page(command: str, example: str, about: str) -> Iterator[str]:
    kind = section_of(command) if command in STAGES else Recipe
    assert kind is not None
    yield f"usage: dpalign {command} [RECIPE.yaml] [--FIELD VALUE ...]"
    yield ""
    yield from _wrapped(" ".join(about.split()) or _summary(kind))
    yield ""
    yield "required, in the recipe or here:"
    yield from _lines(REQUIRED, brief=True)
    yield ""
    yield "of every run:"
    yield from _lines(RUN, brief=True)
    yield ""
    if command in STAGES:
        own = [f"{command}.{name}" for name in STAGE if _field(f"{command}.{name}")]
        own += [f"{command}.{name}" for name in inspect.get_annotations(kind) if f"{command}.{name}" not in own]
        yield f"of the stage {command}:"
        yield from _lines(own, brief=True)
        rest = [f.name for f in dataclasses.fields(kind) if f"{command}.{f.name}" not in own]
        yield from _wrapped(f"more, explained by --{command}.help: {', '.join(rest)}")
    else:
        yield "stages (a section of the recipe each):"
        yield from (f"  --{name}.help  {listed.help}" for name, listed in STAGES.items())
        if command == "run":
            yield from _wrapped("--compare also runs what is free, and without privacy where all data is demo data")
    said = "of the run: --help_all explains every field of a recipe; --json prints one JSON object"
    yield from _wrapped(said if command == "plan" else f"{said}; --audit first tries the guarantee")
    yield ""
    yield "example:"
    yield f"  {example}"


def _everything() -> Iterator[str]:
    """Every field of a recipe, section by section."""
    yield "fields of a recipe, in YAML or as --SECTION.FIELD VALUE:"
    yield from _fields("")


def _fields(path: str) -> Iterator[str]:
    """A section's fields, and those of the sections inside."""
    kind = section_of(path)
    assert kind is not None
    prefix = f"{path}." if path else ""
    if path:
        yield from _wrapped(_summary(kind))
    names = [f.name for f in dataclasses.fields(kind)]
    yield from _lines([f"{prefix}{name}" for name in names])
    for name in names:
        inside = section_of(f"{prefix}{name}")
        if inside is not None and not name.endswith("_data"):
            yield ""
            yield f"{prefix}{name}:"
            yield from _fields(f"{prefix}{name}")


# One field -----------------------------------------------------------------------------------------------------------


def _lines(paths: Iterable[str], *, brief: bool = False) -> Iterator[str]:
    """Names, types and sentences; of those the first part and the default, if brief."""
    for path in paths:
        field, says, hint = _field(path)  # type: ignore[misc]
        shown = _default(field, says)
        if brief:
            first, *more = re.split(r"; |\. (?=[A-Z])", says)
            says = "; ".join([first, *(part for part in more if part.lower().startswith("default"))])
        yield from _wrapped(f"--{path} {_kind(hint)}  {says}{shown}", "  ", "      ")


def _field(path: str) -> tuple[dataclasses.Field[Any], str, Any] | None:
    """A field, its sentence and its type."""
    parent, _, name = path.rpartition(".")
    kind = section_of(parent)
    found = None if kind is None else next((f for f in dataclasses.fields(kind) if f.name == name), None)
    return None if kind is None or found is None else (found, sentences(kind).get(name, ""), hints_of(kind)[name])


def _default(field: dataclasses.Field[Any], says: str) -> str:
    """In words; nothing where the sentence has it, or where a value must be given."""
    value = field.default
    if re.search(r"\bdefault\b|Default:", says, re.IGNORECASE) or value in ("", dataclasses.MISSING):
        return ""
    words = "none" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f" (default: {words:g})" if isinstance(words, float) else f" (default: {words})"


def _kind(hint: Any) -> str:
    """A type as a placeholder."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) in (list, tuple):
        return "[...]"
    options = [one for one in get_args(hint) if one is not type(None)]
    if options and get_origin(hint) is not dict:
        return "|".join(dict.fromkeys(map(_kind, options)))
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false"}
    return names.get(hint, "{...}" if get_origin(hint) is dict else "(a section)")


def _summary(kind: type[Any]) -> str:
    """What the docstring says before its fields, in one paragraph."""
    return " ".join((inspect.getdoc(kind) or "").partition("\nArgs:")[0].split())


def sentences(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a config and its bases say of each field."""
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("\nArgs:\n")[2]
        for entry in re.split(r"\n(?=    \w)", textwrap.dedent(f"\n{text}").replace("\n", "\n    ")):
            names, colon, sentence = " ".join(entry.split()).partition(": ")
            if colon:
                said |= dict.fromkeys(names.split(", "), sentence.removesuffix("."))
    return said


def _wrapped(text: str, first: str = "", then: str = "") -> list[str]:
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)
