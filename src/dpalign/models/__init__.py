"""The policy: a causal language model with stacked LoRA adapters, and generation from it."""

from .policy import AdapterConfig, ModelConfig, Policy

__all__ = ["AdapterConfig", "ModelConfig", "Policy"]
