"""Both layers of a stage that see it from inside: its step on known inputs, and one run with ghosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import DPAlignError
from ..privacy import accountant
from ..privacy.context import own_context
from ..privacy.gate import PrivateStep
from . import black_box, bounds, ghosts
from .checks import Check, count, noise_scale
from .found import Audit, Bound
from .ghosts import Canaries, Seen, Subject
from .step import check_step

STEP, RUN, EMPTY, OUTSIDE = "step", "white box", "nobody", "black box"
FEWEST = 20  # canaries


@own_context()
def audit_stage(
    subject: Subject,
    folder: Path,
    *,
    canaries: int = 1000,
    confidence: float = 0.999,
    with_black_box: bool = False,
    tell: Callable[[str], None] = lambda message: None,
) -> Audit:
    """Audits one stage; what it writes lies in `folder`, and its ledger there is no one else's.

    Args:
        confidence: that each bound is not above the true epsilon.
        with_black_box: also train once more, on canary texts, and attack what was trained.

    Raises:
        DPAlignError: there is no claim to audit, too few canaries, or no confidence.
    """
    if canaries < FEWEST or not 0.5 < confidence < 1:
        raise DPAlignError(f"an audit needs at least {FEWEST} canaries and a confidence between 0.5 and 1.")
    ghosts.check_subject(subject)
    for name in (STEP, RUN, EMPTY, OUTSIDE):
        (folder / name).mkdir(parents=True)
    tell("the step on known inputs")
    of_step = check_step(step_of(subject), folder / STEP, subject.config.adapter.kind == "full")
    tell("a run on nobody")
    of_nobody = nobody(subject, canaries, folder / EMPTY)
    tell(f"a run with {canaries} canaries")
    seen = ghosts.run(subject, Canaries.draw(canaries), folder / RUN)
    delta, attack = subject.plan.target_delta, None
    if with_black_box:
        tell("a run with canary texts")
        scored = black_box.train_and_score(subject, Canaries.draw(canaries), folder / OUTSIDE)
        attack = black_box.attack_of(scored, delta, confidence)
    return Audit(
        stage=subject.kind.name,
        epsilon=accountant.epsilon(seen.claims, delta),
        delta=delta,
        sampling_rate=subject.plan.sampling_rate,
        steps=subject.plan.steps,
        noise_multiplier=subject.plan.noise_multiplier,
        canaries=canaries,
        confidence=confidence,
        bounds=bounds_of(seen, delta, confidence),
        checks={STEP: tuple(of_step), RUN: (*ghosts.checks(seen), *of_nobody)},
        attack=attack,
    )


def step_of(subject: Subject) -> PrivateStep:
    """One step of the stage, as its loop would ask for it."""
    config = subject.config
    return PrivateStep(
        subject.plan.mechanism(1),
        max_grad_norm=config.max_grad_norm,
        divisor=config.expected_batch_size,
        clipping=config.clipping,
        clipping_gamma=config.clipping_gamma,
        metrics=subject.kind(config, **subject.rewards).metrics if config.metrics_noise_ratio > 0 else (),
    )


def bounds_of(seen: Seen, delta: float, confidence: float) -> tuple[Bound, ...]:
    """All lower bounds, from one run."""
    included = seen.canaries.included
    scores = bounds.Scores(seen.scores(), included)
    of_sum = bounds.gaussian(seen.present(), seen.signals[:, ~included], seen.claims, delta, confidence)
    return (
        Bound("Gaussian sum", "arXiv 2606.12733", of_sum),
        Bound("order statistics", "arXiv 2509.08704", bounds.order_statistics(scores, delta, confidence)),
        Bound("f-DP recursion", "arXiv 2410.22235", bounds.f_dp(scores, delta, confidence)),
        Bound("Steinke et al.", "arXiv 2305.08846", bounds.steinke(scores, delta, confidence)),
    )


def nobody(subject: Subject, canaries: int, folder: Path) -> list[Check]:
    """The same loop where there are no units at all, so that every sample is empty: each step is noise all the same."""
    none = replace(Canaries.draw(canaries), included=np.zeros(canaries, dtype=bool))
    seen = ghosts.run(replace(subject, written=0), none, folder)
    journaled = sum(claim.steps * claim.passes for claim in seen.claims)
    checks = [count("nobody: releases", "noisy updates of empty samples", len(seen.signals), journaled)]
    if len(seen.signals):
        standard = seen.signals / seen.deviation
        checks.append(noise_scale("nobody: noise", "standard deviation of their noise over sigma C", standard))
    return checks
