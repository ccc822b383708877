"""Measuring models: exactly on public prompts and pairs, or by one noisy release on private units."""

from .apart import Apart, apart
from .best_of import BestOf, best_of
from .compare import Compared, Comparison, compare
from .guarantee import stated_epsilon
from .metrics import (
    Evaluation,
    Measured,
    PublicPrompts,
    evaluate_policy,
    evaluate_stages,
    logprobs_under,
    measure_policy,
    of_each_stage,
    public_prompts,
)
from .preferences import PairEvaluation, agreement_on, evaluate_pairs
from .text_overlap import reference_texts, rouge
from .texts import TextEvaluation, text_loss
from .win_rate import WinRate, higher_wins, judged, load_judge, win_rate

__all__ = [
    "Apart",
    "BestOf",
    "Compared",
    "Comparison",
    "Evaluation",
    "Measured",
    "PairEvaluation",
    "PublicPrompts",
    "TextEvaluation",
    "WinRate",
    "agreement_on",
    "apart",
    "best_of",
    "compare",
    "evaluate_pairs",
    "evaluate_policy",
    "evaluate_stages",
    "higher_wins",
    "judged",
    "load_judge",
    "logprobs_under",
    "measure_policy",
    "of_each_stage",
    "public_prompts",
    "reference_texts",
    "rouge",
    "stated_epsilon",
    "text_loss",
    "win_rate",
]
