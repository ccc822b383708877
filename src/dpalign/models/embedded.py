"""Models that come with the package or from a package registry, under short names."""

from __future__ import annotations

from importlib import resources

from ..files import check_is_there
from ..settings.models import TINY_REVIEW_LM


def resolve(name_or_path: str, what: str = "model") -> str:
    """Folder of an embedded model's short name; any other name or path unchanged.

    Raises:
        DPAlignError: a path that is not there; `what` is named.
    """
    if name_or_path == TINY_REVIEW_LM:
        return str(resources.files("dpalign") / "assets" / TINY_REVIEW_LM)
    check_is_there(name_or_path, what)
    return name_or_path
