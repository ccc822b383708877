"""Models are measured on public records before, while and after they train; that changes nothing that is trained."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback

from dpalign import (
    DPAlignError,
    DPOConfig,
    DPPPOTrainer,
    DPRewardTrainer,
    DPSFTTrainer,
    PPOConfig,
    Privacy,
    RewardModelConfig,
    SFTConfig,
)
from dpalign.algorithms import DPO, PPO, SFT, RewardModelling
from dpalign.algorithms import SFTConfig as SFTSettings
from dpalign.evaluation.during import Evaluations, check_public, undisturbed
from dpalign.evaluation.texts import per_token, text_loss
from dpalign.reporting.html import FoundRun, evaluated_of
from dpalign.reporting.tables import about_texts, evaluation_table
from dpalign.training.loop import hash_of, is_due
from helpers import call, ledger_rows, reviews, write_jsonl, write_recipe
from tiny import tiny_folder, tiny_policy, tiny_tokenizer, words

SIZES = {"expected_batch_size": 8, "micro_batch_size": 8, "max_steps": 4}
PUBLIC = [{"text": words(3 + seed, 100 + seed)} for seed in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_folder("llama", tmp_path_factory.mktemp("base") / "base"))


def declared(folder: Path, **more: Any) -> Privacy:
    told = {"noise_multiplier": 2.0, "dataset_name": "toy", "model_is_public": True, "eval_is_public": True}
    return Privacy(**told | {"ledger": str(folder) + ".sqlite"} | more)


def sft(base: str, folder: Path, *callbacks: TrainerCallback, shown: Any = PUBLIC, **settings: Any) -> DPSFTTrainer:
    args = SFTConfig(output_dir=str(folder), **SIZES | {"max_length": 8, "learning_rate": 0.05} | settings)
    rows = [{"text": words(6, seed)} for seed in range(32)]
    return DPSFTTrainer(base, args, rows, shown, callbacks=callbacks, privacy=declared(folder), quiet=True)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[tuple[int, int]]:
    return [(line["step"], line["attempt"]) for line in evaluations(folder)]


# The numbers ---------------------------------------------------------------------------------------------------------


def test_the_loss_on_texts_worked_by_hand():
    assert per_token(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0])) == pytest.approx((3, 1.96 * 2))
    # 2 nats in 1 token and 2 in 3: a mean over tokens, not over texts; a text without a token says nothing.
    found = text_loss(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([1.0, 3.0, 0.0]))
    assert (found.text_loss, found.text_records, found.text_tokens) == (1.0, 2, 4)
    assert math.isnan(text_loss(torch.tensor([2.0]), torch.tensor([1.0])).text_loss_ci95)


@pytest.mark.parametrize("completion_only", [None, False])
def test_texts_are_read_as_in_training(completion_only):
    """Against transformers: the negative log-likelihood of each token after the first that is learned, and cut."""
    policy, tokenizer = tiny_policy("llama"), tiny_tokenizer()
    algorithm = SFT(SFTSettings(max_length=7, micro_batch_size=2, completion_only_loss=completion_only))
    records = [{"prompt": words(n, n) + " ", "completion": words(4, 9 + n)} for n in (2, 1, 5)]
    nats, tokens = algorithm.nats(policy, records)
    for i, record in enumerate(records):
        prompt = tokenizer(record["prompt"], add_special_tokens=False).input_ids
        ids = prompt + tokenizer(record["completion"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        ids = ids[:7]
        with torch.no_grad():
            logprobs = policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        first = len(prompt) if completion_only is None else 1
        each = [-float(logprobs[place - 1, ids[place]]) for place in range(first, len(ids))]
        assert tokens[i] == len(each) and nats[i] == pytest.approx(sum(each), rel=1e-5)
    rows = algorithm.rows(policy, [[algorithm.encode(policy, record)] for record in records], None)
    assert algorithm.row_losses(policy, rows)[0].tolist() == pytest.approx((nats / tokens).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("every", "minibatches", "end", "due"),
    [(5, 1, 12, [0, 5, 10, 12]), (5, 4, 16, [0, 8, 12, 16]), (1, 1, 2, [0, 1, 2]), (None, 1, 2, [])],
)
def test_when_a_model_is_measured(every, minibatches, end, due):
    phases = range(0, end + 1, minibatches)
    assert [step for step in phases if is_due(every, step, minibatches, end)] == due


# A trainer -----------------------------------------------------------------------------------------------------------


class Watching(TrainerCallback):
    def __init__(self, fails_at: int | None = None, error: type[BaseException] = ZeroDivisionError) -> None:
        self.seen, self.logs, self.fails_at, self.error = [], [], fails_at, error

    def on_evaluate(self, args, state, control, metrics=None, **more):
        self.seen.append((state.global_step, metrics))
        assert not more

    def on_log(self, args, state, control, logs=None, **more):
        self.logs.append(logs)

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.fails_at:
            raise self.error


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    watching = Watching()
    trainer = sft(base, folder, watching, eval_steps=2)
    return folder, trainer, trainer.train(), watching


def test_sft_is_measured_before_while_and_after_it_trains(trained, base):
    folder, _, summary, _ = trained
    assert steps(folder) == [(0, 0), (2, 0), (4, 0)]
    measured = [line["measured"] for line in evaluations(folder)]
    plain, tokenizer, nats, tokens = AutoModelForCausalLM.from_pretrained(base), tiny_tokenizer(), 0.0, 0
    for record in PUBLIC:  # before the first step it is the base model, read by transformers alone
        ids = torch.tensor([[*tokenizer(record["text"]).input_ids, tokenizer.eos_token_id][:8]])
        nats += float(plain(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert measured[0]["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert (measured[0]["records"], measured[0]["tokens"]) == (8, tokens)
    assert len({numbers["loss"] for numbers in measured}) == 3
    assert list(summary["evaluation"]) == ["pretrained", "sft"]
    assert summary["evaluation"]["pretrained"]["text_loss"] == measured[0]["loss"]
    assert summary["evaluation"]["sft"]["text_loss"] == measured[2]["loss"]


def test_callbacks_are_told_as_by_transformers(trained):
    folder, trainer, _, watching = trained
    lines = evaluations(folder)
    assert [step for step, _ in watching.seen] == [line["step"] for line in lines]
    for (step, metrics), line in zip(watching.seen, lines, strict=True):
        assert metrics == {f"eval_{k}": v for k, v in line["measured"].items()} | {"epoch": step * 8 / 32}
        assert metrics in watching.logs
    history = trainer._reporter.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 2, 4]


def test_report_and_card_say_whether_it_learned(trained):
    folder, _, summary, _ = trained
    page, card = ((folder / name).read_text() for name in ("report.html", "release/README.md"))
    assert "Public records while it trained" in page and "8 held-out public texts" in page
    charts = evaluated_of(FoundRun.read(folder), [])
    assert [(chart.title, len(chart.lines[0].dots), bool(chart.lines[0].band)) for chart in charts["sft"]] == [
        ("loss", 3, True)
    ]
    for name, row in summary["evaluation"].items():
        assert f"`{name}` {row['text_loss']:.3f} ± {row['text_loss_ci95']:.3f}" in card


# It changes nothing --------------------------------------------------------------------------------------------------


def scripted(prompts, completions):
    return [min(len(text), 40) / 40 for text in completions]


def ppo(base: str, folder: Path, **settings: Any) -> None:
    lengths = {
        "max_prompt_length": 8,
        "max_completion_length": 4,
        "max_steps": 2,
        "insecure_seed": 7,
        "learning_rate": 0.05,
    }
    args = PPOConfig(output_dir=str(folder), **SIZES | lengths | settings)
    rows = [{"prompt": words(3, seed)} for seed in range(16)]
    shown = [{"prompt": words(3, seed)} for seed in range(50, 55)]
    told = declared(folder, reward_is_public=True, reward_range=(0, 1), ledger=str(folder.parent / "ledger.sqlite"))
    DPPPOTrainer(base, args, rows, shown, reward_funcs=scripted, privacy=told, quiet=True).train()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_seeded_run_releases_the_same_bytes_with_and_without_it(gradient_checkpointing, base, tmp_path):
    for name, more in (("without", {}), ("with", {"eval_steps": 1})):
        ppo(base, tmp_path / name, gradient_checkpointing=gradient_checkpointing, **more)
    without, measured = (
        [(tmp_path / name / file).read_bytes() for file in ("release/adapter_model.safetensors", "metrics.jsonl")]
        for name in ("without", "with")
    )
    assert without == measured
    assert not (tmp_path / "without" / "evaluations.jsonl").exists()
    lines = evaluations(tmp_path / "with")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["measured"]["kl"] == 0 and lines[2]["measured"]["prompts"] == 5
    summary = json.loads((tmp_path / "with" / "summary.json").read_text())
    assert lines[2]["measured"]["reward"] == pytest.approx(summary["evaluation"]["ppo"]["reward"])


def test_coins_modes_and_trainables_are_put_back():
    policy = tiny_policy("llama").eval()
    policy.model.model.layers[0].training = True
    trained = policy.model.lm_head.weight.requires_grad_(True)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with undisturbed(policy):
        torch.rand(100)
        assert not any(module.training for module in policy.modules())
        trained.requires_grad_(False)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(4), expected) and torch.is_grad_enabled()
    modes = [module for module in policy.modules() if module.training]
    assert modes == [policy.model.model.layers[0]] and trained.requires_grad


def test_eval_steps_is_no_setting_of_what_is_released(base, tmp_path):
    old = {"seed": 0, "adapter": {"r": 4}}
    assert hash_of(old | {"eval_steps": None}) == hash_of(old)
    with pytest.raises(ZeroDivisionError):
        sft(base, tmp_path / "run", Watching(fails_at=3), eval_steps=2).train()
    assert sft(base, tmp_path / "run", eval_steps=3).train()["private"]
    assert sft(base, tmp_path / "run", shown=None).train()["private"]


# Interruptions -------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(base, tmp_path):
    with pytest.raises(ZeroDivisionError):
        sft(base, tmp_path / "run", Watching(fails_at=3), eval_steps=2).train()
    assert steps(tmp_path / "run") == [(0, 0), (2, 0)]
    before = evaluations(tmp_path / "run")
    sft(base, tmp_path / "run", eval_steps=2).train()
    assert steps(tmp_path / "run") == [(0, 0), (2, 0), (4, 1)] and evaluations(tmp_path / "run")[:2] == before
    sft(base, tmp_path / "run", eval_steps=2).train()  # finished
    assert len(steps(tmp_path / "run")) == 3


def test_what_was_trained_again_is_measured_again(base, tmp_path):
    """The first attempt's step 2 was lost; the second one's was saved, but not measured before it was interrupted."""
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        sft(base, run, Watching(fails_at=3), eval_steps=2, save_steps=4).train()
    with pytest.raises(KeyboardInterrupt):
        sft(base, run, Watching(fails_at=2, error=KeyboardInterrupt), eval_steps=2, save_steps=4).train()
    assert steps(run) == [(0, 0), (2, 0)]
    sft(base, run, eval_steps=2, save_steps=4).train()
    assert steps(run) == [(0, 0), (2, 0), (2, 1), (4, 2)]
    assert evaluations(run)[1]["measured"] != evaluations(run)[2]["measured"]
    found = FoundRun.read(run)
    assert [(row["step"], row["attempt"]) for row in found.measured_in("sft")] == [(0, 0), (2, 1), (4, 2)]


def test_a_half_line_of_a_killed_process_is_measured_again(tmp_path):
    log = tmp_path / "evaluations.jsonl"
    log.write_text('{"stage": "sft", "step": 0, "attempt": 0, "measured": {"loss": 1.0}}\n{"stage": "sft", "st')
    told, policy = [], tiny_policy("llama")
    found = Evaluations(log, "sft", 4, policy, lambda: {"loss": 2.0}, told.append)
    for step in (0, 2):
        found(step, 0, True)
    assert [report.step for report in told] == [2]
    assert [(json.loads(line)["step"], json.loads(line)["measured"]) for line in log.read_text().splitlines()] == [
        (0, {"loss": 1.0}),
        (2, {"loss": 2.0}),
    ]


# What is refused -----------------------------------------------------------------------------------------------------


def test_trainers_ask_for_what_it_needs(base, tmp_path):
    with pytest.raises(DPAlignError, match="eval_dataset: the public records that eval_steps"):
        sft(base, tmp_path / "run", shown=None, eval_steps=2)
    for settings in ({"eval_strategy": "steps"}, {"eval_strategy": "no", "eval_steps": 2}):
        with pytest.raises(DPAlignError, match="contradicts eval_steps"):
            sft(base, tmp_path / "run", **settings)
    with pytest.raises(DPAlignError, match=r"eval_strategy.*'epoch'"):
        sft(base, tmp_path / "run", eval_strategy="epoch", eval_steps=2)
    with pytest.raises(DPAlignError, match="what its last step made"):
        SFTConfig(load_best_model_at_end=True)
    with pytest.raises(DPAlignError, match="eval_is_public=True"):
        DPSFTTrainer(base, SFTConfig(output_dir="x", max_steps=1), PUBLIC, PUBLIC, privacy=Privacy(target_epsilon=1))
    sft(base, tmp_path / "run", eval_strategy="steps", eval_steps=2)
    assert not (tmp_path / "run").exists()


def test_a_recipe_needs_public_records_for_it(tmp_path, capsys):
    recipe = write_recipe(tmp_path, sft={"eval_steps": 1}, ppo=None)
    assert "sft.eval_steps measures on public records" in call(capsys, "run", recipe).error
    shown = write_jsonl(tmp_path / "public.jsonl", [{"prompt": "Only prompts."}])
    public = {"eval_path": str(shown), "eval_is_public": True}
    assert "'prompt'" in call(capsys, "run", write_recipe(tmp_path, data=public, ppo=None)).error
    write_jsonl(shown, reviews(2))  # texts of the private data
    assert "share" in call(capsys, "run", write_recipe(tmp_path, data=public, ppo=None)).error
    assert ledger_rows(tmp_path) == 0


def test_records_that_measure_nothing_are_refused_before_a_draw():
    ties, decided = [{"chosen": "a", "rejected": "b", "preference": 0.5}], [{"chosen": "a", "rejected": "b"}]
    for kind in (RewardModelling, DPO):
        check_public(kind, [], ties + decided, "public.jsonl")
        with pytest.raises(DPAlignError, match="are ties"):
            check_public(kind, [], ties, "public.jsonl")
    for kind in (SFT, PPO):
        from dpalign.algorithms.base import Reading

        check_public(kind, [Reading(3, 8, 0), Reading(3, 8, 2)], [{}, {}], "public.jsonl")
        with pytest.raises(DPAlignError, match="too short for a"):
            check_public(kind, [Reading(3, 8, 0)], [{}], "public.jsonl")


# Pairs ---------------------------------------------------------------------------------------------------------------


def test_pairs_are_measured_while_a_model_learns_them(base, tmp_path):
    from dpalign import DPDPOTrainer

    rows = [{"chosen": words(5, seed), "rejected": words(5, 99 + seed)} for seed in range(32)]
    shown = [{"chosen": words(5, 300 + seed), "rejected": words(5, 400 + seed)} for seed in range(6)]
    more = {"max_length": 8, "eval_steps": 4, "learning_rate": 0.05}
    for trainer, config in ((DPDPOTrainer, DPOConfig), (DPRewardTrainer, RewardModelConfig)):
        folder = tmp_path / trainer.__name__
        args = config(output_dir=str(folder), **SIZES | more)
        summary = trainer(base, args, rows, shown, privacy=declared(folder), quiet=True).train()
        before, after = (line["measured"] for line in evaluations(folder))
        name = trainer.algorithm.name
        ended = {key: pytest.approx(value) for key, value in summary[name].items()}
        apart = {key: ended.pop(key) for key in ("shift", "outside", "own_texts") if key in ended}  # said at the end alone
        assert after == ended and len(apart) == (0 if trainer is DPDPOTrainer else 3)
        if trainer is DPDPOTrainer:  # the policy is its own reference before the first step
            assert before["nll"] == pytest.approx(math.log(2)) and before["accuracy"] == 0.5


# A table -------------------------------------------------------------------------------------------------------------


def test_the_brief_table_with_losses_on_texts_fits_a_terminal():
    row = {"reward": 0.069, "reward_ci95": 0.024, "kl": 2.03, "perplexity": 71.14, "distinct_2": 0.809}
    row |= {"completion_length": 15.08, "text_loss": 4.186, "text_loss_ci95": 0.035, "text_records": 1000}
    rows = dict.fromkeys(("pretrained", "sft", "private"), row)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation_table(rows))
    lines = console.export_text().splitlines()
    assert len(lines) == 5 + len(rows)  # title, head and three rules: nothing is broken into two lines
    assert "text loss" in lines[2] and all("4.186" in line for line in lines[-4:-1])
    assert about_texts(rows) == "text loss: nats per token of 1,000 held-out public texts; lower is better."
