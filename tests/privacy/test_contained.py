"""After the first draw nothing that a record raises ends a run: its unit adds zero, and the others what they did."""

from __future__ import annotations

import pytest
import torch
from harness import everyone, ppo, prompts, run_stage, sft, texts

from dpalign.algorithms import PPO, SFT
from dpalign.algorithms.base import Rows
from tiny import dataset

BAD = 2  # the unit that raises


def raising(kind: type, where: str, error: Exception):
    """An algorithm that raises whenever it meets the bad unit."""

    class Raising(kind):
        def encode(self, model, record):
            example = super().encode(model, record)
            if record["id"] == self.bad:
                if where == "encode":
                    raise error
                self.marked = example
            return example

        def rows(self, model, units, coins):
            if where == "rows" and any(example is self.marked for unit in units for example in unit):
                raise error
            made = super().rows(model, units, coins)
            is_bad = [any(example is getattr(self, "marked", None) for example in unit) for unit in units]
            marks = torch.tensor([is_bad[unit] for unit in made.unit.tolist()], dtype=torch.bool)
            return Rows(made.unit, made.tensors | {"marks": marks})

        def row_losses(self, model, rows):
            if where == "row_losses" and rows.tensors["marks"].any():
                raise error
            return super().row_losses(model, rows)

    return Raising


CASES = [(sft, texts, SFT), (ppo, prompts, PPO)]


@pytest.mark.parametrize("where", ["encode", "rows", "row_losses"])
@pytest.mark.parametrize(("algorithm", "data", "kind"), CASES, ids=["sft", "ppo"])
def test_a_unit_that_raises_adds_zero(algorithm, data, kind, where):
    units = dataset(data())
    ids = [unit[0]["id"] for unit in units.units]
    calm, faulty = algorithm(), algorithm()
    faulty.__class__ = raising(kind, where, RuntimeError("zebrafinch"))
    faulty.bad, faulty.marked = ids[BAD], None
    expected, found = run_stage(calm, units, sampler=everyone), run_stage(faulty, units, sampler=everyone)
    without = run_stage(algorithm(), units, sampler=lambda data, call: [i for i in range(len(ids)) if i != BAD])
    assert len(found.sums) == len(expected.sums) and len(found.intents) == len(expected.intents)
    for ours, theirs, whole in zip(found.sums, without.sums, expected.sums, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(ours, whole, rtol=1e-6)


@pytest.mark.parametrize("where", ["encode", "rows", "row_losses"])
def test_running_out_of_memory_is_everyones(where):
    units = dataset(texts())
    faulty = sft()
    faulty.__class__ = raising(SFT, where, MemoryError())
    faulty.bad, faulty.marked = units.units[BAD][0]["id"], None
    with pytest.raises(MemoryError):
        run_stage(faulty, units, sampler=everyone)
