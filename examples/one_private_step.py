"""One private step, from top to bottom: what a reviewer reads first. `python examples/one_private_step.py`

Four hundred people's numbers train a linear model. Read down: the units, the step, the ledger and the gate, the draw,
one gradient per person, the mechanism, the update, the epsilon. The library does the same with language
models; the parts used here are its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from dpalign.gradients import PerUnitGradients
from dpalign.privacy import accountant
from dpalign.privacy.accountant import SampledGaussian
from dpalign.privacy.gate import Gate, PrivateStep
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import MetricRange
from dpalign.privacy.parts import Part, epsilon_of

PEOPLE, STEPS, BATCH, TARGET, DELTA = 400, 30, 80, 2.0, 1e-5


def main(ledger_file: Path) -> float:
    # 1. The units. Everything that one person contributed is one unit: here, one to three rows of (x, y).
    torch.manual_seed(0)  # for the made-up data and the first weights; sampling and noise never use a seed
    rows_of = [1 + person % 3 for person in range(PEOPLE)]
    x = [torch.randn(rows, 5) for rows in rows_of]
    y = [rows @ torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5]) + 0.1 * torch.randn(len(rows)) for rows in x]

    # 2. The step, as one value: a Poisson sample at rate BATCH / PEOPLE, one Gaussian release of the clipped sum, and
    #    the mean loss with noise of its own. The smallest noise for which STEPS of them cost at most epsilon TARGET:
    rate = BATCH / PEOPLE
    sigma = accountant.noise_multiplier(TARGET, DELTA, sampling_rate=rate, steps=STEPS, metrics_noise_ratio=3.0)
    step = PrivateStep(
        SampledGaussian(rate, sigma, steps=1, metrics_noise_multiplier=3.0 * sigma),
        max_grad_norm=1.0,  # C: a person's gradient is scaled to a norm of at most this
        divisor=BATCH,  # a constant: the number of people drawn is private
        metrics=(MetricRange("loss", 0.0, 10.0),),
    )

    # 3. The ledger, and the gate: the only door to a person. It journals a step before it draws for it.
    ledger = Ledger(ledger_file)
    gate = Gate(
        ledger,
        Part("example"),
        count=PEOPLE,
        unit="person",
        declared_units=PEOPLE,
        fingerprint=ledger.keyed_hash("example", *(rows.numpy().tobytes() for rows in x)).hex(),
        run="example",
        stage="regression",
        config_hash="",
    )

    # 4. The model. Its trainable linear layers give one gradient per unit from an ordinary backward pass.
    model = torch.nn.Sequential(torch.nn.Linear(5, 1))
    gradients = PerUnitGradients(model)
    optimizer = torch.optim.Adam(gradients.parameters, lr=0.1)

    for number in range(STEPS):
        # 5. Journaled first, then drawn: each person takes part independently with probability `rate`.
        (sample,) = gate.draw([step], first=number, attempt=0)
        mechanism = sample.mechanism([p.shape for p in gradients.parameters])
        if sample.units:  # an empty sample takes its noisy step all the same
            # 6. The loss of a person is the mean over that person's rows: nothing crosses from one to another.
            row_unit = torch.tensor([i for i, person in enumerate(sample.units) for _ in range(rows_of[person])])
            inputs, wanted = (torch.cat([values[person] for person in sample.units]) for values in (x, y))
            with gradients.collect(row_unit, len(sample.units)):
                errors = (model(inputs).squeeze(1) - wanted) ** 2
                rows = torch.bincount(row_unit)
                losses = torch.zeros(len(sample.units)).index_add(0, row_unit, errors) / rows
                losses.sum().backward()
            # 7. Clipped per person, and summed.
            mechanism.add(gradients.grads(), losses.detach().unsqueeze(1))
        # 8. Noise, once. What comes out is private; all below is post-processing.
        noisy_gradients, noisy_metrics = mechanism.release()
        for p, gradient in zip(gradients.parameters, noisy_gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        if number % 10 == 9 and noisy_metrics is not None:
            print(f"step {number + 1}: noised loss {noisy_metrics['loss']:.2f}")

    # 9. Epsilon is a replay of what the ledger says, whatever became of the run.
    spent = epsilon_of(ledger.spendings(dataset="example"), DELTA)
    print(f"weights {[round(w, 1) for w in model[0].weight[0].tolist()]}, of 1, -2, 0, 3, 0.5")
    print(f"epsilon {spent:.4f} at delta {DELTA:g}, adding or removing one person; noise multiplier {sigma:.4f}")
    ledger.close()
    return spent


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "ledger.sqlite")
