"""Settings of DP-SFT."""

from __future__ import annotations

from dataclasses import dataclass

from ..domains import within
from ..errors import DPAlignError
from .base import TrainingConfig


@dataclass(kw_only=True)
class SFTConfig(TrainingConfig):
    """Settings of DP-SFT.

    Records have `messages` (or ShareGPT's `conversations`), `text`, or `prompt` and `completion`. A chat
    is what the tokenizer's chat template writes; a record's `tools` and `chat_template_kwargs` go to it.

    Args:
        completion_only_loss: learn the completion and not the prompt; default: where there is a prompt.
        assistant_only_loss: learn what the assistant says in a chat, by the template's `{% generation %}` marks.
        prepend_bos: put the tokenizer's BOS in front of every string; a chat template writes its own.
        append_eos: end every string that is not cut with EOS; a chat template ends its own.
        loss_range: declared upper end of the noised loss metric, in nats per token.
    """

    inits = ("random", "activations")

    learning_rate: float = within(3e-4, "[0, 1000]")
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    prepend_bos: bool = False
    append_eos: bool = True
    loss_range: float = within(10.0, "(0, 1e6]")

    def validate(self) -> None:
        super().validate()
        if self.max_length < 2:
            raise DPAlignError(f"max_length {self.max_length} must be at least 2: one token predicts nothing.")
