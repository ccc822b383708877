"""How far the texts that people judged are from what the policy writes, as the reward model reads both.

A reward is learned on people's pairs and used on a policy's text: where the two are far apart, agreement with people
says little of what it does to the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS, ROWS_PER_DIRECTION = 16, 6
INSIDE = 0.95  # of the policy's own texts
FEWEST = 8  # texts of either kind: fewer say nothing


@dataclass(frozen=True)
class Apart:
    """In the leading directions of what a reward model reads of the policy's own text, each over its deviation there.

    shift: root mean square of the distance between the two means, less what chance puts there: 0 for texts of one law,
    1 where they are one deviation of the policy's own text apart in every direction. outside: share of people's texts
    that are farther out than 95% of the policy's, so 0.05 for texts of one law. own_texts: of the policy.
    """

    shift: float
    outside: float
    own_texts: int


def apart(own: Tensor, judged: Tensor) -> Apart | None:
    """Of what the reward model reads of the policy's own texts and of the judged ones, both `(texts, width)` float.

    One half of the own texts gives the directions and their deviations, the other is compared with the judged ones.
    None where either has fewer than 8 that it can read, or the policy always writes the same.
    """
    own, judged = (rows[rows.isfinite().all(1)].double() for rows in (own, judged))
    if min(len(own) // 2, len(judged)) < FEWEST:
        return None
    base, compared = own[0::2], own[1::2]
    center = base.mean(0)
    _, deviations, directions = torch.linalg.svd(base - center, full_matrices=False)
    found = int((deviations > 1e-6 * deviations[0]).sum()) if deviations[0] > 0 else 0
    count = min(DIRECTIONS, max(1, len(base) // ROWS_PER_DIRECTION), found)
    if count == 0:
        return None
    scale = directions[:count].T / (deviations[:count] / (len(base) - 1) ** 0.5)
    here, there = ((rows - center) @ scale for rows in (compared, judged))
    chance = here.var(0) / len(here) + there.var(0) / len(there)
    squared = ((there.mean(0) - here.mean(0)) ** 2 - chance).mean()
    limit = here.norm(dim=1).quantile(INSIDE)
    return Apart(float(squared.clamp(min=0).sqrt()), float((there.norm(dim=1) > limit).double().mean()), len(own))
