"""A release on the Hub, through huggingface_hub: what may leave, with a card that names nothing of this machine."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from jinja2.utils import htmlsafe_json_dumps

from .boundary import ADAPTER, README, STATEMENT, check_files
from .errors import RECORDS_READ, DPAlignError
from .files import write_json, write_text
from .printable import code_span, printable
from .release import EMBEDDED, FOLDER
from .settings.models import TINY_REVIEW_LM
from .version import __version__

# In quotes, a path from the root, behind a kind (`classifier:`) or not.
HERE = re.compile(r"""(?<=['"`])((?:\w+:)?)(/[^'"`/]+/[^'"`]*)(?=['"`])""")


@dataclass(frozen=True)
class Repository:
    """Where a release goes.

    Args:
        name: of the repository, such as `USER/NAME`. private: nobody else may see it.
        base_model: hub name of the base, where the release names a folder of this machine.
        licence: the Hub's name of one, such as `apache-2.0`.
    """

    name: str
    private: bool = True
    base_model: str | None = None
    licence: str | None = None

    def check(self, base: str | None) -> None:
        """What can be known before anything is written or sent. base: what the release names; None of full weights.

        Raises:
            DPAlignError: no name of the Hub, or a base that nobody else could load.
        """
        for name in filter(None, (self.name, self.base_model)):
            if not is_hub_name(name):
                raise DPAlignError(f"{printable(name)} is no name of the Hub: write USER/NAME.")
        if base is None:
            return
        if is_on_hub(base):
            if self.base_model not in (None, base):
                raise DPAlignError(f"the base is {base}, and base_model says {self.base_model}: leave that out.")
        elif self.base_model is None:
            raise DPAlignError(
                f"the base {printable(base)} is a folder of this machine, which nobody else has: `dpalign export` "
                "takes its name on the Hub (--base_model USER/NAME), or shares full weights (--merge)."
            )


def share(release: Path, repository: Repository, write: Callable[[Path], None], *, merged: bool = False) -> str:
    """Sends what `write` makes of a release in an empty folder; returns the repository's full name.

    Raises:
        DPAlignError: what must not leave, a base that nobody else has, or the Hub cannot be reached or refuses.
    """
    check_files(release)
    base = base_of(release)
    repository.check(None if merged else base)
    results = results_of(release.parent, is_policy=not (release / "reward.json").is_file())
    with tempfile.TemporaryDirectory(prefix="dpalign-hub-") as name:
        folder = Path(name)
        write(folder)
        make_fit(folder, repository, base, results)
        return push(folder, repository)


def is_hub_name(name: str) -> bool:
    """Whether the Hub could have something of that name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_on_hub(base: str) -> bool:
    """Whether a release's base may be a model of the Hub: neither a folder nor one that comes with this package."""
    return is_hub_name(base) and base != TINY_REVIEW_LM and not Path(base).exists()


def base_of(folder: Path) -> str | None:
    """The base model that a release's adapter names; None of full weights.

    Raises:
        DPAlignError: it is damaged.
    """
    if not (folder / ADAPTER).is_file():
        return None
    try:
        return str(json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DPAlignError(f"{folder / ADAPTER} names no base model: copy the release again.") from None


# The card and the configuration --------------------------------------------------------------------------------------


def make_fit(folder: Path, repository: Repository, base: str | None, results: list[EvalResult]) -> None:
    """Puts the Hub's names in place of this machine's, and completes the card's metadata.

    Args:
        folder: a copy of a release, which is changed. base: as the release itself names it.

    Raises:
        DPAlignError: metadata that huggingface_hub refuses, or a path that would still be told.
    """
    files = check_files(folder)
    is_public = base is not None and is_on_hub(base)
    named = base if is_public else repository.base_model
    local = None if is_public or (named is None and base == TINY_REVIEW_LM) else base
    for name in {ADAPTER, "config.json", "tokenizer_config.json"} & set(files):
        _rewrite(folder / name, lambda text: named if text == local else text)
    _rewrite(folder / STATEMENT, lambda text: _without_paths(text, local, named))
    text, is_adapter = (folder / README).read_text(encoding="utf-8"), (folder / ADAPTER).is_file()
    card = _card(text, repository, named, results, is_adapter)
    write_text(folder / README, _without_paths(card, local, named))
    for name in files if local is not None else ():
        text = (folder / name).read_text(encoding="utf-8") if not name.endswith((".safetensors", ".model")) else ""
        if any(spelled in text for spelled in _spellings(str(local))):
            raise DPAlignError(f"{name} names {printable(str(local))} of this machine: nothing was sent.")


def _rewrite(path: Path, rename: Callable[[str], str | None]) -> None:
    """Every string of a JSON file anew."""
    value = json.loads(path.read_text(encoding="utf-8"))
    renamed = _renamed(value, rename)
    if renamed != value:
        write_json(path, renamed)


def _renamed(value: Any, rename: Callable[[str], str | None]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(inner, rename) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, rename) for inner in value]
    return rename(value) if isinstance(value, str) else value


def _without_paths(text: str, local: str | None, named: str | None) -> str:
    """The base by its name on the Hub, and of any other path from the root, in quotes, the last part."""
    for spelled in sorted(_spellings(local), key=len, reverse=True) if local is not None else ():
        text = text.replace(spelled, named or Path(spelled).name)
    return HERE.sub(lambda found: found[1] + Path(found[2]).name, text)


def _spellings(path: str) -> set[str]:
    return {path, json.dumps(path)[1:-1], str(htmlsafe_json_dumps(path))[1:-1], code_span(path)[1:-1]}


def _card(text: str, repository: Repository, named: str | None, results: list[EvalResult], is_adapter: bool) -> str:
    try:
        card = ModelCard(text)
        about = card.data.to_dict()  # type: ignore[no-untyped-call]
        about |= {"base_model": named, "license": repository.licence}
        about["base_model_relation"] = ("adapter" if is_adapter else "finetune") if named else None
        about |= {} if is_adapter else {"library_name": "transformers"}
        if results:
            about |= {"model_name": repository.name.split("/")[-1], "eval_results": results}
        metadata = ModelCardData(**about).to_dict()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DPAlignError(f"the card's metadata are refused: {printable(str(error), longest=200)}") from None
    body = card.text.replace("path/to/this/folder", repository.name)
    for sentence in (EMBEDDED, FOLDER):
        body = body.replace(f"{sentence}\n", "")
    if not is_adapter:
        use = FULL.replace("NAME", repository.name)
        body = re.sub(r"(?<=## Use\n)```python\n.*?```", lambda found: use, body, flags=re.DOTALL)
    # Not its own to_yaml, which writes what turns text around as it is.
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, width=math.inf)}---\n{body}"


FULL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("NAME")
tokenizer = AutoTokenizer.from_pretrained("NAME")
```"""


COUNTS = ("prompts", "unscored", "pairs", "text_records", "text_tokens")  # of what was measured, no result


def results_of(run: Path, is_policy: bool) -> list[EvalResult]:
    """What a run's summary.json says was measured on public prompts and pairs; nothing where there is none.

    Args:
        is_policy: of the policy after the last stage, or else of the reward model.
    """
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        found = list(summary.get("evaluation", {}).values())[-1:] if is_policy else []
        pairs = [v for v in summary.values() if isinstance(v, dict) and "accuracy" in v and not is_policy]
    except (OSError, ValueError, AttributeError):
        return []
    task = "text-generation" if is_policy else "text-classification"
    left_out = {*summary.get("outside_the_guarantee", []), *COUNTS}
    return [
        EvalResult(task, f"public-{on}", f"public {on} (declared)", name, value, metric_name=name.replace("_", " "))
        for row in [*found, *pairs]
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
        if name not in left_out and not name.endswith("_ci95")
        for on in ("pairs" if not is_policy else "texts" if name.startswith("text_") else "prompts",)
    ]


# Sending -------------------------------------------------------------------------------------------------------------


def push(folder: Path, repository: Repository, message: str = "A release of dpalign") -> str:
    """Sends a folder that was made fit; returns the repository's full name.

    Raises:
        DPAlignError: the Hub cannot be reached or refuses, or has a public repository where a private one is asked for.
    """
    names = check_files(folder)
    api = HfApi(library_name="dpalign", library_version=__version__)
    try:
        ModelCard.load(folder / README).validate()
        full = str(api.create_repo(repository.name, private=repository.private, exist_ok=True).repo_id)
        is_open = repository.private and not api.repo_info(full).private
        if not is_open:
            api.upload_folder(repo_id=full, folder_path=folder, allow_patterns=names, commit_message=message)
    except Exception as error:  # of the network, the Hub or this machine's login
        raise DPAlignError(f"the release was not sent to {repository.name}: {_said(error)}.") from None
    if is_open:
        raise DPAlignError(
            f"{full} is there already, and public: nothing was sent. Say that it may be (--no_private, or "
            "hub_private_repo=False), or give another name."
        )
    return full


def _said(error: Exception) -> str:
    """A library's first line; without it once there are records, and never with the token."""
    if RECORDS_READ.is_set():
        return type(error).__name__
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    token = get_token()
    return printable(text.replace(token, "...") if token else text, longest=200).rstrip(".")
