"""The released noise is Gaussian, of the claimed size in every tensor, and never the same twice."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from harness import Interrupted, Sampler, nobody, run_stage, sft, texts, through
from scipy import stats

from dpalign.errors import DPAlignError
from dpalign.privacy.entropy import AT_ONCE, NoEntropy, SeededEntropy, SystemEntropy
from dpalign.privacy.gate import Gate
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GaussianMechanism, MetricRange
from dpalign.training import Stage
from tiny import dataset

SIGMA, SIGMA_METRICS, C, DIVISOR = 1.3, 13.0, 0.7, 3.0
SHAPES = [torch.Size(s) for s in ((40, 25), (30,), (2, 3, 50))]


# 5 ---------------------------------------------------------------------------------------------------------


class TwoThirds(SystemEntropy):
    def normals(self, count: int) -> np.ndarray:
        return super().normals(count) * 2 / 3


class ThreeHalves(SystemEntropy):
    def normals(self, count: int) -> np.ndarray:
        return super().normals(count) * 3 / 2


class Uniform(SystemEntropy):
    def normals(self, count: int) -> np.ndarray:
        return (self.uniforms(count) - 0.5) * 12**0.5


class FirstTensorOnly(SystemEntropy):
    def normals(self, count: int) -> np.ndarray:
        return super().normals(count) * (np.arange(count) < SHAPES[0].numel())


def noise_p_values(entropy: SystemEntropy) -> list[float]:
    """The smaller p-value of chi-square and Kolmogorov-Smirnov for every tensor, the metrics block last."""
    mechanism = GaussianMechanism(
        SHAPES, max_grad_norm=C, noise_multiplier=SIGMA, divisor=DIVISOR, entropy=entropy,
        metrics=(MetricRange("a", -1, 1), MetricRange("b", 0, 4)), metrics_noise_multiplier=SIGMA_METRICS,
    )  # fmt: skip
    released, metrics = zip(*(mechanism.release() for _ in range(200)), strict=True)
    blocks = [torch.cat([r[i].flatten() for r in released]).numpy() / (SIGMA * C) for i in range(len(SHAPES))]
    scale = SIGMA_METRICS * 2**0.5  # a row of two metrics in [-1, 1] is scaled to norm 1
    blocks.append(np.array([[m["a"], (m["b"] - 2) / 2] for m in metrics]).flatten() / scale)
    return [min(*_p_values(block * DIVISOR)) for block in blocks]


def _p_values(standard: np.ndarray) -> tuple[float, float]:
    chi = stats.chi2.cdf((standard**2).sum(), len(standard))
    return 2 * min(chi, 1 - chi), stats.kstest(standard, "norm").pvalue


def test_noise_is_gaussian_of_the_claimed_size():
    """PRIVACY test 5: chi-square and KS per tensor; fails by chance less than once in 100,000 runs."""
    assert min(noise_p_values(SystemEntropy())) > 1e-6


@pytest.mark.parametrize("mutant", [TwoThirds, ThreeHalves])
def test_noise_of_another_size_is_rejected_in_every_tensor(mutant):
    """PRIVACY test 5, mutants: 2/3 and 3/2 of sigma."""
    assert max(noise_p_values(mutant())) < 1e-6


@pytest.mark.parametrize("mutant", [Uniform, FirstTensorOnly])
def test_noise_of_another_shape_is_rejected(mutant):
    """PRIVACY test 5, mutants: uniform noise of the right variance; one tensor noised alone."""
    assert min(noise_p_values(mutant())) < 1e-6


# 6 ---------------------------------------------------------------------------------------------------------


def largest_correlation(noises: list[np.ndarray]) -> float:
    """Largest |correlation| between two noise vectors, in standard deviations of independent ones."""
    length = min(len(n) for n in noises)
    pairs = itertools.combinations([n[:length] for n in noises], 2)
    return max(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs) * length**0.5


class SeededByStep(Gate):
    def _coins(self, attempt: int, number: int) -> SystemEntropy:
        return SeededEntropy(0, f"{number}")


class SeededByAttempt(Gate):
    def _coins(self, attempt: int, number: int) -> SystemEntropy:
        return SeededEntropy(0, f"{attempt}")


def noises_of_an_interrupted_run(stage_class: type[Stage], folder: Path) -> list[np.ndarray]:
    """Noise of every step of a run that dies at its third draw and resumes; empty samples release noise alone."""
    data, ledger = dataset(texts()), Ledger(":memory:")

    def dies_at_third(data, call):
        if call == 3:
            raise Interrupted
        return []

    def run(sampler: Sampler) -> list[torch.Tensor]:
        algorithm = sft(noise_multiplier=1.0, max_steps=5)
        return run_stage(
            algorithm, data, stage_class=stage_class, sampler=sampler, folder=folder, ledger=ledger,
            answers_are_fixed=False,
        ).gradients  # fmt: skip

    noises = [g.numpy() for g in run(dies_at_third) + run(nobody)]
    assert len(noises) == 5 and max(i.attempt for i in ledger.intents()) == 1
    return noises


def noises_rolled_back(stage_class: type[Stage], folder: Path) -> list[np.ndarray]:
    """Noise of the first steps, before and after the run's folder was put back to its start."""
    data, ledger, noises = dataset(texts()), Ledger(":memory:"), []
    for attempt in range(2):

        def dies_at_third(data, call):
            if call == 3:
                raise Interrupted
            return []

        noises += run_stage(
            sft(noise_multiplier=1.0, max_steps=20), data, stage_class=stage_class, sampler=dies_at_third,
            folder=folder / str(attempt), ledger=ledger, answers_are_fixed=False,
        ).gradients  # fmt: skip
    return [g.numpy() for g in noises]


@pytest.mark.parametrize("noises_of", [noises_of_an_interrupted_run, noises_rolled_back])
def test_no_noise_is_used_twice(noises_of: Callable, tmp_path: Path):
    """PRIVACY test 6: noise of different steps and restarts is independent; keys that repeat are found."""
    assert largest_correlation(noises_of(Stage, tmp_path / "fresh")) < 6
    assert largest_correlation(noises_of(through(SeededByAttempt), tmp_path / "attempt")) > 20


def test_a_roll_back_with_noise_keyed_by_step_is_found(tmp_path: Path):
    """PRIVACY test 6, mutant: the step alone keys the noise, so a restart repeats it."""
    assert largest_correlation(noises_rolled_back(through(SeededByStep), tmp_path)) > 20


class SameForEveryTensor(SystemEntropy):
    def normals(self, count: int) -> np.ndarray:
        return np.resize(super().normals(500), count)


def tensors_and_passes(entropy: SystemEntropy) -> list[np.ndarray]:
    """Noise of two tensors in two passes on one sample."""
    shapes = [torch.Size([500])] * 2
    passes = [
        GaussianMechanism(shapes, max_grad_norm=1.0, noise_multiplier=1.0, divisor=1.0, entropy=entropy).release()[0]
        for _ in range(2)
    ]
    return [tensor.numpy() for released in passes for tensor in released]


def test_tensors_and_passes_have_their_own_noise():
    """PRIVACY test 6: independent across the tensors of a release and the passes over a sample."""
    assert largest_correlation(tensors_and_passes(SystemEntropy())) < 6
    assert largest_correlation(tensors_and_passes(SameForEveryTensor())) > 20


class EveryPartTheSame(SystemEntropy):
    def __init__(self) -> None:
        self.first = super().bytes(AT_ONCE * 16)

    def bytes(self, count: int) -> bytes:
        return self.first[:count]


class LastPartForgotten(SystemEntropy):
    def _fill(self, part: np.ndarray) -> None:
        part.fill(0.0)
        if len(part) == AT_ONCE:
            super()._fill(part)


def parts_of_many(entropy: SystemEntropy) -> list[np.ndarray]:
    """The beginnings of the parts in which many normals are drawn; the last part is short."""
    many = entropy.normals(3 * AT_ONCE + 1000)
    return [many[start : start + 1000] for start in range(0, len(many), AT_ONCE)]


def test_parts_of_many_have_their_own_noise():
    """PRIVACY test 6: independent, and all of it noise, where a release is drawn in parts."""
    right = parts_of_many(SystemEntropy())
    assert len(right) == 4 and largest_correlation(right) < 6
    assert min(float(stats.kstest(part, "norm").pvalue) for part in right) > 1e-6
    assert largest_correlation(parts_of_many(EveryPartTheSame())) > 20
    assert float(stats.kstest(parts_of_many(LastPartForgotten())[-1], "norm").pvalue) < 1e-6


class SameForEveryPart(SystemEntropy):
    """As where a release draws once and adds that to each part of its sums."""

    def __init__(self) -> None:
        self._first = super().normals(AT_ONCE)

    def normals(self, count: int) -> np.ndarray:
        return self._first[:count]


LONG = [torch.Size(s) for s in ((AT_ONCE - 1000,), (2, 1000), (AT_ONCE // 4, 5))]  # over two ends of parts, one of them a tensor's own


def long_release(entropy: SystemEntropy) -> tuple[list[torch.Tensor], np.ndarray]:
    """The tensors of a release of several parts without gradients, and the same, one behind the other."""
    mechanism = GaussianMechanism(LONG, max_grad_norm=1.0, noise_multiplier=1.0, divisor=1.0, entropy=entropy, dtype=torch.float64)
    released, _ = mechanism.release()
    return released, torch.cat([r.flatten() for r in released]).numpy()


def test_a_long_release_has_noise_of_its_own_everywhere():
    released, flat = long_release(SystemEntropy())
    parts = [flat[start : start + 1000] for start in (*range(0, len(flat), AT_ONCE), len(flat) - 1000)]
    assert [r.shape for r in released] == LONG and len(parts) == 4 and largest_correlation(parts) < 6
    assert min(float(stats.kstest(part, "norm").pvalue) for part in parts) > 1e-6
    repeated = long_release(SameForEveryPart())[1]
    assert largest_correlation([repeated[:1000], repeated[AT_ONCE : AT_ONCE + 1000]]) > 20


def test_a_long_release_adds_noise_to_what_is_there():
    """With known coins: what is released with gradients and without differs by the gradients alone, each in its place."""
    torch.manual_seed(0)
    grads = [torch.randn(1, *shape, dtype=torch.float64) for shape in LONG]
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    mechanism = GaussianMechanism(
        LONG, max_grad_norm=1.0, noise_multiplier=1.0, divisor=1.0, entropy=SeededEntropy(1), dtype=torch.float64, gamma=0.0
    )
    mechanism.add(grads)
    for found, noise, g in zip(mechanism.release()[0], long_release(SeededEntropy(1))[0], grads, strict=True):
        assert float((found - noise - g[0] / norm).abs().max()) <= 2 * mechanism.grid + 2e-5 * float(g.abs().max()) / norm


def test_a_normal_is_half_the_sum_of_four():
    """Those of two pairs, written out; both radii are drawn before both angles."""
    count, drawn = 1000, SeededEntropy(3)
    radii, angles = np.sqrt(-2 * np.log(drawn.uniforms(2 * count))), 2 * np.pi * drawn.uniforms(2 * count)
    four = [radii[half] * turn(angles[half]) for half in (slice(count), slice(count, None)) for turn in (np.cos, np.sin)]
    assert np.allclose(SeededEntropy(3).normals(count), sum(four) / 2, atol=1e-13)


def test_what_is_long_is_a_keystream_of_aes_256():
    """Known answer of NIST's AESAVS (VarKey, 256 bits, the first): a block of zeros, which is the counter's first."""
    drawn = []

    def system(count: int) -> bytes:
        drawn.append(count)
        return bytes([0x80]) + bytes(count - 1)

    with patch("os.urandom", system):
        entropy = SystemEntropy()
        stream, _, short = (entropy.bytes(count) for count in (1000, 1000, 8))
    assert stream[:16].hex() == "e35a6dcb19b201a01ebcfa8aa22b5759" and len(stream) == 1000
    blocks = {stream[start : start + 16] for start in range(0, 992, 16)}
    assert len(blocks) == 62 and short == bytes([0x80]) + bytes(7) and drawn == [32, 32, 8]  # a key for each


def test_a_process_that_draws_nothing_cannot():
    with pytest.raises(DPAlignError, match="first process draws"):
        NoEntropy().normals(2)


class UserSpaceGenerator(SystemEntropy):
    """Seeded from the operating system once; a forked process inherits its state."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng()

    def bytes(self, count: int) -> bytes:
        return self._generator.bytes(count)


def noises_of_ranks(entropy: SystemEntropy) -> list[np.ndarray]:
    """Noise drawn in the parent and in two processes forked from it."""
    context = multiprocessing.get_context("fork")
    noises = []
    for _ in range(2):
        read, write = context.Pipe(duplex=False)
        process = context.Process(target=lambda w=write: w.send(entropy.normals(1000)))
        process.start()
        noises.append(read.recv())
        process.join()
        assert process.exitcode == 0 and process.pid != os.getpid()
    return [*noises, entropy.normals(1000)]


def test_ranks_have_their_own_noise():
    """PRIVACY test 6: processes forked from one parent draw different noise."""
    assert largest_correlation(noises_of_ranks(SystemEntropy())) < 6
    assert largest_correlation(noises_of_ranks(UserSpaceGenerator())) > 20
