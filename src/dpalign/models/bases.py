"""What the base of a release is called where others read it, and where it lies here.

A release names its base by a name of the Hub or of an embedded model, and a folder by its own name, as `./NAME`: where
that lay on this machine is nobody's business. A run notes it in its private folder, for loading its releases there.
"""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig

from ..errors import DPAlignError
from ..files import read_own, write_json
from ..settings.models import TINY_REVIEW_LM
from . import embedded

BASES = "bases.json"  # in a run's private folder


def told(base: str) -> str:
    """The base as a release names it."""
    if base in (TINY_REVIEW_LM, embedded.resolve(TINY_REVIEW_LM)):
        return TINY_REVIEW_LM
    return f"./{Path(base).resolve().name}" if base and Path(base).exists() else base


def remember_base(private: Path, base: str) -> None:
    """Notes where the base of a run's releases lies."""
    known = read_own(private / BASES) if (private / BASES).exists() else {}
    write_json(private / BASES, known | {told(base): str(Path(base).resolve()) if Path(base).exists() else base})


def base_path(release: str | Path) -> str:
    """The base of a release: a name of the Hub, or where it lies.

    Raises:
        DPAlignError: it names none, or a folder that is not here.
    """
    name = LoraConfig.from_pretrained(str(release)).base_model_name_or_path
    if not name:
        raise DPAlignError(f"the adapter in {release} names no base model.")
    noted = Path(release).resolve().parent / "private" / BASES
    known = read_own(noted) if noted.is_file() else {}
    return embedded.resolve(str(known.get(name, name)), f"the base of {release}, model")
