"""A unit's records are encoded when it is first drawn, and most of them once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpalign.algorithms import SFT, SFTConfig
from dpalign.algorithms.base import Rows, encode_units
from dpalign.data.text import Encoded, kept
from dpalign.privacy.ledger import Ledger
from dpalign.training import Stage
from dpalign.training.examples import Examples
from dpalign.training.plan import plan_stage
from tiny import dataset, tiny_policy, words

UNITS = [[{"id": f"p{i}", "text": words(3 + i % 5, 10 * i + k)} for k in range(1 + i % 3)] for i in range(12)]


class Counting(SFT):
    """Counts what it is asked to encode; one record cannot be."""

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(config)
        self.encoded: list[str] = []

    def encode(self, policy: Any, record: Any) -> Any:
        self.encoded.append(record["id"])
        if record["id"] == "p5":
            raise ValueError(record["text"])
        return super().encode(policy, record)


@pytest.fixture
def policy() -> Any:
    return tiny_policy("gpt2")


def test_a_unit_is_encoded_once_and_when_it_is_asked_for(policy):
    algorithm = Counting(SFTConfig(max_length=8))
    examples = Examples(algorithm, policy, UNITS)
    assert len(examples) == 12 and not algorithm.encoded
    first = [examples[unit] for unit in (7, 2, 7, 11, 2, 5)]
    assert algorithm.encoded == ["p7", "p7", "p2", "p2", "p2", "p11", "p11", "p11", "p5", "p5", "p5"]
    assert first[0] == first[2] and first[1] == first[4] and first[5] == []  # the one that raises has no example
    assert first == [encode_units(algorithm, policy, [UNITS[unit]])[0] for unit in (7, 2, 7, 11, 2, 5)]
    assert examples[:3] == [examples[0], examples[1], examples[2]]
    assert [e.ids for e in examples[7]] == [SFT(SFTConfig(max_length=8)).encode(policy, r).ids for r in UNITS[7]]
    with pytest.raises(IndexError):
        examples[12]


def test_the_first_ones_are_kept_and_no_more(policy):
    algorithm = Counting(SFTConfig(max_length=8))
    examples = Examples(algorithm, policy, UNITS, most=1)
    for _ in range(2):
        assert examples[4] == encode_units(SFT(SFTConfig(max_length=8)), policy, [UNITS[4]])[0]
        assert len(examples[1]) == 2
    assert algorithm.encoded == ["p4", "p4", "p1", "p1", "p1", "p1"]


def test_a_stage_encodes_who_is_drawn_and_nobody_else(tmp_path, policy, monkeypatch):
    config = SFTConfig(max_length=8, expected_batch_size=2, max_steps=3, noise_multiplier=1.0)
    algorithm, data = Counting(config), dataset([[{"id": f"q{i}", "text": words(4, i)}] for i in range(40)])
    drawn = []
    stage = Stage(policy, algorithm, data, folder=tmp_path / "sft", run="r", ledger=Ledger(tmp_path / "l.sqlite"), plan=plan_stage("sft", config, 40))  # fmt: skip
    monkeypatch.setattr(stage.gate, "draw", lambda *of, draw=stage.gate.draw: drawn.extend(found := draw(*of)) or found)
    stage.train()
    who = {f"q{unit}" for sample in drawn for unit in sample.units}
    assert set(algorithm.encoded) == who and len(algorithm.encoded) == len(who) < 40


def test_token_ids_are_one_object_for_all_texts():
    """An int of python takes 28 bytes, and of a drawn unit all of its tokens are kept."""
    first, second = kept([5000, 7, 5000]), kept([int("5000"), 7000])
    assert (first, second) == ([5000, 7, 5000], [5000, 7000])
    assert first[0] is first[2] is second[0]
    assert Encoded([int("5000")] * 2, [True, False]).cut(1).ids[0] is first[0]


def test_rows_are_narrow_while_they_are_kept_and_wide_where_they_are_read():
    rows = Rows(torch.tensor([0, 1, 1]), {"ids": torch.tensor([[7], [2**31 - 1], [0]]), "mask": torch.ones(3, 1)})
    narrow = rows.kept()
    assert (narrow.tensors["ids"].dtype, narrow.tensors["mask"].dtype) == (torch.int32, torch.float32)
    for units in ([0, 1], [1]):
        one, two = rows.of(units), narrow.of(units)
        assert torch.equal(one.unit, two.unit) and one.unit.dtype == two.unit.dtype
        for name, tensor in one.tensors.items():
            assert torch.equal(tensor, two.tensors[name]) and tensor.dtype == two.tensors[name].dtype
