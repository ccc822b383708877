"""Every number of every config says what it may be, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from dpalign.domains import check_settings, within
from dpalign.errors import DPAlignError
from dpalign.recipe import Recipe


def configs(kind: type, path: str = "") -> dict[str, type]:
    """A config and those inside it, by the name of their section."""
    found = {path: kind}
    for name, hint in get_type_hints(kind).items():
        inner = [hint, *(get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ())]
        for one in inner:
            if dataclasses.is_dataclass(one):
                found |= configs(one, f"{path}.{name}" if path else name)
    return found


def holds_numbers(hint: Any) -> bool:
    return hint in (int, float) or any(holds_numbers(one) for one in get_args(hint))


CONFIGS = configs(Recipe)
NUMBERS = [
    (section, f)
    for section, kind in CONFIGS.items()
    for f in dataclasses.fields(kind)
    if holds_numbers(get_type_hints(kind)[f.name])
]


def test_every_number_has_a_domain():
    assert {"", "sft.adapter", "ppo.reward", "measurement.sampling.reward", "reward_model.model"} <= set(CONFIGS)
    assert len(NUMBERS) > 100
    assert not [f"{section}.{f.name}" for section, f in NUMBERS if "domain" not in f.metadata]


def test_no_domain_holds_nan_and_few_hold_infinity():
    assert not [f.name for _, f in NUMBERS if math.nan in f.metadata["domain"] or -math.inf in f.metadata["domain"]]
    assert {f.name for _, f in NUMBERS if math.inf in f.metadata["domain"]} == {"target_epsilon"}


@dataclasses.dataclass
class Inner:
    share: float = within(0.5, "[0, 1)")


@dataclasses.dataclass
class Outer:
    count: int = within(3, "[1, 10]")
    epsilon: float | None = within(None, "(0, 8]", or_inf=True)
    span: tuple[float, float] = within((0.0, 1.0), "[-9, 9]", ordered=True)
    split: dict[str, float | list[float]] | None = within(None, "[0, 1]")
    name: str = ""
    unit: str | None = None
    flag: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)

    def validate(self) -> None:
        if self.flag and self.name:
            raise DPAlignError("a flag has no name.")


GOOD = [
    {}, {"count": 10}, {"epsilon": math.inf}, {"epsilon": 8}, {"span": [1, 2]}, {"split": {"a": 1, "b": [0, 0.5]}},
    {"name": "ñ"}, {"inner": Inner(0)},
]  # fmt: skip
BAD = [
    ({"count": 0}, "count 0 must be at least 1 and at most 10"), ({"count": 11}, "count 11"),
    ({"count": 10**5000}, "count a number of thousands of digits must be"), ({"count": 3.0}, "expected int"),
    ({"count": True}, "expected int"), ({"count": None}, "expected int"), ({"epsilon": 0}, "above 0 and at most 8, or inf"),
    ({"epsilon": math.nan}, "epsilon is not a number"), ({"epsilon": -math.inf}, "epsilon -inf"), ({"epsilon": 9}, "epsilon 9"),
    ({"span": (1.0, 1.0)}, "low < high"), ({"span": (0.0, math.nan)}, "span is not a number"), ({"span": (0.0, math.inf)}, "span inf"),
    ({"span": (0.0,)}, "expected"), ({"split": {"a": math.nan}}, "split is not a number"), ({"split": {"a": [0.5, 2]}}, "split 2"),
    ({"name": "a\nb"}, "control characters"), ({"name": "a\x1b[2J"}, "control characters"), ({"name": "a" * 5000}, "5000 characters"),
    ({"name": " "}, "name is empty"), ({"unit": ""}, "unit is empty"), ({"unit": 3}, "expected str or nothing"),
    ({"flag": 1}, "expected bool"), ({"inner": Inner(1)}, "inner.share 1 must be at least 0 and below 1"),
    ({"inner": 3}, "expected Inner"), ({"flag": True, "name": "x"}, "a flag has no name"),
]  # fmt: skip


@pytest.mark.parametrize("values", GOOD)
def test_what_is_meant_passes(values):
    check_settings(Outer(**values))


@pytest.mark.parametrize(("values", "says"), BAD)
def test_what_is_not_is_named(values, says):
    with pytest.raises(DPAlignError, match=f"stage.*{re.escape(says)}"):
        check_settings(Outer(**values), "stage")
