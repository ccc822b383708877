"""Does one release tell D from D + x? An attack on the low bits of a sum of floats, and on our sum of integers.

    .venv/bin/python benchmarks/float_attack.py --json

The attacker knows every gradient but one unit's membership: the sum under both hypotheses, bit for bit, sigma, C and the
divisor. From the exact output it works out which noise each hypothesis needs. A float32 sum plus float32 noise leaves
outputs that no float32 noise can give under the wrong hypothesis: one such coordinate decides. `before` is the mechanism
of version 0.1.0, kept here; `ours` is `dpalign.privacy.mechanism`, whose outputs are integers on a public grid, and every
integer is possible under both. The last line holds the counts: in how many trials the attack is right about `before`,
how many of its coordinates were impossible, and the same for ours (gradients, the metrics block, and a measurement,
which is a metrics block alone).
"""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import torch
from torch import Tensor

from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.mechanism import GaussianMechanism, MetricRange

METRICS = (MetricRange("a", -1.0, 1.0), MetricRange("b", 0.0, 3.0))


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


def impossible_floats(output: Tensor, total: Tensor, divisor: float) -> int:
    """Coordinates that `total` plus no float32 noise gives; the divisor is a power of two, so its division is exact."""
    reached = (output.double() * divisor).numpy().astype(np.float32)
    known = total.numpy()
    needed = (reached.astype(np.float64) - known.astype(np.float64)).astype(np.float32)
    possible = np.zeros(len(reached), dtype=bool)
    for noise in (needed, np.nextafter(needed, np.float32(np.inf)), np.nextafter(needed, np.float32(-np.inf))):
        possible |= known + noise == reached
    return int((~possible).sum())


def impossible_integers(output: np.ndarray, total: np.ndarray, grid: float, divisor: float, cast: type) -> int:
    """Coordinates that integer `total` plus no integer noise gives, on the grid and as `cast` shows them."""
    reached = np.rint(output.astype(np.float64) * divisor / grid)
    needed = reached - total  # an integer: every one of them may be the noise
    shown = ((total + needed) * (grid / divisor)).astype(cast)
    return int((shown != output).sum() + (needed != np.rint(needed)).sum())


def trial(mechanism_class: type, units: int, size: int, sigma: float, divisor: float, inside: bool) -> tuple[int, int]:
    """Impossible coordinates under the right hypothesis and under the wrong one."""
    grads = torch.randn(units + 1, size) / size**0.5
    metrics = torch.rand(units + 1, len(METRICS)) * 2 - 1
    settings = {"max_grad_norm": 1.0, "noise_multiplier": sigma, "divisor": divisor, "clipping": "flat"}
    settings |= {"entropy": SystemEntropy(), "metrics": METRICS, "metrics_noise_multiplier": sigma}
    sums, outputs = [], []
    for count in (units + inside, units + (not inside)):
        mechanism = mechanism_class([torch.Size([size])], **settings)
        mechanism.add([grads[:count]], metrics[:count])
        sums.append((mechanism._sums[0].clone(), getattr(mechanism, "_metrics_sum", torch.zeros(0)).clone()))
        outputs.append(mechanism.release())
    (output,), noised = outputs[0]
    if mechanism_class is FloatMechanism:
        right, wrong = (impossible_floats(output, total, divisor) for total, _ in sums)
        return right, wrong
    found = []
    for total, block in sums:
        count = impossible_integers(output.numpy(), total.double().numpy(), mechanism.grid, divisor, np.float32)
        half = np.array([(m.high - m.low) / 2 for m in METRICS])
        middle = np.array([(m.high + m.low) / 2 for m in METRICS])
        shown = (np.array([noised[m.name] for m in METRICS]) - middle) / half / math.sqrt(len(METRICS))
        reached = np.rint(shown * divisor / mechanism.metrics_grid)
        count += int((np.abs(shown * divisor / mechanism.metrics_grid - reached) > 1e-3).sum())  # off the grid
        count += int((reached - block.double().numpy() != np.rint(reached - block.double().numpy())).sum())
        found.append(count)
    return found[0], found[1]


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--size", type=int, default=20_000, help="coordinates of a release")
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--json", action="store_true", help="the last line alone")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    result = {"before_right": 0, "before_impossible": 0, "ours_impossible": 0, "trials": given.trials}
    for number in range(given.trials):
        inside = number % 2 == 0
        right, wrong = trial(FloatMechanism, given.units, given.size, given.sigma, 64.0, inside)
        result["before_right"] += right < wrong
        result["before_impossible"] += wrong
        result["ours_impossible"] += sum(trial(GaussianMechanism, given.units, given.size, given.sigma, 64.0, inside))
    if not given.json:
        print(
            f"float sums: the attack is right in {result['before_right']} of {given.trials} trials "
            f"({result['before_impossible'] / given.trials:.0f} impossible coordinates each); integer sums: "
            f"{result['ours_impossible']} impossible coordinates in all of them."
        )
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
