"""Where a stage that learns from what the policy writes gets its prompts: from records, or from nobody."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar

from ..domains import shown
from ..errors import DPAlignError
from .base import TrainingConfig

PRIVATE, SELF_WRITTEN, PUBLIC = "private", "self_written", "public:"


@dataclass(kw_only=True)
class PromptedConfig(TrainingConfig):
    """Settings of a stage whose prompts may be no one's.

    Args:
        prompts: `private`: those of the stage's records. `self_written`: the model writes them. `public:PATH`, or
            `{public: PATH}`: those of a file that you declare public. The last two read no record, so the stage draws
            and spends nothing: it has an ordinary optimiser, for which expected_batch_size is the prompts of an update
            and max_grad_norm the clip of its gradient's norm.
    """

    # What says how records are drawn or protected, and nothing else.
    of_private_prompts: ClassVar[tuple[str, ...]] = (
        "target_epsilon", "target_delta", "noise_multiplier", "num_train_epochs", "adam_noise_correction",
        "adam_noise_floor", "clipping", "clipping_gamma", "metrics_noise_ratio", "insecure_seed",
    )  # fmt: skip
    # What says how prompts that are no one's are completed, of a stage that completes no private ones.
    of_other_prompts: ClassVar[tuple[str, ...]] = ()

    prompts: str | dict[str, str] = PRIVATE

    def __post_init__(self) -> None:
        if isinstance(self.prompts, dict) and [*self.prompts] == ["public"]:
            self.prompts = f"{PUBLIC}{self.prompts['public']}"

    @property
    def draws(self) -> bool:
        return self.prompts == PRIVATE

    @property
    def public_prompts(self) -> str | None:
        """The file of public prompts, if there is one."""
        given = str(self.prompts)
        return given.removeprefix(PUBLIC) if given.startswith(PUBLIC) else None

    @property
    def read_prompts(self) -> str:
        """What is read instead of records, in words."""
        path = self.public_prompts
        if path is None:
            return "prompts that the model wrote itself"
        return f"the prompts of {path!r}, which were made without the private data (declared)"

    @property
    def updates(self) -> int:
        """Of a stage that draws nothing: whole phases of `minibatches`."""
        return self.schedule("", self.expected_batch_size).steps

    def validate(self) -> None:
        super().validate()
        if self.prompts not in (PRIVATE, SELF_WRITTEN) and not self.public_prompts:
            raise DPAlignError(
                f"prompts {shown(self.prompts)}: expected private, self_written or public:PATH (or {{public: PATH}})."
            )
        defaults = {f.name: _default(f) for f in fields(self)}
        meant = self.of_other_prompts if self.draws else self.of_private_prompts
        given = [name for name in meant if _plain(getattr(self, name)) != defaults[name]]
        if given and self.draws:
            raise DPAlignError(
                f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for prompts that are no one's, and with "
                f"prompts private nothing is completed or scored: leave {', '.join(given)} out, or say prompts: "
                "self_written or public:PATH."
            )
        if self.draws:
            return
        if given:
            raise DPAlignError(
                f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for private prompts, and with prompts "
                f"{self.prompts} nothing is drawn, clipped per unit or noised: leave {', '.join(given)} out."
            )
        if self.max_steps is None:
            raise DPAlignError(f"prompts {self.prompts}: say max_steps, the number of updates.")


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value  # a range, as YAML has it
