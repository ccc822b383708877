"""What the audit finds: honest runs, whose bounds must stay below the claim, and runs with one planted fault each.

    .venv/bin/python benchmarks/audit.py --output runs/audit.jsonl

Every run is one of `dpalign audit` on its model of two layers: 1,000 canaries, epsilon 4 at delta 1e-5, bounds of 99.9%
confidence. A fault is planted by patching the library in this process, never in its source. Layers are asked in order (the
step, a run on nobody, a run with canaries), and of a run with a fault, but for the first one, no more than until one finds
it. A finished run is appended to --output as one JSON line and not run again, so the same command goes on after an interruption. Without
--faults all are planted; `--faults` alone plants none.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from unittest.mock import patch

import numpy as np
import torch

from dpalign.algorithms.base import Rows
from dpalign.audit import ghosts
from dpalign.audit.ghosts import Canaries, Subject
from dpalign.audit.small import small_subject
from dpalign.audit.stage import audit_stage, bounds_of, nobody, step_of
from dpalign.audit.step import check_step
from dpalign.privacy import accountant, gate
from dpalign.privacy.context import own_context
from dpalign.privacy.entropy import SystemEntropy
from dpalign.privacy.gate import Gate, Sample
from dpalign.privacy.mechanism import GaussianMechanism, towards_zero
from dpalign.training import loop
from dpalign.training.loop import Stage

HONEST = "none"
CONFIDENCE = 0.999
WHOLE = 1  # runs of each fault that all layers are asked about


# Planted faults: each is the library with one thing wrong -------------------------------------------------------------


def noise_halved() -> list:
    real = GaussianMechanism._noise
    return [patch.object(GaussianMechanism, "_noise", lambda self, count, deviation: real(self, count, deviation) / 2)]


def noise_once_per_rank() -> list:
    """Each of two ranks adds all of the noise."""
    real = GaussianMechanism._noise
    twice = lambda self, count, deviation: real(self, count, deviation) + real(self, count, deviation)  # noqa: E731
    return [patch.object(GaussianMechanism, "_noise", twice)]


def reused_noise_stream() -> list:
    """Every release draws its noise from the start of one stream."""
    seed = int(time.time_ns())
    return [patch.object(SystemEntropy, "normals", lambda self, count: np.random.default_rng(seed).normal(size=count))]


def pair_as_two_rows() -> list:
    """Clipping sees rows, not units."""
    real = loop.unit_gradients

    def by_row(model, algorithm, gradients, rows, units):
        alone = Rows(torch.arange(len(rows.unit), device=rows.unit.device), rows.tensors)
        return real(model, algorithm, gradients, alone, algorithm.rows_per_example * max(units, len(rows.unit)))

    return [patch.object(loop, "unit_gradients", by_row)]


def rate_from_the_data() -> list:
    """q is the expected batch over the units that are there, not over those that are declared."""
    real, sample = Gate.draw, gate.poisson_sample

    def draw(self, steps, first, attempt):
        def at(count, rate, coins):
            return sample(count, min(1.0, rate * self.declared_units / max(1, self.count)), coins)

        with patch.object(gate, "poisson_sample", at):
            return real(self, steps, first, attempt)

    return [patch.object(Gate, "draw", draw)]


def divisor_from_the_data() -> list:
    """Sums are divided by the number of units that were drawn."""
    real = Sample.mechanism

    def mechanism(self, *arguments, **settings):
        before, self.step = self.step, replace(self.step, divisor=max(1, len(self.units)))
        try:
            return real(self, *arguments, **settings)
        finally:
            self.step = before

    return [patch.object(Sample, "mechanism", mechanism)]


def weighted_sampler() -> list:
    """Half of the units come more often than q, half less often; the accountant is told q."""

    def weighted(count, rate, coins):
        more = min(1.0, 1.5 * rate)
        rates = np.where(np.arange(count) % 2 == 0, more, 2 * rate - more)
        return np.flatnonzero(coins.uniforms(count) <= rates) if count else np.zeros(0, dtype=np.int64)

    return [patch.object(gate, "poisson_sample", weighted)]


def skipped_empty_batch() -> list:
    real = Stage._step

    def step(self, rows, positions, sample, number):
        return real(self, rows, positions, sample, number) if positions else None

    return [patch.object(Stage, "_step", step)]


def clipped_per_tensor() -> list:
    def add(self, grads):
        for g, total in zip(grads, self._sums, strict=True):
            wide = g.to(torch.float64)
            factors = self.clip_factors(wide.flatten(1).norm(dim=1)) / self.grid
            steps = towards_zero(wide * factors.view(-1, *[1] * (wide.dim() - 1)))
            total += torch.nan_to_num(steps, nan=0.0).sum(0).to(torch.int64)

    return [patch.object(GaussianMechanism, "_add_integers", add)]


def unscaled_metrics() -> list:
    """Every metric in [-1, 1], all of them with the noise of one."""
    scaled, release = GaussianMechanism._scaled, GaussianMechanism._release_metrics

    def released(self):
        found = release(self)
        middles = {m.name: (m.low + m.high) / 2 for m in self.metrics}
        shrink = math.sqrt(len(self.metrics) or 1)
        return found and {name: middles[name] + (value - middles[name]) / shrink for name, value in found.items()}

    return [
        patch.object(
            GaussianMechanism, "_scaled", lambda self, values: scaled(self, values) * math.sqrt(len(self.metrics))
        ),
        patch.object(GaussianMechanism, "_release_metrics", released),
    ]


FAULTS: dict[str, Callable[[], list]] = {
    fault.__name__: fault
    for fault in (
        noise_halved,
        reused_noise_stream,
        rate_from_the_data,
        divisor_from_the_data,
        weighted_sampler,
        noise_once_per_rank,
        skipped_empty_batch,
        clipped_per_tensor,
        unscaled_metrics,
        pair_as_two_rows,
    )
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    with ExitStack() as stack:
        for one in [] if fault == HONEST else FAULTS[fault]():
            stack.enter_context(one)
        yield


# Runs ----------------------------------------------------------------------------------------------------------------


def honest(subject: Subject, canaries: int, folder: Path) -> dict:
    """All layers."""
    found = audit_stage(subject, folder, canaries=canaries, confidence=CONFIDENCE)
    bounds = {bound.method: round(bound.epsilon, 4) for bound in found.bounds}
    return {"claim": round(found.epsilon, 4), "bounds": bounds, "exceeded": found.exceeded, "rejected": found.rejected}


@own_context()
def until_found(subject: Subject, canaries: int, folder: Path, whole: bool) -> dict:
    """Layer after layer, until one exceeds the claim or rejects; `whole`: all of them, whatever is found."""
    found: dict = {"exceeded": [], "rejected": [], "layer": None}
    for name, layer in (("step", of_step), ("nobody", of_nobody), ("white box", of_run)):
        place = folder / name
        place.mkdir()
        here = layer(subject, canaries, place)
        found |= here | {key: found[key] + here[key] for key in ("exceeded", "rejected")}
        found["layer"] = found["layer"] or (name if here["exceeded"] or here["rejected"] else None)
        if found["layer"] and not whole:
            break
    return found


def of_step(subject: Subject, canaries: int, folder: Path) -> dict:
    return {"exceeded": [], "rejected": [c.name for c in check_step(step_of(subject), folder) if not c.passed]}


def of_nobody(subject: Subject, canaries: int, folder: Path) -> dict:
    return {"exceeded": [], "rejected": [c.name for c in nobody(subject, canaries, folder) if not c.passed]}


def of_run(subject: Subject, canaries: int, folder: Path) -> dict:
    seen = ghosts.run(subject, Canaries.draw(canaries), folder)
    claim = accountant.epsilon(seen.claims, subject.plan.target_delta)
    bounds = bounds_of(seen, subject.plan.target_delta, CONFIDENCE)
    return {
        "exceeded": [bound.method for bound in bounds if bound.epsilon > claim],
        "rejected": [check.name for check in ghosts.checks(seen) if not check.passed],
        "bounds": {bound.method: round(bound.epsilon, 4) for bound in bounds},
    }


def run(fault: str, number: int, subject: Subject, canaries: int) -> dict:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, planted(fault):
        if fault == HONEST:
            found = honest(subject, canaries, Path(folder))
        else:
            found = until_found(subject, canaries, Path(folder), whole=number < WHOLE)
    return {"fault": fault, "run": number, **found, "seconds": round(time.perf_counter() - began, 2)}


# What they say together ----------------------------------------------------------------------------------------------


def summary_of(rows: list[dict], canaries: int) -> dict:
    """Of all rows: how often something exceeded or rejected, by which layer, and the bounds of honest runs."""
    of = {fault: [row for row in rows if row["fault"] == fault] for fault in (HONEST, *FAULTS)}
    clean = of.pop(HONEST)
    bounds = {method: [row["bounds"][method] for row in clean] for method in (clean[0]["bounds"] if clean else ())}
    return {
        "canaries": canaries,
        "confidence": CONFIDENCE,
        "claim": max((row["claim"] for row in clean), default=None),
        "honest": {
            "runs": len(clean),
            "exceeded": sum(bool(row["exceeded"]) for row in clean),
            "rejected": sum(bool(row["rejected"]) for row in clean),
            "bounds": {
                method: {
                    "mean": round(mean(found), 3),
                    "standard_deviation": round(stdev(found), 3) if len(found) > 1 else None,
                    "largest": max(found),
                }
                for method, found in bounds.items()
            },
        },
        "faults": {
            fault: {
                "runs": len(found),
                "found": sum(bool(row["exceeded"] or row["rejected"]) for row in found),
                "by": dict(sorted(by_layer(found).items())),
                "of_the_whole": all_that_see(found),
            }
            for fault, found in of.items()
            if found
        },
    }


def by_layer(rows: list[dict]) -> dict[str, int]:
    layers = [row["layer"] for row in rows if row["layer"]]
    return {layer: layers.count(layer) for layer in layers}


def all_that_see(rows: list[dict]) -> dict[str, int]:
    """Of the runs that all layers were asked about: how often each check rejected, and each bound exceeded."""
    whole = [row for row in rows if row["run"] < WHOLE]
    named = [f"bound: {name}" for row in whole for name in row["exceeded"]]
    named += [name for row in whole for name in row["rejected"]]
    return {name: named.count(name) for name in dict.fromkeys(named)} | {"runs": len(whole)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="of honest code, and of each fault")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("runs/audit.jsonl"))
    parser.add_argument("--summary", type=Path, help="a JSON file for what all rows say together")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.exists() else []
    done = {(row["fault"], row["run"]) for row in rows}
    subject = small_subject()
    for fault in (HONEST, *given.faults):
        for number in range(given.runs):
            if (fault, number) in done:
                continue
            rows.append(run(fault, number, subject, given.canaries))
            with open(given.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    found = summary_of(rows, given.canaries)
    if given.summary is not None:
        given.summary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
