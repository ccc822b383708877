"""The private reward model: its loss by hand, what it reads, and a release that plain peft scores alike."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpalign.algorithms import RewardModelConfig, RewardModelling
from dpalign.algorithms.base import check_records, encode_units
from dpalign.algorithms.pairs import check_pair, preference_loss, square_loss
from dpalign.algorithms.reward import encode_pair
from dpalign.data.text import encode_text
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, ModelConfig, Normalization, Policy, RewardModel, TextFormat
from dpalign.models.reward_model import normalization_of
from dpalign.rewards import RewardConfig, load_reward, normalize
from dpalign.rewards.learned import Learned, own_texts
from tiny import VOCABULARY, tiny_base, tiny_policy, tiny_tokenizer, words

EOS = 1
TEXT = TextFormat(max_length=12, append_eos=True)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def reward_model(kind: str = "gpt2", text: TextFormat | None = None, stages: int = 1) -> RewardModel:
    """A reward model on a policy with `stages` earlier adapters; adapters and head are random, not zero."""
    policy = tiny_policy(kind)
    torch.manual_seed(3)
    for stage in range(stages):
        policy.add_adapter(f"sft{stage}", AdapterConfig(r=2))
        randomize(policy)
        policy.finish_stage()
    model = RewardModel.from_policy(policy, text or TEXT)
    RewardModelling(RewardModelConfig(adapter=AdapterConfig(r=2))).setup(model)
    randomize(model)
    return model


def randomize(model: torch.nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)


# The loss ----------------------------------------------------------------------------------------------------


def test_preference_loss_worked_by_hand():
    chosen, rejected = torch.tensor([2.0, 2.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 3.0, 1.0])
    margin, preference = torch.tensor([0.0, 0.5, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.5])
    loss = preference_loss(chosen, rejected, margin, preference)
    # Differences 1, 1, -3, 0: the margin asks for half more, the third judge liked the other text, the fourth both.
    expected = [-math.log(logistic(1)), -math.log(logistic(0.5)), -math.log(logistic(3)), math.log(2)]
    assert loss.tolist() == pytest.approx(expected)


def test_label_smoothing_and_probabilities_worked_by_hand():
    score = torch.tensor([1.0])
    zero, one = torch.zeros(1), torch.ones(1)
    win, loss = -math.log(logistic(1)), -math.log(logistic(-1))
    assert preference_loss(score, zero, zero, one, 0.1).item() == pytest.approx(0.9 * win + 0.1 * loss)
    assert preference_loss(score, zero, zero, 0.75 * one).item() == pytest.approx(0.75 * win + 0.25 * loss)
    # 0.75 shrunk towards 1/2 by a judge who errs once in ten: 0.75 * 0.8 + 0.1.
    assert preference_loss(score, zero, zero, 0.75 * one, 0.1).item() == pytest.approx(0.7 * win + 0.3 * loss)


def test_square_loss_worked_by_hand():
    """Of a tie no margin is asked: neither text is the better one."""
    chosen, rejected = torch.tensor([2.0, 0.0, 1.5]), torch.tensor([1.0, 3.0, 1.0])
    margin, preference = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 0.0, 0.5])
    expected = [(1 - logistic(0.5)) ** 2, logistic(-2.5) ** 2, (0.5 - logistic(0.5)) ** 2]
    assert square_loss(chosen, rejected, margin, preference).tolist() == pytest.approx(expected)


def test_the_largest_id_of_a_pair_is_of_either_text():
    config = RewardModelConfig(max_length=12)
    tokenizer = tiny_tokenizer()
    for better, worse in (("w1 w9", "w2"), ("w2", "w9 w1")):
        reading = RewardModelling.check(config, tokenizer, {"chosen": better, "rejected": worse})
        assert reading.largest == max(tokenizer("w1 w2 w9").input_ids)


def test_a_pair_teaches_where_its_ends_differ():
    """The front of a long text is cut off: two that differ only there have the same score."""
    config = RewardModelConfig(max_length=2)
    for chosen, rejected, learned in (("w1 w5 w6", "w2 w5 w6", 0), ("w5 w6 w1", "w5 w6 w2", 2), ("w1", "w2 w5", 1)):
        reading = RewardModelling.check(config, tiny_tokenizer(), {"chosen": chosen, "rejected": rejected})
        assert (reading.learned, reading.limit) == (learned, 2), (chosen, rejected)


def test_a_tie_is_least_where_scores_are_equal_and_a_swap_is_the_mirror_image():
    difference = torch.linspace(-2, 2, 41)
    tie = preference_loss(difference, torch.zeros(41), torch.zeros(41), torch.full((41,), 0.5))
    assert int(tie.argmin()) == 20 and tie[20].item() == pytest.approx(math.log(2))
    a, b, margin, wanted = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    margin, wanted = margin.abs(), torch.sigmoid(wanted)
    assert torch.allclose(preference_loss(a, b, margin, wanted), preference_loss(b, a, margin, 1 - wanted), atol=1e-6)


def test_row_losses_and_metrics_of_a_pair():
    model = reward_model()
    algorithm = RewardModelling(RewardModelConfig(max_length=12, center_rewards_coefficient=0.5, label_smoothing=0.1))
    pairs = [
        {"chosen": "w5 w6", "rejected": "w7", "margin": 0.25}, {"chosen": "w8", "rejected": "w9 w3", "preference": 0.0},
        {"chosen": "w4", "rejected": "w2", "preference": 0.5},
    ]  # fmt: skip
    examples = encode_units(algorithm, model, [[pairs[0], pairs[1]], [pairs[2]]])
    rows = algorithm.rows(model, examples, None)
    with torch.no_grad():
        losses, metrics = algorithm.row_losses(model, rows)
    assert rows.unit.tolist() == [0, 0, 0, 0, 1, 1]
    chosen, rejected = model.score([p["chosen"] for p in pairs]), model.score([p["rejected"] for p in pairs])
    expected = preference_loss(
        chosen, rejected, torch.tensor([0.25, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.5]), 0.1
    ) + 0.5 * ((chosen + rejected) / 2) ** 2  # fmt: skip
    assert torch.allclose(losses, expected.repeat_interleave(2), atol=1e-5)
    difference = chosen - rejected
    assert torch.allclose(metrics[::2, 0], expected, atol=1e-5)
    assert metrics[0, 1] == float(difference[0] > 0) and metrics[2, 1] == float(difference[1] < 0)
    assert torch.allclose(metrics[::2, 2], difference * torch.tensor([1.0, -1.0, 0.0]), atol=1e-5)


def test_skipped_ties_leave_their_units_without_rows():
    model, tie = reward_model(), {"chosen": "w1", "rejected": "w2", "preference": 0.5}
    better = tie | {"preference": 0.6}
    for ties, counts in (("half", [2, 1, 1]), ("skip", [1, 0, 1])):
        algorithm = RewardModelling(RewardModelConfig(ties=ties, max_length=12))
        examples = encode_units(algorithm, model, [[tie, better], [tie], [better]])
        assert [len(unit) for unit in examples] == counts
        rows = algorithm.rows(model, examples, None)
        assert len(rows.of([0, 1, 2]).unit) == 2 * sum(counts)
        assert len(rows.of([]).unit) == len(algorithm.rows(model, [], None).unit) == 0


def test_settings_that_cannot_be():
    for smoothing in (-0.1, 0.5, 1.0):
        with pytest.raises(DPAlignError, match="label_smoothing"):
            check_settings(RewardModelConfig(label_smoothing=smoothing))
    with pytest.raises(DPAlignError, match="for stages that sample"):
        RewardModelConfig(adapter=AdapterConfig(init_a="synthetic_gradient")).validate()


# Records -----------------------------------------------------------------------------------------------------

GOOD = {"chosen": "yes", "rejected": "no"}


def check_pairs(records: list, path: str) -> None:
    check_records(records, path, RewardModelling.columns, check_pair)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"chosen": "zebrafinch"}, "expected 'chosen' \\+ 'rejected'"),
        (GOOD | {"rejected": ""}, "no text in column 'rejected'"),
        (GOOD | {"chosen": 3}, "no text in column 'chosen'"),
        (GOOD | {"margin": float("nan")}, "record 1 of pairs: no valid margin: expected a number of at least 0"),
        (GOOD | {"margin": -0.5}, "no valid margin"),
        (GOOD | {"margin": float("inf")}, "no valid margin"),
        (GOOD | {"margin": "zebrafinch"}, "no valid margin"),
        (GOOD | {"preference": 1.5}, r"no valid preference: expected a number in \[0, 1\]"),
        (GOOD | {"preference": float("nan")}, "no valid preference"),
        (GOOD | {"preference": [1]}, "no valid preference"),
    ],
)
def test_pairs_that_are_refused(record, says):
    with pytest.raises(DPAlignError, match=says) as raised:
        check_pairs([record], "pairs")
    assert "zebrafinch" not in str(raised.value) or "columns" in str(raised.value)


def test_the_record_that_is_wrong_is_named():
    with pytest.raises(DPAlignError, match="record 3 of"):
        check_pairs([GOOD, GOOD | {"margin": 0.5, "preference": 0}, GOOD | {"margin": "much"}], "pairs")
    check_pairs([GOOD, GOOD | {"margin": "0.5", "preference": 1, "prompt": "why"}, GOOD | {"margin": None}], "p")


def test_missing_columns_have_their_defaults():
    model = reward_model()
    pair = encode_pair(model, {"prompt": "w1 ", "chosen": "w2", "rejected": "w3", "margin": None})
    assert (pair.chosen, pair.rejected, pair.margin, pair.preference) == ([3, 4, EOS], [3, 5, EOS], 0.0, 1.0)
    pair = encode_pair(model, {"chosen": "w2", "rejected": "w3", "margin": 0.5, "preference": 0.0})
    assert (pair.chosen, pair.margin, pair.preference) == ([4, EOS], 0.5, 0.0)


TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


def test_chat_messages_go_through_the_template():
    model = reward_model()
    user, answer = {"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}
    other = answer | {"content": "w3"}
    with pytest.raises(DPAlignError, match="no chat template"):
        encode_pair(model, {"chosen": [user, answer], "rejected": [user]})
    model.tokenizer.chat_template = TEMPLATE
    expected = tuple(encode_text(model.tokenizer, text) for text in ("w1 w7 w8 w2 w9", "w1 w7 w8 w2 w3"))
    for pair in (
        {"prompt": [user], "chosen": [answer], "rejected": [other]},
        {"chosen": [user, answer], "rejected": [user, other]},
        {"prompt": "w7 w8", "chosen": [user, answer], "rejected": [user, other]},  # the prompt stands there twice
        {"prompt": [user], "chosen": [user, answer], "rejected": [user, other]},
        {"prompt": [user], "chosen": "w9", "rejected": "w3"},
    ):
        found = encode_pair(model, pair)
        assert (found.chosen, found.rejected) == expected, pair


def test_of_a_long_text_the_end_is_read():
    model = reward_model(text=TextFormat(max_length=4, append_eos=True))
    assert model.encode("w1 w2 w3 w4 w5") == [5, 6, 7, EOS]
    model = reward_model(text=TextFormat(max_length=4))
    assert model.encode("w1 w2 w3 w4 w5") == [4, 5, 6, 7] and model.encode("w1") == [3]
    ids, mask = model.pad([[5, 6], [7]])
    assert ids.tolist() == [[5, 6, 0, 0], [7, 0, 0, 0]] and mask.sum(1).tolist() == [2, 1]


# The model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_from_policy_shares_the_frozen_weights_and_reads_the_last_token(kind):
    policy = tiny_policy(kind)
    policy.add_adapter("sft", AdapterConfig(r=2))
    torch.manual_seed(0)
    randomize(policy)
    policy.finish_stage()
    model = RewardModel.from_policy(policy, TEXT)
    frozen = {p.data_ptr(): n for n, p in policy.named_parameters() if ".lora_" not in n}
    body = [p for n, p in model.named_parameters() if ".lora_" not in n and p is not model.head.weight]
    assert body and all(p.data_ptr() in frozen for p in body)
    assert not {p.data_ptr() for n, p in model.named_parameters() if ".lora_" in n} & {
        p.data_ptr() for p in policy.parameters()
    }
    assert model.score(["w3 w4", "w5"]).tolist() == [0, 0] and model.adapters == ["sft"]
    torch.nn.init.normal_(model.head.weight)
    ids = torch.tensor([[5, 6, 7, EOS]])
    with torch.no_grad():
        hidden = policy.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    assert model.score(["w3 w4 w5"]).item() == pytest.approx(float(hidden @ model.head.weight[0]), abs=1e-4)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_training_the_reward_model_leaves_the_policy_alone(kind):
    policy = tiny_policy(kind)
    policy.add_adapter("sft", AdapterConfig(r=2))
    randomize(policy)
    policy.finish_stage()
    before = {n: p.clone() for n, p in policy.named_parameters()}
    model = RewardModel.from_policy(policy, TEXT)
    RewardModelling(RewardModelConfig(adapter=AdapterConfig(r=2))).setup(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".reward_model." in n or n.endswith(f"{model.head_name}.weight") for n in trained) and len(trained) > 2
    randomize(model)
    with torch.enable_grad():
        model(*model.pad([[5, 6, EOS]])).sum().backward()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in policy.named_parameters())


def test_scores_do_not_depend_on_company_or_padding():
    model = reward_model(stages=2)
    texts = [words(1 + i % 9, i) for i in range(20)]
    scores = model.score(texts)
    assert scores.std() > 0.05
    alone = torch.cat([model.score([text]) for text in texts])
    assert torch.allclose(scores, alone, atol=1e-5)
    model.text = TextFormat(max_length=30, append_eos=True)
    assert torch.allclose(scores, model.score(texts), atol=1e-5)
    assert model.score([]).shape == (0,)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_head_of_a_half_precision_base_is_float32(kind):
    model = RewardModel.from_policy(tiny_policy(kind, torch.bfloat16), TextFormat(max_length=8))
    RewardModelling(RewardModelConfig()).setup(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert model.head.weight.dtype == torch.float32 and all(p.dtype == torch.float32 for p in trained.values())
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}
    torch.nn.init.normal_(model.head.weight)
    assert model(*model.pad([[5, 6, EOS]])).dtype == torch.float32 and model.score(["w3"]).dtype == torch.float32


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_mean_over_tokens_worked_by_hand(kind):
    model = reward_model(kind, TextFormat(max_length=12, pooling="mean"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = model.classifier.base_model(ids).last_hidden_state[0]
    expected = (hidden @ model.head.weight[0]).mean().item()
    assert model.score(["w3 w4 w5"]).item() == pytest.approx(expected, abs=1e-5)
    alone = model.score(["w9 w8 w7 w6 w5"]).item()
    assert model.score(["w3 w4 w5", "w9 w8 w7 w6 w5"]).tolist() == pytest.approx([expected, alone], abs=1e-5)


def test_a_sequence_classifier_gets_a_new_head(tmp_path):
    save_base("llama", tmp_path)
    model = RewardModel.load(ModelConfig(name_or_path=str(tmp_path)), text=TextFormat(max_length=9))
    assert model.score(["w1 w2", "w3"]).tolist() == [0, 0] and model.adapters == [] and model.text.max_length == 9


def save_base(kind: str, folder: Path) -> None:
    tiny_base(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


# Its release -------------------------------------------------------------------------------------------------

# Runs where every import of dpalign fails; prints the scores of the texts on every release.
PLAIN = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dpalign":
            raise ImportError("dpalign is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.set_num_threads(1)
texts, found = json.loads(sys.argv[1]), {}
for release in sys.argv[2:]:
    name = json.load(open(release + "/adapter_config.json"))["base_model_name_or_path"]
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(release)
    text = json.load(open(release + "/reward.json"))["text"]
    model = PeftModel.from_pretrained(base, release).eval()
    found[release] = []
    for t in texts:
        ids = tokenizer(t).input_ids + [tokenizer.eos_token_id] * text["append_eos"]
        with torch.no_grad():
            found[release].append(model(torch.tensor([ids[-text["max_length"]:]])).logits.item())
assert not any(n.partition(".")[0] == "dpalign" for n in sys.modules)
print(json.dumps(found))
"""
TEXTS = ["w3 w4 w5", "w9", words(20, 1)]


def released(kind: str, folder: Path, tokenizer=None) -> RewardModel:
    """Saves a reward model with two stages below it under folder/release."""
    base = tiny_base(kind)
    base.save_pretrained(folder / "base")
    (tokenizer or tiny_tokenizer()).save_pretrained(folder / "base")
    policy = Policy.load(ModelConfig(name_or_path=str(folder / "base")))
    torch.manual_seed(4)
    policy.add_adapter("sft", AdapterConfig(r=2))
    randomize(policy)
    policy.finish_stage()
    model = RewardModel.from_policy(policy, TextFormat(max_length=10, append_eos=True))
    model.add_adapter("reward", AdapterConfig(r=3, freeze_a=True))
    model.train_head()
    randomize(model)
    model.finish_stage()
    model.save(folder / "release", str(folder / "base"), Normalization(2.0, -0.5))
    return model


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Both kinds, with what one process without dpalign says of them."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("gpt2", "llama")}
    models = {kind: released(kind, folder) for kind, folder in folders.items()}
    return models, folders, plain_scores([f / "release" for f in folders.values()])


def plain_scores(folders: list[Path]) -> dict[str, list[float]]:
    process = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(TEXTS), *map(str, folders)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd="/",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_plain_peft_gives_the_same_scores(releases, kind):
    models, folders, found = releases
    scores = models[kind].score(TEXTS)
    assert scores.std() > 0.1
    assert found[str(folders[kind] / "release")] == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_release_is_loaded_with_its_head_format_and_scale(releases, kind):
    models, folders, _ = releases
    release = folders[kind] / "release"
    loaded = RewardModel.load(ModelConfig(name_or_path=str(release)))
    assert torch.allclose(loaded.score(TEXTS), models[kind].score(TEXTS), atol=1e-5)
    assert loaded.text == TextFormat(max_length=10, append_eos=True) and loaded.adapters == ["earlier"]
    assert not any(p.requires_grad for p in loaded.parameters())
    assert normalization_of(release) == Normalization(2.0, -0.5)
    assert not [f for f in release.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]
    assert sum("score" in n for n in load_file(release / "adapter_model.safetensors")) == 1


def test_a_release_with_a_damaged_head_or_format_is_refused(releases, tmp_path):
    release = shutil.copytree(releases[1]["llama"] / "release", tmp_path / "release")
    tensors, text = load_file(release / "adapter_model.safetensors"), (release / "reward.json").read_text()
    head = next(name for name in tensors if "score" in name)
    for broken in ("[]", "{", "{}", '{"text": 3}', '{"text": {"stretch": 1}}', '{"text": {"max_length": 60000}}'):
        (release / "reward.json").write_text(broken)
        with pytest.raises(DPAlignError, match="not the release of this reward model"):
            RewardModel.load(ModelConfig(name_or_path=str(release)))
    (release / "reward.json").write_text(text)
    for other in ({n: t for n, t in tensors.items() if n != head}, tensors | {head: torch.zeros(3)}):
        save_file(other, release / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DPAlignError):
            RewardModel.load(ModelConfig(name_or_path=str(release)))


def test_a_release_can_be_trained_further(releases):
    release = releases[1]["llama"] / "release"
    model = RewardModel.load(ModelConfig(name_or_path=str(release)))
    RewardModelling(RewardModelConfig(adapter=AdapterConfig(r=2))).setup(model)
    assert torch.allclose(model.score(TEXTS), releases[0]["llama"].score(TEXTS), atol=1e-5)  # B is zero
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any(".reward_model." in n for n in trained) and not any(".earlier." in n for n in trained)


def test_an_eos_that_is_the_padding_is_not_appended(tmp_path):
    """GPT-2's tokenizer has no padding token: transformers would take an appended EOS for padding."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(DPAlignError, match="append_eos needs a padding token other than EOS"):
        released("gpt2", tmp_path, tokenizer)
    policy = Policy(tiny_base("gpt2"), tokenizer)
    assert RewardModel.from_policy(policy, TextFormat(max_length=10)).encode("w3") == [5]


def test_a_folder_that_is_no_reward_model(tmp_path):
    with pytest.raises(DPAlignError, match="not the release of a reward model"):
        normalization_of(tmp_path)
    (tmp_path / "reward.json").write_text('{"normalization": {"stretch": 1}}')
    with pytest.raises(DPAlignError, match="not the release of a reward model"):
        normalization_of(tmp_path)


# As a reward -------------------------------------------------------------------------------------------------


def test_a_released_reward_model_as_a_reward_on_its_own_scale(releases):
    models, folders, _ = releases
    source = f"reward_model:{folders['llama'] / 'release'}"
    reward = load_reward(RewardConfig(source=source))
    scores = models["llama"].score(["w3 w4 w5", "w9 w1"])
    expected = (2.0 * scores - 0.5).clamp(-4, 4)
    assert (reward.low, reward.high) == (-4, 4)
    assert torch.allclose(reward(["w3 ", "w9 "], ["w4 w5", "w1"]), expected, atol=1e-4)
    other = load_reward(RewardConfig(source=source, text="completion", scale=0.5, shift=1.0, low=-9.0, high=9.0))
    expected = 0.5 * (2.0 * models["llama"].score(["w4 w5", "w1"]) - 0.5) + 1.0
    assert torch.allclose(other(["w3 ", "w9 "], ["w4 w5", "w1"]), expected, atol=1e-4)


def test_a_reward_model_reads_text_with_its_own_tokenizer():
    """Policy and reward model need not share a vocabulary: text is what they share."""
    policy = Policy.load(ModelConfig())
    model = reward_model("llama")
    assert len(policy.tokenizer) != VOCABULARY
    algorithm = RewardModelling(RewardModelConfig(max_length=12))
    pair = algorithm.encode(model, {"prompt": "w5 ", "chosen": "w6", "rejected": "w7"})
    assert pair is not None and pair.chosen == [*encode_text(model.tokenizer, "w5 w6"), EOS]
    normalization = normalize(model, own_texts(policy, 16, prompt_tokens=3, max_new_tokens=4, seed=0))
    assert normalization.scale > 0
    with pytest.raises(DPAlignError, match="gives all texts the same score"):
        model.reset_head()
        normalize(model, own_texts(policy, 16, prompt_tokens=3, max_new_tokens=4, seed=0))


def test_normalisation_gives_the_policys_own_text_mean_0_and_deviation_1():
    policy, model = tiny_policy("gpt2"), reward_model("gpt2")
    constants = normalize(model, own_texts(policy, 64, prompt_tokens=3, max_new_tokens=5, seed=1))
    seen: list[str] = []

    class Watching(RewardModel):
        def score(self, texts, *others):
            seen.extend(texts)
            return super().score(texts, *others)

    model.__class__ = Watching
    again = normalize(model, own_texts(policy, 64, prompt_tokens=3, max_new_tokens=5, seed=1))
    assert again == constants and len(set(seen)) > 32
    scores = constants.scale * torch.tensor(Learned(model)(seen[:64], [""] * 64)) + constants.shift
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4) and float(scores.std()) == pytest.approx(1, abs=1e-3)


def test_a_pair_is_two_texts_to_a_plan():
    assert RewardModelling.tokens(RewardModelConfig(max_length=48)).trained == 96
