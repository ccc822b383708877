"""Text that a model writes by itself: post-processing of the model, whatever it is used for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DPAlignError
from .policy import Policy


def write_prompts(policy: Policy, count: int, prompt_tokens: int, rows_at_once: int) -> Tensor:
    """`(count, 1 + prompt_tokens)` ids that the policy writes after BOS (EOS where there is none); reads no record.

    Raises:
        DPAlignError: the tokenizer has neither.
    """
    start = policy.tokenizer.bos_token_id
    start = policy.tokenizer.eos_token_id if start is None else start
    if start is None:
        raise DPAlignError("self-written prompts need a tokenizer with a BOS or EOS token to start from.")
    front = torch.full((count, 1), start, device=policy.device)
    return policy.sample(
        front, torch.ones_like(front), prompt_tokens, min_new_tokens=prompt_tokens, rows_at_once=rows_at_once
    ).input_ids
