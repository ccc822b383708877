"""What may leave: a list of files and of the fields in them, and nothing that names this machine.

`check_files` holds for what is sent anywhere; `found_in` also reads the files, for `dpalign export --check`.
"""

from __future__ import annotations

import getpass
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from .errors import DPAlignError
from .models.lora import FIELDS
from .models.prompt_format import PROMPTS_FILE, PromptFormat
from .models.reward_model import FORMAT_FILE, WEIGHTS_FILE
from .printable import printable
from .privacy.accountant import SampledGaussian
from .privacy.statement import ACCOUNT, PrivacyStatement, StageStatement, read_statement
from .release import CARD
from .stages import STAGES

README, ADAPTER, STATEMENT = "README.md", "adapter_config.json", "privacy.json"
OURS = {README, STATEMENT, PROMPTS_FILE, FORMAT_FILE, WEIGHTS_FILE}
WEIGHTS = r"(adapter_|generation_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
TOKENIZERS = {
    "added_tokens.json", "bpe.codes", "chat_template.jinja", "merges.txt", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "spm.model", "tekken.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.bpe", "vocab.json", "vocab.txt",
}  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a folder, of tokenizers that have several
# A path from the root or from a person's folder, as a value or in a sentence; no part of a URL, a date or a fraction.
PATH = re.compile(r"""(?:^|(?<=[\s'"`(:=]))(?:~\w*/|[A-Za-z]:\\|/(?=[^\s/'"`]+/))[^\s'"`]*""")
# Fields by file: `[]` is an element of a list, `*` any name. Of other files only what names this machine is looked for.
ANY = "*"
KNOWN: dict[str, set[str]] = {
    STATEMENT: {
        "format",
        *(f.name for f in fields(PrivacyStatement)),
        *(f"stages.[].{f.name}" for f in fields(StageStatement)),
        *(f"stages.[].mechanisms.[].{f.name}" for f in fields(SampledGaussian)),
        *(f"ledger.[].{name}" for name in ACCOUNT),
        *(f"{of}.[].{name}" for of in ("attack_success", "ledger.[].attack_success_of_all_private_runs")
          for name in ("false_positives", "true_positives")),
        "versions.*", "dtypes.*", "stages.[].attempts.*",
    },
    PROMPTS_FILE: {f.name for f in fields(PromptFormat)},
    ADAPTER: {*FIELDS, *(f"{name}.*" for name in FIELDS)},
    FORMAT_FILE: {"text.*", "normalization.*", "layers.*", "free.*"},
}  # fmt: skip


def check_files(folder: Path) -> list[str]:
    """The names of the files in a folder that may leave: weights, tokenizer, card and statement.

    Raises:
        DPAlignError: there is something else in it.
    """
    names = names_in(folder)
    for name in names:
        if not may_leave(folder, name):
            raise DPAlignError(
                f"{folder} holds {printable(name)}, which is no part of a release: nothing was sent. Share the folder "
                "as the run wrote it."
            )
    return names


def names_in(folder: Path) -> list[str]:
    """Everything in a folder, but for the one of a tokenizer's further templates."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not _is_folder_of_templates(path))


def may_leave(folder: Path, name: str) -> bool:
    """Whether it is a file on the list, and no link."""
    known = name in OURS | TOKENIZERS or re.fullmatch(f"{WEIGHTS}|{TEMPLATES}/[\\w-]+\\.jinja", name)
    return bool(known) and (folder / name).is_file() and not (folder / name).is_symlink()


def _is_folder_of_templates(path: Path) -> bool:
    return path.name == TEMPLATES and path.is_dir() and not path.is_symlink()


# What the files hold -------------------------------------------------------------------------------------------------


def found_in(folder: Path) -> list[str]:
    """All that must not leave, a sentence each; none of a release as a run writes it.

    Raises:
        DPAlignError: there is no privacy statement, or it is damaged.
    """
    stated = read_statement(folder)
    if stated is None:
        raise DPAlignError(f"{folder} holds no privacy statement ({STATEMENT}): give a release's folder.")
    found, (value, _) = [], stated
    if not value["private"] and not all(entry.get("demo_data") for entry in value.get("ledger", [])):
        found.append(f"{STATEMENT} says NOT PRIVATE: what was trained may repeat private records")
    for name in names_in(folder):
        if not may_leave(folder, name):
            found.append(f"{printable(name)} is not on the list of what may leave")
        else:
            found += [f"{printable(name)}: {what}" for what in _found_in_file(folder / name)]
    return found


def _found_in_file(path: Path) -> Iterator[str]:
    if path.suffix == ".safetensors":
        yield from _found_in_weights(path)
    elif path.name in TOKENIZERS - {"tokenizer_config.json"} or path.suffix in (".model", ".jinja"):
        return  # words of a vocabulary and templates are the public model's
    elif path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            yield "is no JSON"
            return
        known = KNOWN.get(path.name, {ANY})
        names = {".".join(name) for name, _ in _leaves(value)}
        unknown = sorted(name for name in names if not _is_known(name, known))
        yield from (f"the field {printable(name)} is not on the list" for name in unknown)
        yield from _of_this_machine("\n".join(text for _, text in _leaves(value) if isinstance(text, str)))
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from _found_in_card(text)
        yield from _of_this_machine(text)


def _found_in_weights(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except (OSError, SafetensorError):
        yield "is no safetensors file"
        return
    yield from (f"the metadata {printable(key)} is not on the list" for key in sorted(about) if key != "format")


def _found_in_card(text: str) -> Iterator[str]:
    """Of its metadata: what a card of ours, or one made fit for the Hub, does not have."""
    parts = text.split("---\n", 2)
    try:
        about = yaml.safe_load(parts[1]) if len(parts) == 3 else None
    except yaml.YAMLError:
        about = None
    if not isinstance(about, dict):
        yield "has no metadata that can be read"
        return
    yield from (f"the metadata {printable(str(key))} is not on the list" for key in about if key not in METADATA)


METADATA = {
    "base_model", "base_model_relation", "differential_privacy", "library_name", "license", "model-index", "tags",
    "pipeline_tag",
}  # fmt: skip


def _is_known(name: str, known: set[str]) -> bool:
    parts = name.split(".")
    prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return ANY in known or name in known or any(k.endswith(".*") and k.removesuffix(".*") in prefixes for k in known)


def _leaves(value: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values with where they lie; the elements of a list at its own place unless they are objects."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*name, str(key)))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _leaves(inner, (*name, "[]") if isinstance(inner, dict) else name)
    else:
        yield name, value


def _of_this_machine(text: str) -> Iterator[str]:
    """Paths, and the names of this machine and of who is logged in, if they are no words of ours."""
    yield from (f"names the path {printable(found)}" for found in sorted(set(PATH.findall(text))))
    for what, name in (("machine", socket.gethostname().partition(".")[0]), ("user", _user())):
        if len(name) > 2 and name not in _own_words() and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text):
            yield f"names the {what} {printable(name)}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # of a container that knows nobody
        return ""


def _own_words() -> set[str]:
    """Words that every card has."""
    return {*re.findall(r"\w+", CARD), *STAGES, "root", "localhost"}
