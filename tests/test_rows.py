"""Rows of some units: the right ones, in the order asked for, also for a unit that comes twice or has none."""

from __future__ import annotations

import torch

from dpalign.algorithms.base import Rows

ROWS = Rows(torch.tensor([0, 0, 2, 1, 2]), {"a": torch.tensor([10, 11, 12, 13, 14]), "b": torch.arange(10).view(5, 2)})


def test_of_worked_by_hand():
    found = ROWS.of([2, 0, 2])
    assert found.unit.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.tensors["a"].tolist() == [12, 14, 10, 11, 12, 14]
    assert found.tensors["b"].tolist() == [[4, 5], [8, 9], [0, 1], [2, 3], [4, 5], [8, 9]]


def test_units_without_rows_keep_their_place():
    found = ROWS.of([7, 1])
    assert found.unit.tolist() == [1] and found.tensors["a"].tolist() == [13]
    for nothing in (ROWS.of([]), ROWS.of([5, 6])):
        assert nothing.unit.shape == (0,) and nothing.unit.dtype == torch.int64
        assert nothing.tensors["b"].shape == (0, 2)
