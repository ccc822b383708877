"""Models that come with the package or from a package registry, under short names."""

from __future__ import annotations

from importlib import resources

from ..settings.models import TINY_REVIEW_LM


def resolve(name_or_path: str) -> str:
    """Folder of an embedded model's short name; any other name or path unchanged."""
    if name_or_path == TINY_REVIEW_LM:
        return str(resources.files("dpalign") / "assets" / TINY_REVIEW_LM)
    return name_or_path
