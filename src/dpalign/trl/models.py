"""What a script of TRL 0.11's loop imports beside the trainer."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import DPAlignError
from ..models import Policy, embedded


@dataclass(frozen=True)
class ValueHead:
    """How TRL 0.11 makes a value head, under its names: random weights, or normal ones; dropout before it.

    Dropout is on in every pass, as in TRL, where a model stays in training mode.

    Raises:
        DPAlignError: a strategy that TRL does not know, or no probability.
    """

    summary_dropout_prob: float = 0.1
    v_head_initializer_range: float = 0.2
    v_head_init_strategy: str | None = None

    def __post_init__(self) -> None:
        if self.v_head_init_strategy not in (None, "normal"):
            raise DPAlignError(f"v_head_init_strategy={self.v_head_init_strategy!r}: TRL knows 'normal' and None.")
        if not 0 <= self.summary_dropout_prob < 1 or not 0 <= self.v_head_initializer_range < float("inf"):
            raise DPAlignError("summary_dropout_prob must be in [0, 1), and v_head_initializer_range a deviation.")

    def prepare(self, head: nn.Linear) -> None:
        """Gives a fresh head its weights and its dropout."""
        head.reset_parameters()
        if self.v_head_init_strategy == "normal":
            nn.init.normal_(head.weight, std=self.v_head_initializer_range)
            nn.init.zeros_(head.bias)
        if self.summary_dropout_prob:
            head.register_forward_pre_hook(
                lambda head, inputs: nn.functional.dropout(inputs[0], self.summary_dropout_prob)
            )


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal LM that `PPOTrainer` trains: a LoRA adapter and a value head, made as in TRL.

    pretrained_model: the model as it was loaded; it is never changed. policy: what the trainer trains; `generate`
    samples from it once there is one.
    """

    policy: Policy | None

    def __init__(
        self,
        pretrained_model: PreTrainedModel,
        peft_config: LoraConfig | None = None,
        value_head: ValueHead = ValueHead(),
    ) -> None:
        super().__init__()
        if isinstance(pretrained_model, PeftModel) or getattr(pretrained_model, "_hf_peft_config_loaded", False):
            raise DPAlignError(
                "the model has peft adapters already: merge them (`dpalign export`, or peft's merge_and_unload and "
                "save_pretrained), and load that folder."
            )
        self.pretrained_model, self.peft_config, self.value_head = pretrained_model, peft_config, value_head
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
        for name in ("reward_adapter", "reward_adapter_name", "is_trainable"):
            if options.pop(name, None) is not None:
                raise DPAlignError(f"{name} cannot be honoured: one adapter is trained, and nothing else.")
        value_head = ValueHead(**{f.name: options.pop(f.name) for f in fields(ValueHead) if f.name in options})
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            return cls(pretrained_model_name_or_path, peft_config, value_head)
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.float32)  # as transformers loaded it in TRL 0.11's time
        folder = embedded.resolve(pretrained_model_name_or_path)
        return cls(AutoModelForCausalLM.from_pretrained(folder, *args, **options), peft_config, value_head)

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
