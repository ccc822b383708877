"""Does one release tell D from D + x? An attack on the low bits of a sum of floats, and on our sum of integers.

    .venv/bin/python benchmarks/float_attack.py --json

The attacker knows every gradient but one unit's membership: the sum under both hypotheses, bit for bit, sigma, C and the
divisor. From the exact output it works out which noise each hypothesis needs. A float32 sum plus float32 noise leaves
outputs that no float32 noise can give under the wrong hypothesis: one such coordinate decides.

`before` is the mechanism of version 0.1.0, kept here. `ours` are the releases that `dpalign.privacy.gate` hands out: the
gradients and the metrics block of a training step, and a private evaluation. What they show must be an integer on their
public grid, bit for bit, and the noise that a hypothesis needs must be a multiple of what their noise comes in; the
attacker learns that from releases on no data at all. The last line holds the counts: in how many trials the attack is
right about `before`, how many coordinates were impossible there under the wrong hypothesis, and how many of ours under
either, of all three kinds and of the last two alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dpalign.privacy.accountant import SampledGaussian
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.gate import PrivateStep, Sample
from dpalign.privacy.mechanism import GaussianMechanism, MetricRange

METRICS = (MetricRange("reward", -1.0, 1.0), MetricRange("kl", -5.0, 20.0), MetricRange("length", 0.0, 24.0))
MEASURED = (
    MetricRange("reward", 0.0, 1.0),
    MetricRange("reward_reference", 0.0, 1.0),
    MetricRange("win_rate", 0.0, 1.0),
)
DIVISOR = 64.0  # a power of two: dividing a float by it is exact
CALIBRATION = 1_000  # coordinates released on no data


class FloatMechanism:
    """The release of version 0.1.0: float sums, float noise."""

    def __init__(
        self, shapes: list[torch.Size], *, max_grad_norm, noise_multiplier, divisor, entropy, dtype=torch.float32, **_
    ):
        self.scale, self.divisor, self.entropy = noise_multiplier * max_grad_norm, divisor, entropy
        self.max_grad_norm = max_grad_norm
        self._sums = [torch.zeros(shape, dtype=dtype) for shape in shapes]

    def add(self, grads: list[Tensor], metrics: Tensor | None = None) -> None:
        wide = [g.to(total.dtype) for g, total in zip(grads, self._sums, strict=True)]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in wide]).sum(0).sqrt()
        factors = (self.max_grad_norm / norms.clamp(min=1e-30)).clamp(max=1.0)
        for g, total in zip(wide, self._sums, strict=True):
            total += torch.tensordot(factors, g, dims=1)

    def release(self) -> tuple[list[Tensor], None]:
        released = []
        for total in self._sums:
            noise = torch.from_numpy(self.entropy.normals(total.numel())) * self.scale
            released.append((total + noise.view_as(total).to(total.dtype)) / self.divisor)
        return released, None


def gradients_of(units: int, size: int) -> Tensor:
    """`(units, size)` of norm about 1, so that clipping at 1 moves some."""
    return torch.randn(units, size) / size**0.5


# Before --------------------------------------------------------------------------------------------------------------


def attack_floats(units: int, size: int, sigma: float, inside: bool) -> tuple[int, int]:
    """Impossible coordinates under the right hypothesis and under the wrong one."""
    grads, sums, outputs = gradients_of(units + 1, size), [], []
    for count in (units + inside, units + (not inside)):
        mechanism = FloatMechanism(
            [torch.Size([size])], max_grad_norm=1.0, noise_multiplier=sigma, divisor=DIVISOR, entropy=SystemEntropy()
        )
        mechanism.add([grads[:count]])
        sums.append(mechanism._sums[0].clone())
        outputs.append(mechanism.release()[0][0])
    right, wrong = (impossible_floats(outputs[0], total) for total in sums)
    return right, wrong


def impossible_floats(output: Tensor, total: Tensor) -> int:
    """Coordinates that `total` plus no float32 noise gives."""
    reached = (output.double() * DIVISOR).numpy().astype(np.float32)
    known = total.numpy()
    needed = (reached.astype(np.float64) - known.astype(np.float64)).astype(np.float32)
    possible = np.zeros(len(reached), dtype=bool)
    for noise in (needed, np.nextafter(needed, np.float32(np.inf)), np.nextafter(needed, np.float32(-np.inf))):
        possible |= known + noise == reached
    return int((~possible).sum())


# Ours ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Some numbers of one release: the integer sum behind them, and what was shown."""

    total: np.ndarray
    shown: np.ndarray
    shows: Callable[[np.ndarray], np.ndarray]  # integers as the mechanism shows them
    hides: Callable[[np.ndarray], np.ndarray]  # the other way round, as floats

    @property
    def reached(self) -> np.ndarray:
        return np.rint(self.hides(self.shown))

    def impossible(self, total: np.ndarray, noise_step: int) -> int:
        """Coordinates that `total` plus no noise gives: off the grid, or a noise that does not occur."""
        off = self.shows(self.reached) != self.shown
        return int((off | ((self.reached - total) % noise_step != 0)).sum())


def gradient_block(mechanism: GaussianMechanism, total: Tensor, output: Tensor) -> Block:
    scale = mechanism.grid / DIVISOR
    return Block(
        total.double().numpy(),
        output.numpy(),
        lambda integers: (integers * scale).astype(np.float32),
        lambda values: values.astype(np.float64) / scale,
    )


def metrics_block(mechanism: GaussianMechanism, total: Tensor, released: dict[str, float]) -> Block:
    ranges = mechanism.metrics
    scale = mechanism.metrics_grid / DIVISOR * math.sqrt(len(ranges))
    middle = np.array([(m.low + m.high) / 2 for m in ranges])
    width = np.array([m.high - m.low for m in ranges])
    return Block(
        total.double().numpy(),
        np.array([released[m.name] for m in ranges]),
        lambda integers: middle + integers * scale * width / 2,
        lambda values: (values - middle) / (width / 2) / scale,
    )


def training_step(sigma: float, size: int, grads: Tensor, metrics: Tensor) -> tuple[Block, Block]:
    """Gradients and metrics block of one pass, as the loop gets them."""
    counted = SampledGaussian(1.0, sigma, 1, metrics_noise_multiplier=sigma)
    step = PrivateStep(counted, max_grad_norm=1.0, divisor=DIVISOR, clipping="flat", metrics=METRICS)
    mechanism = Sample(step, [], SystemEntropy()).mechanism([torch.Size([size])])
    mechanism.add([grads], metrics)
    total, block = mechanism._sums[0].clone(), mechanism._metrics_sum.clone()
    (output,), released = mechanism.release()
    assert released is not None
    return gradient_block(mechanism, total, output), metrics_block(mechanism, block, released)


def measurement(sigma: float, metrics: Tensor) -> tuple[Block]:
    """A private evaluation."""
    step = PrivateStep(SampledGaussian(1.0, sigma, 1), max_grad_norm=1.0, divisor=DIVISOR, metrics=MEASURED)
    mechanism = Sample(step, [], SystemEntropy()).measurement()
    mechanism.add_metrics(metrics)
    block = mechanism._metrics_sum.clone()
    released = mechanism.release()[1]
    assert released is not None
    return (metrics_block(mechanism, block, released),)


def noise_steps(release: Callable[[], tuple[Block, ...]]) -> list[int]:
    """What the noise of each block comes in multiples of, counted in its grid: from releases on no data."""
    found: list[int] = []
    seen = 0
    while seen < CALIBRATION:
        blocks = release()
        found = found or [0] * len(blocks)
        found = [math.gcd(step, *map(int, block.reached)) for step, block in zip(found, blocks, strict=True)]
        if all(step == 1 for step in found):
            break
        seen += min(len(block.shown) for block in blocks)
    return found


def impossible_integers(release: Callable[[bool], tuple[Block, ...]], steps: list[int], inside: bool) -> list[int]:
    """For each block, impossible coordinates under either hypothesis."""
    seen, other = release(inside), release(not inside)
    return [
        block.impossible(block.total, step) + block.impossible(wrong.total, step)
        for block, wrong, step in zip(seen, other, steps, strict=True)
    ]


def attack_integers(units: int, size: int, sigma: float, inside: bool, steps: dict[str, list[int]]) -> list[int]:
    """Impossible coordinates of the gradients, the metrics block and the evaluation."""
    grads, metrics = gradients_of(units + 1, size), torch.rand(units + 1, len(METRICS), dtype=torch.float64) * 2 - 1

    def trained(joined: bool) -> tuple[Block, Block]:
        return training_step(sigma, size, grads[: units + joined], metrics[: units + joined])

    def measured(joined: bool) -> tuple[Block]:
        return measurement(sigma, metrics[: units + joined].abs())

    found = impossible_integers(trained, steps["training"], inside)
    return [*found, *impossible_integers(measured, steps["evaluation"], inside)]


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--size", type=int, default=20_000, help="coordinates of a release")
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--json", action="store_true", help="the last line alone")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    nothing, none = torch.zeros(0, given.size), torch.zeros(0, len(METRICS))
    steps = {
        "training": noise_steps(partial(training_step, given.sigma, given.size, nothing, none)),
        "evaluation": noise_steps(partial(measurement, given.sigma, none)),
    }
    before_right, before, ours = 0, 0, [0, 0, 0]
    for number in range(given.trials):
        sizes = (given.units, given.size, given.sigma, number % 2 == 0)
        right, wrong = attack_floats(*sizes)
        before_right, before = before_right + (right < wrong), before + wrong
        ours = [old + new for old, new in zip(ours, attack_integers(*sizes, steps), strict=True)]
    result = {"before_right": before_right, "before_impossible": before, "ours_impossible": sum(ours)}
    result |= {"ours_impossible_metrics": ours[1], "ours_impossible_evaluation": ours[2], "trials": given.trials}
    if not given.json:
        print(
            f"float sums: the attack is right in {before_right} of {given.trials} trials "
            f"({before / given.trials:.0f} impossible coordinates each); integer sums: {sum(ours)} impossible "
            f"coordinates in all of them ({ours[0]} of gradients, {ours[1]} of metrics, {ours[2]} of evaluations)."
        )
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
