"""DP-DPO: the loss by hand, what is learned of a record, the command, the trainer and the public pairs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import PeftModel

import dpalign
from dpalign import DPDPOTrainer, Privacy
from dpalign.algorithms import DPO, DPOConfig
from dpalign.algorithms.base import encode_units
from dpalign.algorithms.dpo import encode_answers
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, ModelConfig, Policy
from dpalign.models.bases import base_path
from helpers import call, files_below, judged, ledger_rows, statement, write_jsonl, write_recipe
from tiny import tiny_object, tiny_policy, tiny_tokenizer, words

EOS = 1
PAIR = {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5", "margin": 0.3, "preference": 0.8}


def moved_policy(algorithm: DPO, kind: str = "gpt2") -> Policy:
    """With the stage's adapter, which does something."""
    policy = tiny_policy(kind)
    algorithm.setup(policy)
    generator = torch.Generator().manual_seed(3)
    for p in policy.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return policy


def answer_logprob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    """By transformers alone, without padding."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(logprobs[place, token]) for place, token in zip(places, answer, strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("loss", ["sigmoid", "square"])
def test_loss_and_metrics_worked_by_hand(kind, loss):
    algorithm = DPO(DPOConfig(beta=0.5, loss=loss, label_smoothing=0.1, max_length=12, adapter=AdapterConfig(r=2)))
    policy = moved_policy(algorithm, kind)
    units = encode_units(algorithm, policy, [[{"chosen": "w9", "rejected": "w8"}], [PAIR]])
    rows = algorithm.rows(policy, units, None).of([1])
    found, metrics = algorithm.row_losses(policy, rows)
    prompt, chosen, rejected = [3, 4], [5, 6, EOS], [7, EOS]
    ratios = []
    for answer in (chosen, rejected):
        now = answer_logprob(policy.model, prompt, answer)
        with policy.reference():
            ratios.append(now - answer_logprob(policy.model, prompt, answer))
    assert min(map(abs, ratios)) > 0.1
    ahead = 0.5 * (ratios[0] - ratios[1])
    wanted = 0.8 * 0.8 + 0.1  # the preference, and a judge who errs in one case of ten
    if loss == "sigmoid":
        expected = wanted * math.log1p(math.exp(-(ahead - 0.3))) + (1 - wanted) * math.log1p(math.exp(ahead + 0.3))
    else:
        expected = (wanted - 1 / (1 + math.exp(-(ahead - 0.3)))) ** 2
    assert found.tolist() == pytest.approx([expected] * 2, rel=1e-4)
    assert metrics[0].tolist() == pytest.approx([expected, float(ahead > 0), ahead], rel=1e-4)
    assert algorithm.differences(policy, [PAIR]).item() == pytest.approx(ahead, rel=1e-4)


def test_the_loss_begins_at_log_2_and_pulls_the_answers_apart():
    algorithm = DPO(DPOConfig(max_length=12, adapter=AdapterConfig(r=2)))
    policy = tiny_policy("llama")
    algorithm.setup(policy)
    rows = algorithm.rows(policy, encode_units(algorithm, policy, [[PAIR | {"margin": 0, "preference": 1}]]), None)
    for step in range(30):
        loss = algorithm.row_losses(policy, rows)[0].mean()
        assert step > 0 or loss.item() == pytest.approx(math.log(2), rel=1e-5)
        loss.backward()
        with torch.no_grad():
            for p in policy.parameters():
                if p.grad is not None:
                    p -= 2 * p.grad
                    p.grad = None
    assert algorithm.differences(policy, [PAIR]).item() > 0.5


def test_answers_of_a_record():
    tokenizer, config = tiny_tokenizer(), DPOConfig(max_length=5)
    found = encode_answers(tokenizer, PAIR, config)
    assert (found.chosen.ids, found.rejected.ids) == ([3, 4, 5, 6, EOS], [3, 4, 7, EOS])
    assert found.chosen.prompt_tokens == found.rejected.prompt_tokens == 2
    assert (found.margin, found.preference) == (0.3, 0.8)
    alone = encode_answers(tokenizer, {"chosen": "w3 w4 w5 w6 w7 w8", "rejected": "w1"}, config)
    assert (
        alone.chosen.prompt_tokens == 0 and alone.chosen.cut(5).ids == [5, 6, 7, 8, 9] and alone.preference == 1.0
    )  # cut: no EOS
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + '> ' + m.content + ' <eos> ' }}{% endfor %}{% if add_generation_prompt %}a> {% endif %}"
    ask, yes, no = ({"role": r, "content": c} for r, c in (("user", "w1"), ("assistant", "w2"), ("assistant", "w3")))
    whole = encode_answers(tokenizer, {"chosen": [ask, yes], "rejected": [ask, no]}, DPOConfig(max_length=20))
    apart = encode_answers(tokenizer, {"prompt": [ask], "chosen": [yes], "rejected": [no]}, DPOConfig(max_length=20))
    assert whole == apart and whole.chosen.ids[-2:] == [4, EOS]
    assert whole.chosen.prompt_tokens == len(whole.chosen.ids) - 2


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (PAIR | {"prompt": "w1 " * 9}, "the prompt alone has 9 tokens, and max_length is 8"),
        (PAIR | {"rejected": [{"role": "user", "content": "w1"}]}, "two of a kind"),
        (PAIR | {"margin": -1}, "no valid margin"),
    ],
)
def test_records_that_are_refused(record, says):
    with pytest.raises(DPAlignError, match=says):
        DPO.check(DPOConfig(max_length=8), tiny_tokenizer(), record)


def test_settings_that_cannot_be():
    for changes in ({"beta": 0.0}, {"label_smoothing": 0.5}, {"loss": "hinge"}, {"adapter": AdapterConfig(r=0)}):
        with pytest.raises(DPAlignError):
            check_settings(DPOConfig(**changes))


STAGE: dict[str, Any] = {
    "expected_batch_size": 8,
    "max_steps": 3,
    "max_length": 20,
    "prepend_bos": True,
    "adapter": {"r": 2},
}


def test_dpalign_dpo(tmp_path, capsys):
    """After SFT in one run, alone by its command, resumed, measured on public pairs; the release needs no dpalign."""
    pairs = {"name": "pairs", "path": str(write_jsonl(tmp_path / "pairs.jsonl", judged(40, start=100))), "unit": "id"}
    pairs |= {"eval_path": str(write_jsonl(tmp_path / "public.jsonl", judged(6, "public"))), "eval_is_public": True}
    recipe = write_recipe(tmp_path, ppo=None, dpo=STAGE, dpo_data=pairs, units_disjoint="declared")
    planned = call(capsys, "plan", recipe, "--json").json["stages"]
    assert [s["stage"] for s in planned] == ["sft", "dpo"] and planned[1]["tokens_trained"] == 3 * 8 * 40
    done = call(capsys, "run", recipe, "--json").json
    assert [s["stage"] for s in done["stages"]] == ["sft", "dpo"] and done["epsilon"] <= 2
    assert done["dpo"]["pairs"] == 6 and 0 <= done["dpo"]["accuracy"] <= 1 and done["dpo"]["margin"] != 0
    assert {s["stage"] for s in statement(tmp_path / "run")["stages"]} == {"sft", "dpo"}
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert {m for line in lines if line["stage"] == "dpo" for m in line["noised_metrics"]} == {
        "loss",
        "accuracy",
        "margin",
    }
    again = call(capsys, "run", recipe, "--json")
    assert again.json["dpo"] == pytest.approx(done["dpo"]) and ledger_rows(tmp_path, stage="dpo") == 3
    assert "stage dpo is already done" in again.err
    release = tmp_path / "run" / "release"
    base = base_path(release)
    policy = Policy.load(ModelConfig(base, dtype="float32"))
    assert PeftModel.from_pretrained(policy.model, release).peft_config["default"].r == 4
    alone = call(capsys, "dpo", recipe, "--output_dir", tmp_path / "alone", "--json").json
    assert [s["stage"] for s in alone["stages"]] == ["dpo"]
    assert "accuracy" in call(capsys, "dpo", recipe, "--output_dir", tmp_path / "alone").out
    text = "\n".join(
        f.read_text(errors="ignore") for f in files_below(tmp_path / "run", lambda f: "private" not in f.parts)
    )
    assert "evening" not in text


def test_the_trainer_reports_public_pairs(tmp_path):
    rows = [
        {"prompt": words(2, s), "chosen": " " + words(3, 100 + s), "rejected": " " + words(3, 200 + s)}
        for s in range(37)
    ]
    rows, shown = rows[:32], rows[32:]
    config = dpalign.DPOConfig(
        output_dir=str(tmp_path / "run"), expected_batch_size=8, max_steps=2, max_length=10, adapter=AdapterConfig(r=2)
    )
    toy = {"target_epsilon": 8.0, "dataset_name": "toy", "model_is_public": True}
    model = tiny_object("llama", tmp_path / "base")
    trainer = DPDPOTrainer(
        model, config, rows, shown, tiny_tokenizer(), privacy=Privacy(**toy, eval_is_public=True), quiet=True,
    )  # fmt: skip
    summary = trainer.train()
    assert summary["dpo"]["pairs"] == 5 and 0 < summary["epsilon"] <= 8 and trainer.privacy["private"]
    with pytest.raises(DPAlignError, match="eval_is_public=True"):
        DPDPOTrainer(model, config, rows, shown, tiny_tokenizer(), privacy=Privacy(**toy))
