"""Rewards that need nobody's data: a judge, a contrast, and the mean of several public scores."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from chats import byte_tokenizer
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, ModelConfig, Policy, embedded
from dpalign.models.features import pooled_layers
from dpalign.parsing import recipe_from
from dpalign.provenance import check_provenance
from dpalign.rewards import Reward, RewardConfig, load_reward
from dpalign.rewards.contrast import RIDGE, Reader, discriminants, upper_layers
from dpalign.rewards.judge import FORM, NO, YES, Question, single_tokens
from dpalign.rewards.load import asked_columns, models_named, singles
from dpalign.rewards.written import PublicModel, PublicModels
from dpalign.run import run_recipe
from dpalign.trainers.asked import Asked, ask_for_reward
from dpalign.trainers.rewards import read_reward_funcs
from helpers import call, reviews, small_model, write_jsonl, write_recipe

TEXTS = [" was a delight, warm and funny.", " little.", " dull", "", " " + "very " * 300 + "long"]
PROMPTS = ["The film", "I expected", "It is", "Two hours", "A"]
ASK = {"source": "judge:base", "questions": ["Is this kind?", "Is this about a film?"], "written_texts": 16}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(ModelConfig(name_or_path=small_model(), is_public=True))


def public(policy: Policy, folder=None, **more) -> PublicModels:
    return PublicModels(PublicModel(policy, "small", has_run=True), completion_tokens=12, folder=folder, **more)


# Judge -----------------------------------------------------------------------------------------------------------


def odds(policy: Policy, text: str, question: str) -> float:
    """log P(yes) - log P(no) of one text that is not padded."""
    said = FORM.format(text=text, question=question) + "\nAnswer:"
    tokenizer = policy.tokenizer
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(said).input_ids]])
    logs = policy(ids, torch.ones_like(ids), 1)[0][0, 0].log_softmax(0)
    words = ([tokenizer(w, add_special_tokens=False).input_ids for w in spellings] for spellings in (YES, NO))
    yes, no = ({ids[0] for ids in encoded if len(ids) == 1} for encoded in words)
    return float(logs[sorted(yes)].logsumexp(0) - logs[sorted(no)].logsumexp(0))


def test_a_judge_says_how_much_likelier_yes_is_than_no(policy):
    asked = Question(PublicModel(policy, "small"), "Is this kind?", 64)
    assert single_tokens(policy.tokenizer, YES) == [2620, 2847] and single_tokens(policy.tokenizer, NO) == [
        522,
        1563,
        3257,
    ]
    found = asked(["a film", "dull"])
    assert found.tolist() == pytest.approx([odds(policy, t, "Is this kind?") for t in ("a film", "dull")], abs=1e-4)


def test_questions_are_standardised_on_self_written_text_and_averaged(policy):
    config, made = RewardConfig(**ASK), public(policy)
    reward = load_reward(config, public=made)
    own = made.own_rows(config)
    assert len(own[0]) == 32 and (reward.low, reward.high) == (-4, 4)
    texts = [p + c for p, c in zip(*own, strict=True)]
    by_hand = torch.tensor([[odds(policy, text, question) for question in ASK["questions"]] for text in texts])
    by_hand = ((by_hand - by_hand.mean(0)) / by_hand.std(0)).mean(1)
    assert torch.allclose(reward(*own), by_hand, atol=1e-3)
    assert float(reward(*own).mean()) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "section", [ASK, {"source": "contrast", "wanted": "A fine", "unwanted": "A dull", "written_texts": 16}]
)
def test_a_row_is_scored_by_itself_to_the_last_bit(section, policy):
    reward = load_reward(RewardConfig(**section), public=public(policy))
    together = reward(PROMPTS * 9, TEXTS * 9)
    assert together.isfinite().all() and len(set(together[:4].tolist())) == 4
    for row in range(5):
        assert together[row] == reward(PROMPTS[row : row + 1], TEXTS[row : row + 1])[0] == together[40 + row]
        assert together[row] == reward(["Other", PROMPTS[row]], ["", TEXTS[row]])[1]


@pytest.mark.parametrize("kind", ["smol", "llama"])
def test_a_judge_is_asked_through_the_chat_template_and_a_long_text_is_cut_inside_it(kind):
    class Asked:
        tokenizer = byte_tokenizer(kind)

    question = Question.__new__(Question)
    question.tokenizer, question.question, question.max_length = Asked.tokenizer, "Is this kind?", 200
    message = [{"role": "user", "content": FORM.format(text="Hello there", question="Is this kind?")}]
    whole = Asked.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert question.encode("Hello there") == whole["input_ids"]
    cut = question.encode("x" * 500)
    assert 190 < len(cut) <= 200
    said = Asked.tokenizer.decode(cut)
    assert (
        "xxxx" in said
        and "Is this kind? Answer with Yes or No." in said
        and said.endswith(Asked.tokenizer.decode(whole["input_ids"][-4:]))
    )


def test_a_question_leaves_room_and_yes_is_a_token(policy):
    with pytest.raises(DPAlignError, match=r"takes \d+ tokens .* raise reward.max_length \(now 20\)"):
        load_reward(RewardConfig(**ASK, max_length=20), public=public(policy))
    with pytest.raises(DPAlignError, match="needs 600 positions and the model small has 512"):
        load_reward(RewardConfig(**ASK, max_length=600), public=public(policy))
    with pytest.raises(DPAlignError, match="no single token for 'Yes'"):
        single_tokens(byte_tokenizer("smol"), YES)


def test_a_run_s_adapters_take_no_part():
    """Mutant: the policy as it is now, instead of the model as it came."""
    trained = Policy.load(ModelConfig(name_or_path=small_model(), is_public=True))
    section = {"source": "contrast", "wanted": "A fine", "unwanted": "A dull", "written_texts": 16}
    before = [load_reward(RewardConfig(**s), public=public(trained))(PROMPTS, TEXTS) for s in (ASK, section)]
    trained.add_adapter("sft", AdapterConfig(r=2))
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
    trainable = [n for n, p in trained.named_parameters() if p.requires_grad]
    state = torch.get_rng_state()
    after = [load_reward(RewardConfig(**s), public=public(trained))(PROMPTS, TEXTS) for s in (ASK, section)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert trainable and trainable == [n for n, p in trained.named_parameters() if p.requires_grad]
    ids = torch.tensor([[5, 6, 7]])
    with trained.base():
        plain = trained(ids, torch.ones_like(ids), 1)[0]
    assert not torch.allclose(trained(ids, torch.ones_like(ids), 1)[0], plain)  # and are on again


# Contrast --------------------------------------------------------------------------------------------------------


def test_discriminants_are_fishers_with_a_ridge_each_on_the_scale_of_own_text():
    generator = np.random.default_rng(0)
    wanted, unwanted, own = (generator.normal(size=(n, 2, 5)) * [1, 2, 3, 1, 1] for n in (40, 30, 200))
    wanted[:, 0, 1] += 3
    found = discriminants(*(torch.tensor(x) for x in (wanted, unwanted, own)))
    scores = np.zeros(200)
    for layer in range(2):
        inside = np.concatenate([x[:, layer] - x[:, layer].mean(0) for x in (wanted, unwanted)])
        covariance = inside.T @ inside / 70
        ridge = RIDGE * np.trace(covariance) / 5 * np.eye(5)
        weight = np.linalg.inv(covariance + ridge) @ (wanted[:, layer].mean(0) - unwanted[:, layer].mean(0))
        score = own[:, layer] @ weight
        scores += (score - score.mean()) / score.std(ddof=1) / 2
    ours = (torch.tensor(own).float() * found["weights"].float()).sum((1, 2)) - found["shift"].float()
    assert np.allclose(ours.numpy(), scores, atol=1e-4)
    with pytest.raises(DPAlignError, match="says the same of all texts"):
        discriminants(*(torch.ones(8, 1, 3) for _ in range(3)))


def test_layers_are_spread_over_the_upper_half():
    assert upper_layers(30) == [15, 18, 21, 24, 27, 30] and upper_layers(5) == [2, 3, 4, 5] and upper_layers(1) == [1]


def test_features_are_means_over_the_tokens_that_count(policy):
    ids = torch.tensor([[0, 5, 6, 7, 1, 1], [0, 9, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    counted = mask.clone()
    counted[:, 0] = 0
    found = pooled_layers(policy, ids, mask, [0, 1], counted)
    alone = policy.model.model(ids[:1, :4], output_hidden_states=True).hidden_states
    assert torch.allclose(found[0], torch.stack([h[0, 1:4].mean(0) for h in alone]), atol=1e-5)
    last = policy.model.model(ids[1:, :2]).last_hidden_state[0, 1]
    assert torch.allclose(found[1, 1], last, atol=1e-5)


def test_a_contrast_reads_behind_a_bos_that_does_not_count(policy):
    """Mutant: BOS counts, which makes a text's length its feature."""
    found, is_read = Reader(PublicModel(policy, "small"), [1], 8)(["a film", ""])
    ids = [policy.tokenizer.bos_token_id, *policy.tokenizer("a film").input_ids]
    alone = policy.model.model(torch.tensor([ids])).last_hidden_state[0]
    assert torch.allclose(found[0, 0], alone[1:].mean(0), atol=1e-5) and is_read.tolist() == [True, False]


def test_a_contrast_tells_one_kind_of_text_from_the_other(monkeypatch):
    """The model's part is played: what it writes for each side is drawn from words of praise and of blame."""
    words = {
        "praise": ["wonderful", "warm", "funny", "lovely", "great"],
        "blame": ["awful", "dull", "boring", "stupid", "bad"],
    }

    def written(model, asked, count, tokens, seed):
        rng = np.random.default_rng(seed)
        return [f" a {rng.choice(words[asked])} and {rng.choice(words[asked])} film" for _ in range(count)]

    monkeypatch.setattr(PublicModel, "answers_to", written)
    config = RewardConfig(
        source="contrast",
        base=embedded.TINY_REVIEW_LM,
        written_texts=64,
        max_length=32,
        wanted="praise",
        unwanted="blame",
    )
    reward = load_reward(config)
    good, bad = (reward([""] * 20, [f"It is {word}." for word in words[side]] * 4) for side in words)
    assert good.min() > bad.max() and good.mean() - bad.mean() > 1


# Mean ------------------------------------------------------------------------------------------------------------

JUDGE_AND_VADER = {"source": "mean", "of": [{"source": "vader"}, ASK], "weights": [3.0, 1.0], "written_texts": 16}


def test_a_mean_is_that_of_standardised_scores(policy, tmp_path):
    config, made = RewardConfig(**JUDGE_AND_VADER), public(policy, tmp_path)
    reward = load_reward(config, public=made)
    rows = made.own_rows(config)
    vader, judge = load_reward(RewardConfig()), load_reward(RewardConfig(**ASK), public=made)
    expected = torch.zeros(5)
    for part, weight in ((vader, 0.75), (judge, 0.25)):
        own = part(*rows)
        expected += weight * (part(PROMPTS, TEXTS) - own.mean()) / own.std()
    assert torch.allclose(reward(PROMPTS, TEXTS), expected.clamp(-4, 4), atol=1e-4)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["judge", "mean"]


def test_constants_are_kept_and_a_fitted_reward_is_the_same_elsewhere(policy, tmp_path, monkeypatch):
    """Mutant: scales that are found anew where a run goes on, or an evaluation begins."""
    config = RewardConfig(**JUDGE_AND_VADER)
    scores = load_reward(config, public=public(policy, tmp_path / "a"))(PROMPTS, TEXTS)
    again = load_reward(config, public=public(policy, tmp_path / "b"))(PROMPTS, TEXTS)
    assert torch.equal(scores, again)
    other = load_reward(RewardConfig(**JUDGE_AND_VADER | {"written_seed": 1}), public=public(policy))(PROMPTS, TEXTS)
    assert not torch.equal(scores, other)

    def written(*_, **__):
        raise AssertionError("text was written again")

    monkeypatch.setattr(PublicModel, "own_rows", written)
    assert torch.equal(load_reward(config, public=public(policy, tmp_path / "a"))(PROMPTS, TEXTS), scores)
    (folder,) = (tmp_path / "a").glob("mean-*")
    value = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps(value | {"base": small_model()}))  # the name that is here made up
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    fitted = RewardConfig(source=f"fitted:{tmp_path / 'elsewhere' / folder.name}")
    with pytest.raises(DPAlignError, match=r"constants of a reward .* cannot be read"):
        load_reward(fitted)  # kept under the made-up name: nothing is found anew in silence


def test_a_fitted_reward_scores_as_in_its_run(tmp_path):
    named = Policy.load(ModelConfig(name_or_path=small_model(), is_public=True))
    made = PublicModels(PublicModel(named, small_model(), has_run=True), completion_tokens=12, folder=tmp_path)
    scores = load_reward(RewardConfig(**JUDGE_AND_VADER), public=made)(PROMPTS, TEXTS)
    (folder,) = tmp_path.glob("mean-*")
    fitted = RewardConfig(source=f"fitted:{folder}", scale=2.0, low=-9, high=9)
    assert torch.allclose(load_reward(fitted)(PROMPTS, TEXTS), 2 * scores)
    assert [part.source for part in singles(fitted)] == ["vader", "judge:base"] and models_named(fitted) == [
        small_model()
    ]
    (folder / "constants.safetensors").write_bytes(b"x")
    with pytest.raises(DPAlignError, match="cannot be read"):
        load_reward(fitted)
    (folder / "reward.json").write_text("{}")
    with pytest.raises(DPAlignError, match="holds no reward that a run has fitted"):
        load_reward(fitted)


def test_a_row_that_one_part_cannot_score_has_no_mean(policy):
    config = RewardConfig(
        **{
            **JUDGE_AND_VADER,
            "of": [{"source": "vader"}, {"source": "test_written_rewards:nothing_of_dull", "low": -1, "high": 1}],
        },
        is_public=True,
    )
    scores = load_reward(config, public=public(policy))(PROMPTS, TEXTS)
    assert scores.isnan().tolist() == [False, False, True, False, False]


def nothing_of_dull(prompts, completions, **_):
    return [float("nan") if c == " dull" else len(c) / 100 for c in completions]


def only_of_graded(prompts, completions, grade):
    return [len(c) / 100 if g is not None else float("nan") for g, c in zip(grade, completions, strict=True)]


def length(prompts, completions):
    return [len(c) / 100 for c in completions]


def test_parts_of_a_mean_have_their_own_columns(policy):
    """One reads none, one a column, and a model reads prompts; each is given its own."""
    of = [{"source": "test_written_rewards:length", "low": 0, "high": 9}]
    of.append({"source": "test_rewards:marked", "low": 0, "high": 99, "columns": ["grade"]})
    config = RewardConfig(source="mean", is_public=True, of=of, written_texts=16, low=-1e6, high=1e6)
    reward = load_reward(config, public=public(policy))
    assert reward.columns == ("grade",)
    columns = {"grade": [0, 0, 0, 0, 5], "tools": [None] * 5}
    scores, plain = reward(PROMPTS, TEXTS, columns), reward(PROMPTS, TEXTS)
    assert scores.isfinite().all() and torch.equal(scores[:4], plain[:4]) and scores[4] > plain[4]


def test_a_part_that_scores_no_own_text_is_named(policy):
    part = {"source": "test_written_rewards:only_of_graded", "low": 0, "high": 9, "columns": ["grade"]}
    config = RewardConfig(source="mean", is_public=True, of=[{"source": "vader"}, part], written_texts=16)
    with pytest.raises(DPAlignError, match="only_of_graded', a part of a mean, has no score for any text"):
        load_reward(config, public=public(policy))


# Settings --------------------------------------------------------------------------------------------------------

REFUSED = {
    "no question": ({"source": "judge:base"}, "a judge needs questions"),
    "one side": ({"source": "contrast", "wanted": "x"}, "a contrast needs wanted and unwanted"),
    "an empty mean": ({"source": "mean"}, "a mean needs rewards"),
    "weights": ({"source": "mean", "of": [{"source": "vader"}], "weights": [1.0, 2.0]}, "weights has 2 numbers for 1"),
    "a mean of means": ({"source": "mean", "of": [{"source": "mean", "of": [{"source": "vader"}]}]}, "mean cannot be part of a mean"),
    "the run's own reward model": ({"source": "mean", "of": [{"source": "reward_model"}]}, "reward_model cannot be part of a mean"),
    "an unknown field": ({"source": "mean", "of": [{"sauce": "vader"}]}, "reward 1 of the mean has no field sauce"),
    "a wrong value inside": ({"source": "mean", "of": [{"source": "vader", "max_length": "many"}]}, "field of 1.max_length"),
    "questions for nobody": ({"source": "vader", "questions": ["Kind?"]}, "questions is for a reward judge, not 'vader'"),
    "a base for nobody": ({"source": "classifier:x", "base": "y"}, "base is for a reward judge or contrast or mean"),
}  # fmt: skip


@pytest.mark.parametrize(("section", "says"), REFUSED.values(), ids=REFUSED)
def test_what_means_nothing_is_refused(section, says):
    with pytest.raises(DPAlignError, match=says):
        check_settings(RewardConfig(**section), "reward")


def test_what_a_mean_declares_holds_for_its_parts():
    config = RewardConfig(
        source="mean", is_public=True, base="some/model",
        of=[{"source": "judge:a/judge", "questions": ["?"]}, {"source": "m:f", "columns": ["age"]}, {"source": "contrast", "wanted": "a", "unwanted": "b", "base": "own/one"}],
    )  # fmt: skip
    check_settings(config, "reward")
    assert [part.is_public for part in config.parts] == [True] * 3
    assert [part.base for part in config.parts] == ["some/model", None, "own/one"]
    assert asked_columns(config) == ["age"] and models_named(config) == ["some/model", "a/judge", "own/one"]


def test_without_a_run_a_model_has_to_be_named():
    with pytest.raises(DPAlignError, match=r"the reward contrast needs a public model .* reward\.base"):
        load_reward(RewardConfig(source="contrast", wanted="a", unwanted="b"))
    section = {**ASK, "source": f"judge:{small_model()}"}
    alone = load_reward(RewardConfig(**section))  # a judge can write the text itself
    assert isinstance(alone, Reward) and alone(PROMPTS, TEXTS).isfinite().all()


# In a run --------------------------------------------------------------------------------------------------------

FREE = {
    "source": "mean", "written_texts": 8,
    "of": [
        {"source": "vader"},
        {"source": "contrast", "wanted": "A lovely", "unwanted": "A dull", "written_texts": 8, "written_tokens": 8, "max_length": 24},
        {**ASK, "questions": ["Is this kind?"], "written_texts": 8, "max_length": 64},
    ],
}  # fmt: skip


def run_free(folder, records):
    """A run on the mean of three, and its folder."""
    folder.mkdir()
    write_jsonl(folder / "data.jsonl", records)
    shown = {"eval_path": str(write_jsonl(folder / "public.jsonl", reviews(4, "public"))), "eval_is_public": True}
    short = {"max_steps": 1, "expected_batch_size": 4}
    path = write_recipe(folder, sft=short, ppo=short | {"reward": FREE}, data=shown)
    run_recipe(recipe_from("run", [str(path)]))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_free(tmp_path_factory.mktemp("free") / "a", reviews(64))


def test_a_run_spends_nothing_on_a_free_reward_and_keeps_its_constants(finished):
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert [stage["stage"] for stage in summary["stages"]] == ["sft", "ppo"]
    assert not any("reward" in line for line in summary["assumptions"])  # nothing was declared of it
    kept = sorted(path.name.split("-")[0] for path in (finished / "run" / "rewards").iterdir())
    assert kept == ["contrast", "judge", "mean"]
    assert -4 <= summary["evaluation"]["ppo"]["reward"] <= 4


def test_an_evaluation_scores_by_what_the_run_has_fitted(finished, capsys):
    (folder,) = (finished / "run" / "rewards").glob("mean-*")
    common = [
        "--data",
        finished / "public.jsonl",
        "--eval_is_public",
        "--prompt_tokens",
        4,
        "--max_completion_length",
        6,
    ]
    out = finished / "out.json"
    called = call(capsys, "evaluate", small_model(), *common, "--reward", f"fitted:{folder}", "--output", out)
    assert called.status == 0, called.err
    value = json.loads(out.read_text())
    assert "reward" in value["outside_the_guarantee"]["columns"]  # nobody has declared the model behind it public
    called = call(
        capsys,
        "evaluate",
        small_model(),
        *common,
        "--reward",
        f"fitted:{folder}",
        "--reward_is_public",
        "--output",
        out,
    )
    assert json.loads(out.read_text())["outside_the_guarantee"]["columns"] == []
    section = finished / "judge.yaml"
    section.write_text(f"reward: {{source: 'judge:{small_model()}', questions: ['Is this kind?'], written_texts: 8}}")
    called = call(
        capsys, "evaluate", small_model(), *common, "--reward", section, "--reward_is_public", "--output", out
    )
    assert called.status == 0 and json.loads(out.read_text())["reward"].startswith("judge:"), called.err
    section.write_text("reward: {sauce: vader}")
    assert "unknown field 'sauce'" in call(capsys, "evaluate", small_model(), *common, "--reward", section).error


def test_fields_of_a_free_reward_are_public_and_no_function_of_the_records(finished, tmp_path):
    """Mutant: constants found on the run's prompts, or on text of its SFT model."""
    from privacy.test_fields import origin_of, outside, unknown

    assert unknown(finished / "run") == []
    files = [key for key in outside(finished / "run") if key[0].startswith("rewards/")]
    assert {origin_of(*key) for key in files} == {"public", "declared"}
    other = run_free(tmp_path / "b", reviews(64, "morning"))
    kept, same = (
        {p.relative_to(at): p.read_bytes() for p in sorted(at.rglob("*.*"))}
        for at in (finished / "run" / "rewards", other / "run" / "rewards")
    )
    assert len(kept) == 6 and kept == same


def test_where_a_reward_comes_from(tmp_path, finished):
    """Mutants: a judge's model, a mean's part or a fitted reward whose past nobody asks for."""

    def origin(reward):
        path = write_recipe(tmp_path, ppo={"reward": reward}, units_disjoint="declared")
        found = [o for name, o in check_provenance(recipe_from("run", [str(path)])).items() if name.startswith("ppo.")]
        return [s.stage for o in found for s in o.stages], "".join(text for o in found for text in o.assumptions)

    release = f"reward_model:{finished / 'run' / 'release'}"
    for free in (
        {"source": "contrast", "wanted": "a", "unwanted": "b"},
        {"source": "judge:base", "questions": ["?"]},
        FREE,
    ):
        assert origin(free) == ([], "")
    stages, _ = origin({"source": "mean", "of": [{"source": "vader"}, {"source": release}]})
    assert sorted(stages) == ["ppo", "sft"]
    mixed = origin(
        {"source": "mean", "is_public": True, "of": [{"source": "my:scores", "low": 0, "high": 1}, {"source": release}]}
    )
    assert sorted(mixed[0]) == ["ppo", "sft"] and "reward 'my:scores' was made without the private data" in mixed[1]
    (folder,) = (finished / "run" / "rewards").glob("mean-*")
    for named in (
        {"source": "judge:some/model", "questions": ["?"]},
        {"source": "mean", "of": [{"source": "judge:some/model", "questions": ["?"]}]},
        {"source": "mean", "of": [{"source": "vader"}], "base": "some/model"},
        {"source": f"fitted:{folder}"},
    ):
        with pytest.raises(DPAlignError, match=r"must be declared public \(reward.is_public: true\)"):
            origin(named)
        assert "was made without the private data (declared)" in origin(named | {"is_public": True})[1]


def test_reward_funcs_takes_a_section_alone():
    section = RewardConfig(**FREE)
    assert read_reward_funcs(section, None, RewardConfig(), []) == (section, [])
    for given, weights, config, says in (
        ([section, len], None, RewardConfig(), "a RewardConfig stands alone"),
        (section, [1.0], RewardConfig(), "reward_weights is for functions"),
        (section, None, RewardConfig(scale=2.0), "args.reward is another one"),
        (RewardConfig(source="judge:base"), None, RewardConfig(), "reward_funcs: a judge needs questions"),
    ):
        with pytest.raises(DPAlignError, match=says):
            read_reward_funcs(given, weights, config, [])


def test_a_trainer_asks_a_range_only_of_what_has_none(finished):
    (folder,) = (finished / "run" / "rewards").glob("mean-*")
    for reward, is_asked in ((f"fitted:{folder}", False), ("judge:base", False), ("my:function", True)):
        asked = Asked("X")
        ask_for_reward(asked, RewardConfig(source=reward, is_public=True))
        assert any("reward_range" in line for line in asked.lines) == is_asked, reward
