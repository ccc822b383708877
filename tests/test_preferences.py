"""Agreement with public pairs, by hand, and the demo pairs made from people's ratings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dpalign.data import demo
from dpalign.data.demo import MIN_DIFFERENCE, movie_preferences, rated_pairs
from dpalign.errors import DPAlignError
from dpalign.evaluation import evaluate_pairs
from dpalign.evaluation.preferences import agreement
from dpalign.models import RewardModel, TextFormat
from tiny import tiny_policy

# Agreement ---------------------------------------------------------------------------------------------------


def test_agreement_worked_by_hand():
    # Margins 2, 1, -1 and 0 of the better text; the fifth pair is a tie and counts nowhere.
    found = agreement(torch.tensor([2.0, -1.0, -1.0, 0.0, 5.0]), torch.tensor([1.0, 0.0, 0.9, 0.2, 0.5]))
    assert found.pairs == 4 and found.accuracy == pytest.approx(2.5 / 4)
    assert found.accuracy_ci95 == pytest.approx(1.96 * math.sqrt(0.625 * 0.375 / 4))
    assert found.margin == pytest.approx(0.5) and found.margin_std == pytest.approx(math.sqrt(5 / 3))
    nll = [math.log1p(math.exp(-m)) for m in (2, 1, -1, 0)]
    assert found.nll == pytest.approx(sum(nll) / 4)
    # Said 0.881 and right; said 0.731 twice and right once; said 0.5 and half right.
    two, one = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert found.calibration_error == pytest.approx((1 * (1 - two) + 2 * (one - 0.5) + 1 * 0) / 4)
    assert found.as_dict()["pairs"] == 4


def test_agreement_at_its_ends():
    sure = agreement(torch.tensor([50.0, -50.0]), torch.tensor([1.0, 0.0]))
    assert sure.accuracy == 1 and sure.accuracy_ci95 == 0 and sure.calibration_error == pytest.approx(0, abs=1e-9)
    wrong = agreement(torch.tensor([-50.0]), torch.tensor([1.0]))
    assert wrong.accuracy == 0 and wrong.calibration_error == pytest.approx(1) and wrong.margin_std == 0
    with pytest.raises(DPAlignError, match="all pairs are ties"):
        agreement(torch.tensor([1.0]), torch.tensor([0.5]))


def test_evaluate_pairs_reads_preference_and_prompt():
    model = RewardModel.from_policy(tiny_policy("gpt2"), TextFormat(max_length=8))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    low, high = sorted(["w5 w6", "w7 w9"], key=lambda t: float(model.score([t])))
    gap = float(model.score([high]) - model.score([low]))
    assert gap > 0.01
    first, second = low.split()[0], high.split()[0]
    assert evaluate_pairs(model, [{"chosen": high, "rejected": low}]).margin == pytest.approx(gap, rel=1e-4)
    swapped = {"chosen": low, "rejected": high, "preference": 0.0}
    both = evaluate_pairs(model, [swapped, {"chosen": high, "rejected": low, "preference": None}])
    assert both.accuracy == 1 and both.pairs == 2 and both.margin == pytest.approx(gap, rel=1e-4)
    prompted = {"prompt": f"{second} ", "chosen": high.split()[1], "rejected": high.split()[1]}
    assert evaluate_pairs(model, [prompted]).accuracy == 0.5 and first != second


# Demo pairs --------------------------------------------------------------------------------------------------


def test_rated_pairs_use_every_snippet_once_and_put_the_better_one_first():
    snippets = [{"id": f"s{i}", "mean": i % 7 - 3.0, "text": f"text {i}"} for i in range(50)]
    pairs = rated_pairs(snippets)
    means = {s["text"]: s["mean"] for s in snippets}
    used = [p[side] for p in pairs for side in ("chosen", "rejected")]
    assert len(used) == len(set(used)) and 40 <= len(used) <= 50
    assert all(means[p["chosen"]] - means[p["rejected"]] == p["difference"] >= MIN_DIFFERENCE for p in pairs)
    assert pairs == rated_pairs(snippets[::-1])  # the order of the file does not matter


def test_snippets_of_nearly_one_rating_make_no_pair():
    assert rated_pairs([{"id": f"s{i}", "mean": 0.1 * i, "text": f"text {i}"} for i in range(10)]) == []
    alike = [{"id": "a", "mean": 0.0, "text": "a"}, {"id": "b", "mean": 1.0, "text": "b"}]
    assert [(p["id"], p["difference"]) for p in rated_pairs(alike)] == [("a+b", 1.0)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    cache = demo.cache_folder()
    if not (cache / "movie-snippets" / "private.jsonl").exists():
        cache = tmp_path_factory.mktemp("cache")
    try:
        return movie_preferences(cache)
    except DPAlignError as error:
        pytest.skip(str(error))


def test_the_demo_files_share_no_snippet(files):
    rows = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}
    assert {name: len(r) for name, r in rows.items() if name in ("texts", "public_prompts")} == {
        "texts": 1500, "public_prompts": 1000
    }  # fmt: skip
    ids = {name: [i for r in found for i in r["id"].split("+")] for name, found in rows.items()}
    for name, found in ids.items():
        assert len(found) == len(set(found)), f"a snippet is in {name} twice"
    private = [set(ids[name]) for name in ("texts", "pairs", "prompts")]
    public = set(ids["public_pairs"]) | set(ids["public_prompts"])
    assert not any(a & b for a in private for b in [*private, public] if a is not b)
    assert set(ids["public_pairs"]) <= set(ids["public_prompts"])
    assert 5500 < len(ids["pairs"]) <= 6000 and all(r["difference"] >= 1 for r in rows["pairs"] + rows["public_pairs"])
