"""The reward."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..domains import LENGTH, SCALE, SEEDS, check_settings, within
from ..errors import DPAlignError

RELEASED, FITTED = "reward_model", "fitted"
JUDGE, CONTRAST, MEAN = "judge", "contrast", "mean"  # sources that need nobody's data
BASE = "base"  # the model behind `judge:base`
MEANINGS = {
    "questions": (JUDGE,),
    "wanted": (CONTRAST,),
    "unwanted": (CONTRAST,),
    "written_tokens": (CONTRAST,),
    "of": (MEAN,),
    "weights": (MEAN,),
    "base": (JUDGE, CONTRAST, MEAN),
    "written_texts": (JUDGE, CONTRAST, MEAN),
    "written_seed": (JUDGE, CONTRAST, MEAN),
}  # fields of the rewards that need nobody's data


@dataclass
class RewardConfig:
    """The public reward function.

    Args:
        source: `vader` (sentiment lexicon, -1 to 1), `classifier:PATH` (a Hugging Face text-classification
            model), `module:function` with the signature f(prompts, completions, **columns) -> list[float],
            `reward_model` (that of this recipe's reward stage) or `reward_model:PATH` (the release of one); or one that
            needs nobody's data: `judge:MODEL` (a causal LM that answers `questions`; `judge:base` is the run's own),
            `contrast` (of what the run's own model writes when it is asked for what is `wanted` and `unwanted`), `mean`
            (of the scores in `of`), or `fitted:FOLDER` (one of these as a run left it in its folder rewards/).
        is_public: declares that the reward was made without the private data; `vader` is public by itself, and the
            release of a reward model says itself what it was made from.
        text: what is read: `completion`, or `prompt+completion`. Default: the completion; both for a reward model and
            a judge.
        label: classifier label whose score is the reward; default: the last label.
        use_logit: the label's logit instead of its probability.
        max_length: tokens that a classifier, judge or contrast reads; every text is padded to that many.
        scale, shift: the reward is scale * score + shift; constants, never statistics of private data.
        low, high: declared range of the reward; clipped to it for training and for the noised metric. Needed
            for callables and logits; -4 to 4 standard deviations for a reward model, judge, contrast or mean.
        columns: columns of the data that the function is given as keyword arguments, None where a record has none.
        batched: call a Python function with 32 rows at a time instead of one (the last row repeated, where there are
            fewer). Faster with a model behind it; that rows do not touch each other is then checked, not structure.
        questions: that a judge answers about each text with yes or no. Its score is log P(yes) - log P(no), each
            question's standardised on self-written text, and then averaged.
        wanted, unwanted: what the model is asked to write for a contrast (of a model without a chat template:
            beginnings of a text).
        written_tokens: most tokens of a text that is written for a contrast.
        of: sections like this one, whose scores are standardised on self-written text and averaged.
        weights: of the scores in `of`; default: all alike.
        base: a public causal LM that asks, writes and is read instead of the run's own; needed where there is no run.
        written_texts: that the model writes for each side of a contrast; twice as many show the scale of a score.
        written_seed: of what it writes.
    """

    source: str = "vader"
    is_public: bool = False
    text: Literal["completion", "prompt+completion"] | None = None
    label: str | None = None
    use_logit: bool = False
    max_length: int = within(128, LENGTH)
    scale: float = within(1.0, SCALE)
    shift: float = within(0.0, SCALE)
    low: float | None = within(None, SCALE)
    high: float | None = within(None, SCALE)
    columns: list[str] = field(default_factory=list)
    batched: bool = False
    questions: list[str] = field(default_factory=list)
    wanted: str | None = None
    unwanted: str | None = None
    written_tokens: int = within(40, "[1, 4096]")
    of: list[dict[str, Any]] = field(default_factory=list)
    weights: list[float] | None = within(None, "(0, 1e6]")
    base: str | None = None
    written_texts: int = within(128, "[8, 100000]")
    written_seed: int = within(0, SEEDS)

    @property
    def kind(self) -> str:
        """What stands before the colon of the source."""
        return self.source.partition(":")[0]

    @property
    def is_written(self) -> bool:
        """Whether it rests on what a public model writes itself, and so on nobody's data."""
        return self.kind == JUDGE or self.source in (CONTRAST, MEAN)

    @property
    def parts(self) -> list[RewardConfig]:
        """The sections in `of`; what a mean declares and says of its model holds for each that does not say so.

        Raises:
            DPAlignError: a field that no reward has.
        """
        known = {f.name for f in fields(RewardConfig)}
        found = []
        for number, section in enumerate(self.of, 1):
            unknown = sorted(map(str, section.keys() - known))
            if unknown:
                raise DPAlignError(f"reward {number} of the mean has no field {unknown[0]}.")
            part = RewardConfig(**section)
            base = part.base or (self.base if part.is_written else None)
            found.append(replace(part, is_public=part.is_public or self.is_public, base=base))
        return found

    def validate(self) -> None:
        """Raises DPAlignError for a range that is empty, a scale that makes all texts alike, and what means nothing."""
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise DPAlignError(f"the reward's range [{self.low}, {self.high}] must be finite and not empty.")
        if self.scale == 0:
            raise DPAlignError("a reward of scale 0 is the same for all texts.")
        for f in fields(self):
            plain = f.default_factory() if callable(f.default_factory) else f.default
            if self.kind not in MEANINGS.get(f.name, (self.kind,)) and getattr(self, f.name) != plain:
                raise DPAlignError(f"{f.name} is for a reward {' or '.join(MEANINGS[f.name])}, not {self.source!r}.")
        if self.kind == JUDGE and not self.questions:
            raise DPAlignError("a judge needs questions: what is it to answer about a text?")
        if self.source == CONTRAST and (self.wanted is None or self.unwanted is None):
            raise DPAlignError("a contrast needs wanted and unwanted: what the model is asked to write for each side.")
        if self.source == MEAN:
            self._check_mean()

    def _check_mean(self) -> None:
        if not self.of:
            raise DPAlignError("a mean needs rewards in `of`.")
        if self.weights is not None and len(self.weights) != len(self.of):
            raise DPAlignError(f"weights has {len(self.weights)} numbers for {len(self.of)} rewards in `of`.")
        for number, part in enumerate(self.parts, 1):
            check_settings(part, f"of {number}")
            if part.source in (MEAN, RELEASED) or part.kind == FITTED:
                raise DPAlignError(
                    f"of {number}: {part.source} cannot be part of a mean: list single rewards (of a trained reward "
                    "model its release: reward_model:PATH)."
                )
