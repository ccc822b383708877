"""How far people's texts are from the policy's: in deviations of its own, and no farther for texts of one law."""

from __future__ import annotations

import pytest
import torch

from dpalign.evaluation import apart


def texts(count: int, seed: int, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mixing() -> torch.Tensor:
    return texts(6, 9) * torch.tensor([100.0, 30, 10, 3, 1, 0.3])


def test_texts_of_one_law_are_not_apart(mixing):
    found = apart(texts(4000, 0) @ mixing, texts(2000, 1) @ mixing)
    assert found.shift == pytest.approx(0, abs=0.03)
    assert found.outside == pytest.approx(0.05, abs=0.015)
    assert found.own_texts == 4000


def test_what_chance_puts_between_two_means_is_taken_off():
    found = [apart(texts(64, 2 * seed), texts(32, 2 * seed + 1)) for seed in range(200)]
    squares = torch.tensor([one.shift**2 for one in found])
    # 2 means of 32 differ by 1/32 + 1/32 a direction: what is left of that is half of its deviation, cut off at 0.
    assert float(squares.mean()) < 0.5 * 2 / 32
    assert float((squares == 0).double().mean()) > 0.4


def test_one_deviation_in_every_direction_is_one(mixing):
    """Whatever the features' scales are: a mean of one deviation away in each of the six directions."""
    own = texts(4000, 0) @ mixing
    _, deviations, directions = torch.linalg.svd(own - own.mean(0), full_matrices=False)
    step = (deviations / 4000**0.5) @ directions
    assert apart(own, texts(2000, 1) @ mixing + step).shift == pytest.approx(1, abs=0.05)
    assert apart(own, texts(2000, 1) @ mixing + 3 * step).shift == pytest.approx(3, abs=0.15)
    assert apart(own, texts(2000, 1) @ mixing + 3 * step).outside > 0.95


def test_a_wider_law_of_the_same_mean_is_farther_out(mixing):
    found = apart(texts(4000, 0) @ mixing, 2 * texts(2000, 1) @ mixing)
    assert found.shift < 0.1 and found.outside > 0.4


def test_only_the_leading_directions_count():
    """Of 30, the last 14 do not: people's texts may differ there as they like."""
    scales = torch.cat([torch.full((16,), 10.0), torch.full((14,), 0.1)])
    away = torch.zeros(30)
    away[20:] = 100.0
    assert apart(texts(3000, 0, 30) * scales, texts(1000, 1, 30) * scales + away).shift < 0.1


def test_what_cannot_be_read_is_left_out_and_too_little_says_nothing():
    own, judged = texts(64, 0), texts(32, 1)
    unread = torch.full((3, 6), torch.nan)
    assert apart(torch.cat([own, unread]), torch.cat([unread, judged])) == apart(own, judged)
    assert apart(texts(15, 0), judged) is None and apart(own, texts(7, 1)) is None
    assert apart(texts(16, 0), texts(8, 1)) is not None
    assert apart(torch.ones(64, 6), judged) is None
