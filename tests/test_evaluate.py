"""`dpalign evaluate`: hand-worked metrics, win rates, labels of what no guarantee covers, and the command end to end."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import matplotlib
import pytest
import torch
from rich.console import Console

import dpalign
from dpalign.algorithms import PPOConfig, SamplingConfig
from dpalign.algorithms.completions import sample
from dpalign.cli.evaluate import short_names
from dpalign.errors import DPAlignError
from dpalign.evaluation import (
    higher_wins,
    judged,
    load_judge,
    measure_policy,
    metrics,
    public_prompts,
    reference_texts,
    rouge,
    stated_epsilon,
    win_rate,
)
from dpalign.evaluation.best_of import best_of
from dpalign.evaluation.compare import same_prompts
from dpalign.evaluation.metrics import distinct, logprobs_under, perplexity_of
from dpalign.evaluation.win_rate import wilson
from dpalign.files import dumps
from dpalign.models import ModelConfig, Normalization, Policy, RewardModel, embedded
from dpalign.models.generation import padded
from dpalign.models.reward_model import TextFormat
from dpalign.models.stack import AdapterConfig
from dpalign.reporting.plots import plot_evaluation
from dpalign.reporting.tables import evaluation_table
from dpalign.rewards import Reward, RewardConfig
from helpers import call, files_below, write_jsonl
from tiny import tiny_policy

OUTSIDE = "outside the guarantee"
PROMPTS = [{"prompt": f"This film number {i}", "completion": " was a very good film."} for i in range(8)]


# Metrics ---------------------------------------------------------------------------------------------------------


def test_distinct_n_by_hand():
    ids = torch.tensor([[1, 2, 1, 2], [1, 2, 3, 9]])
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0]])
    # unigrams 1 2 1 2 1 2 3; bigrams 12 21 12 12 23; trigrams 121 212 123
    assert [distinct(ids, mask, n) for n in (1, 2, 3)] == pytest.approx([3 / 7, 3 / 5, 1.0])


def test_perplexity_by_hand():
    value, half = perplexity_of(torch.tensor([-2.0, -4.0]), torch.tensor([2.0, 2.0]))
    # 6 nats over 4 tokens; residuals of -1/2 and 1/2 nat per token have standard deviation sqrt(1/2)
    assert value == pytest.approx(math.exp(1.5))
    assert half == pytest.approx(math.exp(1.5) * 1.96 * math.sqrt(1 / 2) / math.sqrt(2))
    assert math.isnan(perplexity_of(torch.tensor([-2.0]), torch.tensor([2.0]))[1])


def test_rouge_by_hand_and_without_a_download(monkeypatch):
    nltk = pytest.importorskip("nltk")

    def refuse(*arguments, **options):
        raise AssertionError("nltk looks for data")

    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.setattr(nltk.data, "find", refuse)
    monkeypatch.setattr(nltk.data, "load", refuse)
    texts = ["the cat sat on the mat", "", "Movies loved!"]
    targets = ["a cat was sitting on the mat", "a film", "movie, loves"]
    scores = rouge(texts, targets)
    # 4 of 6 and 4 of 7 words, 2 of 5 and 2 of 6 bigrams, "cat on the mat" in common; stems are equal in the last pair
    assert scores["rouge1"].tolist() == pytest.approx([8 / 13, 0, 1])
    assert scores["rouge2"].tolist() == pytest.approx([4 / 11, 0, 1])
    assert scores["rougeL"].tolist() == pytest.approx([8 / 13, 0, 1])


def test_reference_texts():
    chat = [{"role": "assistant", "content": "Yes."}]
    assert reference_texts([{"completion": "No."}, {"completion": chat}], "completion", "f") == ["No.", "Yes."]
    with pytest.raises(DPAlignError, match="record 2 of f has no reference text in column 'completion'"):
        reference_texts([{"completion": "No."}, {"completion": " "}], "completion", "f")
    with pytest.raises(DPAlignError, match="no column 'summary'"):
        reference_texts([{"completion": "No."}], "summary", "f")
    with pytest.raises(DPAlignError, match="a-z, 0-9"):
        reference_texts([{"completion": "да"}], "completion", "f")


def test_each_reward_is_given_its_own_columns():
    """A mutant: those of the first for all."""
    policy, config = tiny_policy("llama"), PPOConfig(max_completion_length=4, reward=RewardConfig(columns=["grade"]))
    prompts = public_prompts(policy, [{"prompt": f"w{i} w2", "grade": 1, "mood": i} for i in range(4)], config)

    def scores(name):
        return Reward(lambda p, c, **given: [given[name][0] if len(given) == 1 else math.nan], 0.0, 9.0, columns=[name])

    row = measure_policy(policy, prompts, scores("grade"), config, reference_reward=scores("mood")).evaluation
    assert (row.reward, row.unscored, row.reference_reward, row.reference_unscored) == (1, 0, 1.5, 0)
    found = best_of(policy, prompts, {"grade": scores("grade"), "mood": scores("mood")}, scores("mood"), config, 3)
    assert [(f.judge, f.gain, f.prompts) for f in found.values()] == [(1.5, 0, 4)] * 2


def test_measured_values_and_unscored_completions():
    policy, config = tiny_policy("llama"), PPOConfig(max_completion_length=4)
    prompts = public_prompts(policy, [{"prompt": f"w{i} w2"} for i in range(4)], config)
    reward = Reward(lambda prompts, completions: [0.0, 1.0, math.nan, 0.5], 0.0, 1.0, rows_at_once=None)
    other = Reward(lambda prompts, completions: [1.0, 1.0, 1.0, 0.0], 0.0, 1.0, rows_at_once=None)
    measured = measure_policy(policy, prompts, reward, config, reference_reward=other, references=["w1 w2"] * 4)
    row = measured.evaluation.as_dict()
    assert row["reward"] == pytest.approx(0.5) and row["unscored"] == 1 and measured.rewards.isnan().sum() == 1
    assert row["reward_ci95"] == pytest.approx(1.96 * 0.5 / math.sqrt(3))
    assert row["reference_reward"] == pytest.approx(0.75) and row["reference_unscored"] == 0
    assert row["reference_reward_ci95"] == pytest.approx(1.96 * 0.5 / 2)
    expected = rouge(measured.completions, ["w1 w2"] * 4)["rougeL"]
    assert row["rougeL"] == pytest.approx(float(expected.mean()))
    assert row["rougeL_ci95"] == pytest.approx(1.96 * float(expected.std()) / 2)
    assert row["kl"] == 0 and {"distinct_1", "distinct_2", "distinct_3"} <= row.keys()
    none = Reward(lambda prompts, completions: [math.nan] * len(prompts), 0.0, 1.0)
    row = measure_policy(policy, prompts, none, config).evaluation.as_dict()
    assert math.isnan(row["reward"]) and row["unscored"] == 4
    assert not {"reference_reward", "rouge1"} & row.keys(), "what was not measured is left out"


@pytest.mark.parametrize(("stages", "passes"), [(0, 1), (1, 2), (2, 3)])
def test_a_model_is_asked_once_however_many_names_it_has(stages, passes, monkeypatch):
    """The policy, what its newest stage started from, and the base; the numbers are those of three passes."""
    policy, config = tiny_policy("llama"), PPOConfig(max_completion_length=4)
    for stage in range(stages):
        torch.manual_seed(stage)
        policy.add_adapter(f"stage {stage}", AdapterConfig(r=2))
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if f".stage {stage}." in name:
                    p.add_(0.3 * torch.randn_like(p))
        policy.finish_stage()
    prompts = public_prompts(policy, [{"prompt": f"w{i} w2"} for i in range(4)], config)
    torch.manual_seed(0)
    rollouts = sample(policy, *padded(policy, prompts.prompts), config)
    with torch.no_grad():
        own = logprobs_under(policy, rollouts, config)
        with policy.reference():
            reference = logprobs_under(policy, rollouts, config)
        with policy.base():
            base = logprobs_under(policy, rollouts, config)
    asked = []
    monkeypatch.setattr(metrics, "logprobs_under", lambda *how: [asked.append(1), logprobs_under(*how)][1])
    reward = Reward(lambda prompts, completions: [0.0, 1.0, 0.5, 0.5], 0.0, 1.0, rows_at_once=None)
    row = measure_policy(policy, prompts, reward, config, seed=0).evaluation
    tokens = rollouts.completion_mask.sum(1)
    assert len(asked) == passes
    assert row.kl == pytest.approx(float((own - reference).sum(1).double().mean()), abs=1e-6)
    assert row.perplexity == pytest.approx(perplexity_of(base.sum(1), tokens)[0])
    assert (stages == 0) == (row.kl == 0) and (stages < 2 or not torch.allclose(base, reference))


# Win rates -------------------------------------------------------------------------------------------------------


def test_wilson_by_hand():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((10 / (10 + 1.96**2), 1.0))
    assert wilson(0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)))


def test_higher_reward_wins():
    wins = higher_wins(torch.tensor([1.0, 2.0, 2.0, math.nan]), torch.tensor([0.0, 2.0, 3.0, 1.0]))
    assert wins[:3].tolist() == [1.0, 0.5, 0.0] and wins[3].isnan()
    won = win_rate(wins)
    assert won.win_rate == 0.5 and won.pairs == 3 and (won.low, won.high) == wilson(1.5, 3)
    nothing = win_rate(torch.tensor([math.nan]))
    assert nothing.pairs == 0 and math.isnan(nothing.win_rate)


def test_a_judge_is_asked_in_both_orders():
    prompts, ours, theirs = ["p"] * 3, ["aaa", "a", "aa"], ["a", "aaa", "aa"]
    wins, bias = judged(lambda p, a, b: [1.0] * len(p), "first", prompts, ours, theirs)
    assert wins.tolist() == [0.5] * 3 and bias == 0.5

    def longer(prompts, a, b):
        return [0.5 + 0.5 * (len(x) > len(y)) - 0.5 * (len(x) < len(y)) for x, y in zip(a, b, strict=True)]

    wins, bias = judged(longer, "longer", prompts, ours, theirs)
    assert wins.tolist() == [1.0, 0.0, 0.5] and bias == 0
    # says 0.9 for the longer one if it comes first, 0.6 if it comes second: (0.9 + 0.6) / 2
    wins, bias = judged(lambda p, a, b: [0.9 if len(a[0]) > len(b[0]) else 0.4], "leaning", ["p"], ["aaa"], ["a"])
    assert wins.tolist() == pytest.approx([0.75]) and bias == pytest.approx(0.15)


def raising(prompts, a, b):
    raise KeyError("score")


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (lambda p, a, b: [0.5], "returned 1 answers for 2 prompts"),
        (lambda p, a, b: ["A", "B"], "must return numbers"),
        (lambda p, a, b: [0.5, 1.5], "returned 1.5 for pair 2"),
        (lambda p, a, b: [math.nan, 0.5], "returned nan for pair 1"),
        (lambda p, a, b: 3, "raised TypeError"),
        (raising, "raised KeyError"),
    ],
)
def test_a_judge_that_returns_nonsense(judge, says):
    with pytest.raises(DPAlignError, match=says):
        judged(judge, "bad", ["p", "q"], ["a", "b"], ["c", "d"])


def test_loading_a_judge():
    assert load_judge("operator:add") is not None
    for source, says in (
        ("operator", "not module:function"),
        ("operator:nothing", "cannot be imported"),
        ("nowhere_at_all:f", "cannot be imported"),
        ("string:digits", "is not a function"),
    ):
        with pytest.raises(DPAlignError, match=says):
            load_judge(source)


# What the guarantee does not cover -------------------------------------------------------------------------------


def state(folder: Path, private: bool, epsilon: float | str) -> Path:
    """A privacy.json of demo data, which is labelled like any other."""
    folder.mkdir(parents=True, exist_ok=True)
    value = json.loads((Path(__file__).parent / "formats" / "privacy_parallel.json").read_text(encoding="utf-8"))
    value |= {"private": private, "epsilon": epsilon, "ledger": [{"dataset": "demo", "demo_data": True}]}
    (folder / "privacy.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("private", "epsilon", "stated"),
    [(True, 4.0, 4.0), (False, 4.0, math.inf), (False, "inf", math.inf), (True, "inf", math.inf)],
)
def test_stated_epsilon(tmp_path, private, epsilon, stated):
    assert stated_epsilon(str(tmp_path)) is None
    assert stated_epsilon(str(state(tmp_path, private, epsilon))) == stated
    (tmp_path / "privacy.json").write_text("{}")
    with pytest.raises(DPAlignError, match="not a privacy statement"):
        stated_epsilon(str(tmp_path))


def test_the_plot_says_it(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    row = {"reward": 0.1, "reward_ci95": 0.1, "kl": 1.0, "kl_ci95": math.nan, "reference_reward": 0.2}
    rows = {"eps4": row | {"epsilon": 4.0}, "free": row | {"epsilon": math.inf}}
    plot_evaluation(rows, tmp_path / "a.svg", title="T", outside=["reference_reward"])
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert f"{OUTSIDE}: reference reward, free" in text and f"reference reward: {OUTSIDE}" in text
    assert f"free ({OUTSIDE})" in text and f"eps4 ({OUTSIDE})" not in text
    del rows["free"]
    plot_evaluation(rows, tmp_path / "b.svg", title="T")
    assert OUTSIDE not in (tmp_path / "b.svg").read_text(encoding="utf-8")


# The command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Random adapters and reward models that claim epsilon 4 (`eps4`) and none (`free`)."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    base = embedded.resolve("tiny-review-lm")
    for name, private, epsilon in (("eps4", True, 4.0), ("free", False, "inf")):
        policy = Policy.load(ModelConfig())
        policy.add_adapter("ppo", AdapterConfig(r=2))
        for key, p in policy.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.05)
        policy.save_adapter(state(folder / name / "release", private, epsilon), base)
        model = RewardModel.load(ModelConfig(), text=TextFormat(max_length=16))
        model.add_adapter("reward", AdapterConfig(r=2))
        torch.nn.init.normal_(model.head.weight, std=0.05)
        model.save(state(folder / name / "reward_model", private, epsilon), base, Normalization())
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, with prompts, texts and judges."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judges", raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "short"}, {"text": "a film"}])
    write_jsonl(tmp_path / "partial.jsonl", [PROMPTS[0], {"prompt": "This film"}])
    (tmp_path / "judges.py").write_text(
        "def first(prompts, a, b):\n    return [1] * len(a)\n"
        "def nonsense(prompts, a, b):\n    return [2] * len(a)\n"
        "def length(prompts, completions, **columns):\n    return [len(c) / 100 for c in completions]\n"
    )
    return tmp_path


EVALUATE = ("--data", "prompts.jsonl", "--eval_is_public", "--prepend_bos", "--max_completion_length", 6)


def test_the_whole_table(made, here, capsys):
    ours, free = made / "eps4" / "release", made / "free" / "release"
    reference = f"reward_model:{made / 'free' / 'reward_model'}"
    before = files_below(here)
    options = (
        *EVALUATE, "--reward", f"reward_model:{made / 'eps4' / 'reward_model'}", "--reference_reward", reference,
        "--baseline", "tiny-review-lm", "--output", "out.json", "--plot", "out.png",
    )  # fmt: skip
    called = call(capsys, "evaluate", ours, free, *options)
    assert called.status == 0, called.err
    assert f"reference reward: {reference}" in called.out and f"({OUTSIDE})" in called.out
    assert f"{OUTSIDE}: reference reward, free/release." in called.out
    assert "ROUGE-L" in called.out and "win rate" in called.out and "95% Wilson interval" in called.out
    result = json.loads((here / "out.json").read_text(encoding="utf-8"))
    assert result["reference_reward"] == {"source": reference, "outside_the_guarantee": True}
    assert result["outside_the_guarantee"] == {"columns": ["reference_reward"], "models": [str(free)]}
    assert list(result["models"]) == [str(ours), str(free), "tiny-review-lm"]
    row, base = result["models"][str(ours)], result["models"]["tiny-review-lm"]
    assert row["epsilon"] == 4 and result["models"][str(free)]["epsilon"] == "inf" and "epsilon" not in base
    assert row["win_rate_low"] <= row["win_rate"] <= row["win_rate_high"] and row["win_rate_pairs"] == 8
    assert "win_rate" not in base and base["kl"] == 0 and row["kl"] != 0
    assert {"rouge1", "rouge2", "rougeL", "rougeL_ci95", "distinct_1", "reward_ci95", "kl_ci95"} <= row.keys()
    assert row["prompts"] == 8 and row["unscored"] == 0
    assert (here / "out.png").read_bytes().startswith(b"\x89PNG")
    written = {f.name for f in set(files_below(here)) - set(before) if "__pycache__" not in f.parts}
    assert written == {"out.json", "out.png"}, "nothing else is written"


def test_a_reward_without_a_guarantee_is_labelled_too(made, here, capsys):
    source = f"reward_model:{made / 'free' / 'reward_model'}"
    own = f"reward_model:{made / 'eps4' / 'reward_model'}"
    result = call(
        capsys, "evaluate", "tiny-review-lm", *EVALUATE, "--num_prompts", 3, "--reward", source, "--reference_reward",
        own, "--baseline", made / "eps4" / "release", "--json",
    ).json  # fmt: skip
    assert result["outside_the_guarantee"] == {"columns": ["reward", "win_rate"], "models": []}
    assert result["reference_reward"] == {"source": own, "outside_the_guarantee": False}
    assert result["judge"] == {"source": source, "outside_the_guarantee": True}
    assert result["models"]["tiny-review-lm"]["prompts"] == 3


def test_a_judge_on_the_command_line(made, here, capsys):
    pair = ("evaluate", made / "eps4" / "release", *EVALUATE, "--baseline", "tiny-review-lm", "--judge", "judges:first")
    called = call(capsys, *pair)
    assert "0.500 [0.215, 0.785]" in called.out and "leans to the first of two completions by +0.500" in called.out
    assert f"{OUTSIDE}: win rate." in called.out, "nobody declared the judge public"
    declared = ("--judge_is_public", "--reference_reward", "judges:length", "--reference_reward_low", 0)
    result = call(capsys, *pair, *declared, "--reference_reward_high", 1, "--json").json
    assert result["outside_the_guarantee"]["columns"] == ["reference_reward"], "an undeclared function is labelled"
    assert result["judge"] == {"source": "judges:first", "outside_the_guarantee": False}
    assert "wins" not in call(capsys, "evaluate", "tiny-review-lm", *EVALUATE).out


def test_partial_references_are_not_silent(here, capsys):
    called = call(capsys, "evaluate", "tiny-review-lm", "--data", "partial.jsonl", *EVALUATE[2:])
    assert "no ROUGE: 1 of 2 records have no text in column 'completion'" in called.out and "ROUGE-1" not in called.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--reference_column", "summary"), "no column 'summary'"),
        (("--data", "partial.jsonl", "--reference_column", "completion"), "record 2 of partial.jsonl"),
        (("--data", "texts.jsonl"), "long enough for a prompt"),
        (("--max_prompt_length", "2"), "more than max_prompt_length 2"),
        (("--max_completion_length", "5000"), "lower --max_completion_length"),
        (("--num_prompts", "0"), "--num_prompts: 0 must be at least 1"),
        (("--baseline", "runs/nowhere/release"), "model 'runs/nowhere/release' is neither a folder here"),
        (("--judge", "judges:first"), "name the one to compare with by --baseline"),
        (("--judge", "judges:nothing", "--baseline", "tiny-review-lm"), "cannot be imported"),
        (("--reward_low", "1", "--reward_high", "-1"), "must be finite and not empty"),
        (("--reward", "judges:length", "--reward_is_public"), "needs its declared range"),
        (("--reference_reward", "judges:length"), "needs its declared range"),
        (("--reference_reward", "reward_model:nowhere"), "not the release of a reward model"),
        (("--plot", "plot.xyz"), "must end in .png"),
        (("--output", "nowhere/out.json"), "does not exist"),
    ],
)
def test_bad_calls(arguments, says, here, capsys):
    assert says in call(capsys, "evaluate", "tiny-review-lm", *EVALUATE, *arguments).error


def test_a_model_given_twice(here, capsys):
    assert "given twice" in call(capsys, "evaluate", "tiny-review-lm", "tiny-review-lm", *EVALUATE).error


def test_a_bad_judge_on_the_command_line(made, here, capsys):
    arguments = (*EVALUATE, "--num_prompts", 2, "--baseline", "tiny-review-lm", "--judge", "judges:nonsense")
    assert "returned 2 for pair 1" in call(capsys, "evaluate", made / "eps4" / "release", *arguments).error


# From Python -----------------------------------------------------------------------------------------------------


SAMPLING = SamplingConfig(prepend_bos=True, max_completion_length=6)


def test_compare_returns_what_the_command_prints(made, here, capsys):
    ours, free = made / "eps4" / "release", made / "free" / "release"
    said = []

    def status(doing):
        said.append(doing)
        return nullcontext()

    found = dpalign.compare(
        [ours, free], "prompts.jsonl", SAMPLING, prompts_are_public=True, num_prompts=4, baseline="tiny-review-lm",
        judge="judges:first", reference_reward=RewardConfig(source="judges:length", low=0, high=1), seed=3, status=status,
    )  # fmt: skip
    printed = call(
        capsys, "evaluate", ours, free, *EVALUATE, "--num_prompts", 4, "--baseline", "tiny-review-lm", "--judge",
        "judges:first", "--reference_reward", "judges:length", "--reference_reward_low", 0, "--reference_reward_high", 1,
        "--seed", 3, "--json",
    ).json  # fmt: skip
    assert json.loads(dumps(found.to_json())) == printed
    assert said == [f"measuring {name}" for name in ("tiny-review-lm", ours, free)], "the baseline first"
    assert list(found.models) == [str(ours), str(free), "tiny-review-lm"] and found.prompts == 4
    assert found.columns_outside == ("reference_reward", "win_rate") and found.models_outside == [str(free)]
    row = found.models[str(ours)]
    assert row.epsilon == 4 and row.won.pairs == 4 and row.won.position_bias == 0.5
    assert row.evaluation.reference_reward is not None and found.models["tiny-review-lm"].won is None


def test_compare_takes_records(here):
    found = dpalign.compare(["tiny-review-lm"], PROMPTS[:2], SAMPLING, prompts_are_public=True)
    assert found.to_json()["data"] == found.data == "the given list" and found.reference_column == "completion"
    assert found.models["tiny-review-lm"].evaluation.rougeL is not None and not found.columns_outside
    assert "win_rate" not in found.to_json()["models"]["tiny-review-lm"]


@pytest.mark.parametrize(
    ("models", "records", "options", "says"),
    [
        (["tiny-review-lm"], PROMPTS, {"prompts_are_public": False}, "declare the prompts public"),
        (["tiny-review-lm"], PROMPTS, {"num_prompts": 0}, "num_prompts 0 must be at least 1"),
        (["tiny-review-lm"], PROMPTS, {"judge": "judges:first"}, "name the one to compare with"),
        (["tiny-review-lm"] * 2, PROMPTS, {}, "given twice"),
        ([], PROMPTS, {}, "name at least one"),
        (["tiny-review-lm"], [], {}, "nothing to measure on"),
        (["tiny-review-lm"], [{"prompt": ""}], {}, "record 1 of the given list has no text in column 'prompt'"),
    ],
)
def test_compare_refuses(models, records, options, says, here):
    with pytest.raises(DPAlignError, match=says):
        dpalign.compare(models, records, SAMPLING, **{"prompts_are_public": True} | options)


def test_other_tokenizers_are_given_the_same_prompts():
    texts = [{"text": f"w{i} w2 w3 w4 w5 w6"} for i in range(3)] + [{"text": "w1"}]
    config = PPOConfig(prompt_max_tokens=4, max_completion_length=2)
    own, other = Policy.load(ModelConfig()), tiny_policy("gpt2")
    prompts = same_prompts(own, texts, config, "f")
    cut = prompts.texts
    again = same_prompts(other, texts, config, "f", (prompts, cut))
    assert [r["prompt"] for r in again.records] == cut and len(cut) == len(again.prompts)
    assert same_prompts(own, texts, config, "f", (prompts, cut)).prompts == prompts.prompts


def test_short_names():
    assert short_names(["runs/a/release", "runs/b/release", "base"]) == {
        "runs/a/release": "a/release", "runs/b/release": "b/release", "base": "base",
    }  # fmt: skip
    assert short_names(["runs/a/release"]) == {"runs/a/release": "release"}


def test_a_row_or_a_column_per_model():
    row = {
        "reward": 0.125,
        "reward_ci95": 0.5,
        "kl": math.nan,
        "win_rate": 0.5,
        "win_rate_low": 0.25,
        "win_rate_high": 1.0,
    }
    rows = {"a[b]": row, "base": {"reward": 0.25, "reward_ci95": math.nan, "kl": 0.0, "unscored": 2, "prompts": 8}}
    for transposed in (False, True):
        with (console := Console(width=120)).capture() as shown:
            console.print(evaluation_table(rows, outside=["reward"], full=True, transposed=transposed))
        text = shown.get()
        for cell in ("a[b]", "0.125 ± 0.500", "0.250", "0.500 [0.250, 1.000]", "baseline", f"({OUTSIDE})", " - "):
            assert cell in text
        assert "the reward could not score 2 of 8 completions of base" in text
    assert evaluation_table(rows).columns[1].header == "reward" and len(evaluation_table(rows).columns) == 3
