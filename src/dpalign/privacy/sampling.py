"""Poisson sampling of privacy units."""

from __future__ import annotations

import math

import numpy as np

from ..errors import DPAlignError
from .entropy import SystemEntropy


def poisson_sample(units: int, sampling_rate: float, entropy: SystemEntropy) -> np.ndarray:
    """Sorted `(size,)` int64 indices in [0, units), each included independently with `sampling_rate`.

    The gaps between included units are geometric, so time and memory follow the sample, not `units`.
    The sample may be empty; that is a step like any other.
    """
    if not 0 < sampling_rate <= 1:
        raise DPAlignError(f"sampling rate {sampling_rate:g} is not in (0, 1].")
    if sampling_rate == 1:
        return np.arange(units, dtype=np.int64)
    chunks: list[np.ndarray] = []
    position = -1
    while position < units:
        expected = (units - position) * sampling_rate
        count = int(expected + 4 * math.sqrt(expected) + 16)
        gaps = np.floor(np.log(entropy.uniforms(count)) / math.log1p(-sampling_rate)) + 1
        indices = position + np.cumsum(np.minimum(gaps, units + 1.0))
        chunks.append(indices[indices < units].astype(np.int64))
        position = int(min(indices[-1], units))
    return np.concatenate(chunks)
