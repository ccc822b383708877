"""dpalign: align language models with private data under one (epsilon, delta) guarantee."""

from .version import __version__

__all__ = ["__version__"]
