"""What a script of TRL 0.11's loop imports beside the trainer."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import DPAlignError
from ..models import Policy, embedded

HEAD_OPTIONS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal LM that `PPOTrainer` trains: a LoRA adapter and a value head, which is zero at first.

    pretrained_model: the model as it was loaded; it is never changed. policy: what the trainer trains; `generate`
    samples from it once there is one.
    """

    policy: Policy | None

    def __init__(self, pretrained_model: PreTrainedModel, peft_config: LoraConfig | None = None) -> None:
        super().__init__()
        if isinstance(pretrained_model, PeftModel) or getattr(pretrained_model, "_hf_peft_config_loaded", False):
            raise DPAlignError(
                "the model has peft adapters already: merge them (`dpalign export`, or peft's merge_and_unload and "
                "save_pretrained), and load that folder."
            )
        self.pretrained_model, self.peft_config = pretrained_model, peft_config
        self.is_peft_model = peft_config is not None
        self.follow(None)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PreTrainedModel, *args: Any, **options: Any
    ) -> AutoModelForCausalLMWithValueHead:
        """As TRL's: a name, folder or model; `peft_config`, and what transformers' `from_pretrained` takes.

        Raises:
            DPAlignError: an option of TRL's that has no counterpart.
        """
        peft_config = options.pop("peft_config", None)
        for name in (*HEAD_OPTIONS, "reward_adapter", "reward_adapter_name", "is_trainable"):
            if options.pop(name, None) is not None:
                raise DPAlignError(f"{name} cannot be honoured: the value head is one linear layer, zero at first.")
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            return cls(pretrained_model_name_or_path, peft_config)
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.float32)  # as transformers loaded it in TRL 0.11's time
        folder = embedded.resolve(pretrained_model_name_or_path)
        return cls(AutoModelForCausalLM.from_pretrained(folder, *args, **options), peft_config)

    def follow(self, policy: Policy | None) -> None:
        """What `generate` samples from; not a part of this module, whose parameters stay those of the loaded model."""
        object.__setattr__(self, "policy", policy)

    @property
    def config(self) -> Any:
        return self.pretrained_model.config

    def generate(self, *args: Any, **options: Any) -> Any:
        """transformers' `generate`, of the policy as it is trained so far."""
        model: Any = self.pretrained_model if self.policy is None else self.policy.model
        return model.generate(*args, **options)


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead, num_shared_layers: int | None = None, pattern: str | None = None
) -> AutoModelForCausalLMWithValueHead:
    """A copy of the model, as TRL's; `PPOTrainer` does without: its reference is the policy without its adapter.

    Raises:
        DPAlignError: shared layers, which TRL freezes.
    """
    if num_shared_layers is not None or pattern is not None:
        raise DPAlignError(
            "num_shared_layers cannot be honoured: the whole model is frozen under the adapter, and is the reference; "
            "leave num_shared_layers out."
        )
    return copy.deepcopy(model).eval()


class LengthSampler:
    """A random length in [min_value, max_value), as TRL's."""

    def __init__(self, min_value: int, max_value: int) -> None:
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return int(np.random.choice(self.values))


def set_seed(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
