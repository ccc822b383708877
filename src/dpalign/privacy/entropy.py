"""Randomness that the guarantee rests on: bytes from the operating system, used once.

Nothing is keyed, stored or logged, so no stream can be repeated by a resume or shared by two steps.
A seeded source exists for debugging; whatever used it is marked NOT PRIVATE.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..errors import DPAlignError

AT_ONCE = 2**16  # normals that are made together: what they need on the way stays in a processor's cache


class SystemEntropy:
    """Fresh bytes from the operating system's cryptographic generator."""

    private = True

    def of_unit(self, unit: int) -> SystemEntropy:
        """One unit's own coins, whoever else is there and whichever process draws them: always fresh ones."""
        return self

    def bytes(self, count: int) -> bytes:
        return os.urandom(count)

    def uniforms(self, count: int) -> np.ndarray:
        """`(count,)` float64 uniforms in (0, 1], 53 bits each."""
        integers = np.frombuffer(self.bytes(8 * count), dtype=np.uint64) >> np.uint64(11)
        uniforms: np.ndarray = (integers.astype(np.float64) + 1.0) * 2.0**-53
        return uniforms

    def normals(self, count: int) -> np.ndarray:
        """`(count,)` float64 standard normals.

        Each is half the sum of four Box-Muller normals, which blunts attacks on the floating-point
        grid of a single one (Holohan and Braghin 2021, arXiv 2107.10138).
        """
        normals = np.empty(count)
        parts = [normals[start : start + AT_ONCE] for start in range(0, count, AT_ONCE)]
        if self.threads == 1 or len(parts) < 2:
            for part in parts:
                self._fill(part)
        else:
            with ThreadPoolExecutor(self.threads) as threads:
                list(threads.map(self._fill, parts))  # raises what one of them has raised
        return normals

    @property
    def threads(self) -> int:
        """That may draw together: bytes are fresh, whichever thread asks first."""
        return torch.get_num_threads()

    def _fill(self, part: np.ndarray) -> None:
        pairs = 2 * len(part)
        radius = np.sqrt(-2.0 * np.log(self.uniforms(pairs)))
        angle = 2.0 * np.pi * self.uniforms(pairs)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        part[:] = both.reshape(4, len(part)).sum(axis=0) / 2.0


class SeededEntropy(SystemEntropy):
    """Reproducible bytes for debugging: anyone who knows the seed can subtract the noise. NOT PRIVATE.

    `label` separates the streams of different attempts and steps.
    """

    private = False
    threads = 1  # the order in which bytes are asked for is part of the stream

    def __init__(self, seed: int, label: str = "") -> None:
        self.seed, self.label = seed, label
        self._key = f"{seed}/{label}".encode()
        self._calls = 0

    def of_unit(self, unit: int) -> SystemEntropy:
        return SeededEntropy(self.seed, f"{self.label}/unit {unit}")

    def bytes(self, count: int) -> bytes:
        self._calls += 1
        return hashlib.shake_256(self._key + self._calls.to_bytes(8, "little")).digest(count)


class NoEntropy(SystemEntropy):
    """Of a process that draws nothing: not the sample, and not the noise."""

    def bytes(self, count: int) -> bytes:
        raise DPAlignError("only a run's first process draws, and this one is another.")
