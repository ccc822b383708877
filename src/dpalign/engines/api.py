"""The calls of vLLM's OpenAI-compatible server that are used: models, adapters, and completions of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError
from ..settings.rollouts import SamplingConfig
from .wire import Wire

# All said, because a server fills what is left open from its model's generation_config: the law must be the policy's.
WHOLE_LAW = {
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "n": 1,
}  # fmt: skip
NOT_FOUND = 404  # of a completion: the adapter is no longer there
REFUSED = (400, 413, 422)  # of a completion: this prompt, and nothing else


class Completions:
    """One server; `model` in each call is the name of its base or of an adapter."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def models(self) -> dict[str, int | None]:
        """The longest sequence that each of its models takes, if it says that, by name.

        Raises:
            EngineError: nobody answers, or in another way than vLLM.
        """
        listed = self.wire.told("/v1/models", None, "to list its models")
        try:
            return {str(one["id"]): one.get("max_model_len") for one in listed["data"]}
        except (TypeError, KeyError, AttributeError):
            raise self._foreign() from None

    def load(self, name: str, folder: Path) -> None:
        """Has it load an adapter.

        Raises:
            EngineError: it does not; it says why (a rank above --max-lora-rank, say).
        """
        self.wire.told("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, "an adapter")

    def unload(self, name: str) -> None:
        """Has it forget an adapter."""
        self.wire.told("/v1/unload_lora_adapter", {"lora_name": name}, "to unload an adapter")

    def logprobs(self, model: str, rows: Sequence[list[int]]) -> list[Tensor]:
        """Of each public row, log-probabilities `(length - 1,)` of all tokens but the first.

        Raises:
            EngineError: it does not say them.
        """
        asked = {"model": model, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 1.0, **WHOLE_LAW}
        answers = self.wire.ask_each("/v1/completions", [asked | {"prompt": row} for row in rows])
        found = []
        for row, (status, value) in zip(rows, answers, strict=True):
            if status != 200:
                raise EngineError(
                    f"the rollout engine at {self.wire.url} refused the public probe ({status}): it serves another "
                    "model or vocabulary, or has lost its adapter."
                )
            said = _chosen(value)[1]
            if len(said) != len(row) or any(type(p) is not float and type(p) is not int for p in said[1:]):
                raise self._foreign()
            found.append(torch.tensor(said[1:], dtype=torch.float32))
        return found

    def complete(
        self,
        model: str,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        config: SamplingConfig,
        stop_ids: list[int],
    ) -> list[list[int] | None]:
        """Ids of a completion of each prompt, up to and including the token that ends it; None where it is refused.

        Raises:
            EngineError: it fails; nothing is said of any prompt.
        """
        asked = {
            "model": model,
            "max_tokens": config.max_completion_length,
            "min_tokens": config.min_completion_length,
            "temperature": config.temperature,
            "stop_token_ids": stop_ids,
            "ignore_eos": True,  # what ends a completion is among the stop ids
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            **WHOLE_LAW,
        }
        each = [asked | {"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
        found: list[list[int] | None] = []
        for status, value in self.wire.ask_each("/v1/completions", each):
            if status != 200 and status not in REFUSED:
                lost = "has lost its adapter" if status == NOT_FOUND else f"fails ({status})"
                raise EngineError(
                    f"the rollout engine at {self.wire.url} {lost}: start it again, and the same command goes on."
                )
            found.append(self._ids(value, config, stop_ids) if status == 200 else None)
        return found

    def _ids(self, value: Any, config: SamplingConfig, stop_ids: list[int]) -> list[int] | None:
        """The ids of an answer; None if it is no completion by the rules that it was asked for."""
        tokens = _chosen(value)[0]
        try:
            ids = [int(str(token).removeprefix("token_id:")) for token in tokens]
        except ValueError:
            return None
        ends = [place for place, token in enumerate(ids) if token in stop_ids]
        ids = ids[: ends[0] + 1] if ends else ids
        is_whole = len(ids) == config.max_completion_length or bool(ends)
        return ids if is_whole and len(ids) <= config.max_completion_length else None

    def _foreign(self) -> EngineError:
        return EngineError(f"what answers at {self.wire.url} does not speak vLLM's completions API.")


def _chosen(value: Any) -> tuple[list[Any], list[Any]]:
    """Tokens and log-probabilities of an answer's only choice; empty if it has none."""
    try:
        said = value["choices"][0]["logprobs"]
        return list(said["tokens"]), list(said["token_logprobs"])
    except (TypeError, KeyError, IndexError):
        return [], []
