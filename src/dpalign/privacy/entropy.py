"""Randomness that the guarantee rests on: bytes from the operating system, or under a key from it, used once.

The operating system makes a few hundred million bytes a second, and a normal takes 32 of them. What is long is
therefore the keystream of AES-256 in counter mode under a key that the operating system draws for this call alone. No
key is stored or logged, so no stream can be repeated by a resume or shared by two steps or processes.

A seeded source exists for debugging; whatever used it is marked NOT PRIVATE.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ..errors import DPAlignError

AT_ONCE = 2**16  # normals that are made together: what they need on the way stays in a processor's cache
KEY = 32  # bytes of a key


class SystemEntropy:
    """Fresh bytes, from the operating system's cryptographic generator or under a key from it."""

    private = True

    def of_unit(self, unit: int) -> SystemEntropy:
        """One unit's own coins, whoever else is there and whichever process draws them: always fresh ones."""
        return self

    def bytes(self, count: int) -> bytes:
        if count <= KEY:
            return os.urandom(count)
        stream = Cipher(algorithms.AES(os.urandom(KEY)), modes.CTR(bytes(16))).encryptor()  # one key, one stream
        return stream.update(bytes(count))

    def uniforms(self, count: int) -> np.ndarray:
        """`(count,)` float64 uniforms in (0, 1], 53 bits each."""
        integers = np.frombuffer(self.bytes(8 * count), dtype=np.uint64) >> np.uint64(11)
        uniforms = torch.from_numpy(integers.view(np.int64)).double().add_(1.0).mul_(2.0**-53)  # in vector registers
        array: np.ndarray = uniforms.numpy()
        return array

    def normals(self, count: int) -> np.ndarray:
        """`(count,)` float64 standard normals.

        Each is half the sum of the four Box-Muller normals of two pairs of radius r and angle a. Those of a pair add up
        to sqrt(2) r sin(a + pi/4), so that it is two independent normals over sqrt(2), and a function of four uniforms:
        harder to attack by the grid of floats than one (Holohan and Braghin 2021, arXiv 2107.10138).
        """
        normals = np.empty(count)
        for start in range(0, count, AT_ONCE):
            self._fill(normals[start : start + AT_ONCE])
        return normals

    def _fill(self, part: np.ndarray) -> None:
        pairs = 2 * len(part)
        radius = torch.from_numpy(self.uniforms(pairs)).log_().mul_(-2.0).sqrt_()
        angle = torch.from_numpy(self.uniforms(pairs)).add_(0.125).mul_(2.0 * math.pi)
        two = radius.mul_(angle.sin_()).view(2, len(part))
        torch.add(two[0], two[1], out=torch.from_numpy(part)).mul_(math.sqrt(0.5))


class SeededEntropy(SystemEntropy):
    """Reproducible bytes for debugging: anyone who knows the seed can subtract the noise. NOT PRIVATE.

    `label` separates the streams of different attempts and steps.
    """

    private = False

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
