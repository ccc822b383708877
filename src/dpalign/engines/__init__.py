"""What samples a policy's completions: this process, or a server whose weights are verified after every push."""

from .base import Generator
from .engine import Engine, reach
from .local import Local

__all__ = ["Engine", "Generator", "Local", "reach"]
