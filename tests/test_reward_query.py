"""A reward from one query: votes of norm 1, added up once, in directions that no private text has touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpalign.algorithms.reward import pair_texts
from dpalign.algorithms.reward_query import RewardQuery, as_answers, free_share, whitening
from dpalign.errors import DPAlignError
from dpalign.files import private_folder
from dpalign.models import AdapterConfig, ModelConfig, Policy, RewardModel, TextFormat
from dpalign.models.bases import remember_base
from dpalign.models.features import body_of, maps_of, maps_read
from dpalign.models.reward_model import normalization_of
from dpalign.parsing import recipe_from
from dpalign.rewards import Reward, RewardConfig, load_reward
from dpalign.rewards.learned import own_texts
from dpalign.rewards.mean import answered
from dpalign.rewards.written import PublicModel, PublicModels
from dpalign.run import run_recipe
from dpalign.settings.reward_query import RewardQueryConfig
from helpers import call, judged, ledger_rows, reviews, small_model, statement, write_jsonl, write_recipe

DIRECTIONS = 4
QUERY = {
    "directions": DIRECTIONS, "own_texts": 64, "max_length": 20, "prepend_bos": True, "pooling": "mean",
    "target_epsilon": "inf",
}  # fmt: skip
GAMMA = 0.01  # of automatic clipping


def recipe(folder, query, pairs=None, **others):
    write_jsonl(folder / "pairs.jsonl", pairs or judged(24, start=100))
    data = {"name": "judges", "path": str(folder / "pairs.jsonl")}
    stages = {"sft": None, "ppo": None, "reward_query": query, "reward_query_data": data} | others
    return write_recipe(folder, target_epsilon=query["target_epsilon"], units_disjoint="declared", **stages)


def run(folder, capsys, query, pairs=None):
    """The released head `(1, width)`, and the directions `(directions, width)`, of a run of its own."""
    folder.mkdir()
    assert call(capsys, "run", recipe(folder, query, pairs), "--json").status == 0
    released = load_file(folder / "run" / "reward_model" / "adapter_model.safetensors")
    (final,) = (folder / "run" / "private" / "reward_query" / "final").glob("step-*")
    trained = load_file(final / "tensors.safetensors")
    (head,) = [tensor for name, tensor in released.items() if "score" in name]
    (directions,) = [tensor for name, tensor in trained.items() if "directions" in name]
    return head, directions


def reader() -> tuple[Policy, RewardModel]:
    policy = Policy.load(ModelConfig(name_or_path=small_model(), is_public=True))
    model = RewardModel.from_policy(policy, TextFormat(20, True, False, "mean"))
    model.add_adapter("nothing", AdapterConfig(r=1))
    return policy, model


def votes(records, directions) -> torch.Tensor:
    """`(pairs, directions)`, worked out from the features alone."""
    _, model = reader()
    features = model.features([text for record in records for text in pair_texts(record)]).double()
    differences = (features[0::2] - features[1::2]) @ directions.double().T
    return differences / (differences.norm(dim=1, keepdim=True) + GAMMA)


def test_the_released_weight_is_the_sum_of_votes_in_directions_of_own_text(tmp_path, capsys):
    pairs = judged(24, start=100)
    pairs[3]["preference"], pairs[4]["preference"] = 0.0, 0.75  # the other one is better; it is likely
    head, directions = run(tmp_path / "a", capsys, QUERY, pairs)
    policy, model = reader()
    texts = own_texts(policy, 64, prompt_tokens=8, max_new_tokens=10, seed=0)
    expected = whitening(model.features(texts).unsqueeze(1), DIRECTIONS, shrinkage=1.0, fewest=DIRECTIONS)
    assert torch.allclose(directions, expected, atol=1e-5)
    cast = votes(pairs, directions)
    cast[3] = -cast[3]  # a likely preference is a vote of norm 1 as well
    weight = cast.sum(0) @ directions.double()
    assert torch.nn.functional.cosine_similarity(head[0].double(), weight, 0) > 0.999
    assert float(head[0].double().norm() / weight.norm()) == pytest.approx(1, rel=0.02)


def test_people_move_the_weight_by_their_vote_and_the_directions_not_at_all(tmp_path, capsys):
    """Mutants: directions, their scale or the shrinkage from the pairs; a vote longer than 1."""
    pairs, changed = judged(24, start=100), judged(24, start=100)
    changed[5] |= {"chosen": "zebrafinch " * 30, "rejected": "silent"}
    one, directions = run(tmp_path / "a", capsys, QUERY, pairs)
    two, same = run(tmp_path / "b", capsys, QUERY, changed)
    assert torch.equal(directions, same)
    moved = torch.linalg.lstsq(directions.double().T, (two - one).double().T).solution  # in coordinates of the votes
    assert 0 < float(moved.norm()) <= 2 + 1e-3
    three, _ = run(tmp_path / "c", capsys, QUERY, pairs[:-1])
    gone = torch.linalg.lstsq(directions.double().T, (three - one).double().T).solution
    assert 0.9 < float(gone.norm()) <= 1 + 1e-3


def test_one_query_is_one_line_of_the_ledger_and_a_reward_for_a_policy(tmp_path, capsys):
    rollouts = {"expected_batch_size": 8, "max_steps": 1, "prompt_max_tokens": 4, "max_prompt_length": 5}
    rollouts |= {
        "max_completion_length": 6,
        "prepend_bos": True,
        "adapter": {"r": 2},
        "reward": {"source": "reward_model"},
    }
    path = recipe(tmp_path, QUERY | {"target_epsilon": 100}, rloo=rollouts)
    write_jsonl(tmp_path / "data.jsonl", reviews(64))
    done = call(capsys, "run", path, "--json").json
    assert done["private"] and done["epsilon"] <= 100
    stages = {stage["stage"]: stage for stage in statement(tmp_path / "run")["stages"]}
    (mechanism,) = stages["reward_query"]["mechanisms"]
    assert (mechanism["sampling_rate"], mechanism["steps"]) == (1.0, 1) and list(stages) == ["reward_query", "rloo"]
    assert ledger_rows(tmp_path, stage="reward_query") == 1
    assert normalization_of(tmp_path / "run" / "reward_model").scale > 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["noised_metrics"] for line in lines if "reward_query" in line] == [None]
    again = call(capsys, "run", path, "--json").json
    assert again["epsilon"] == done["epsilon"] and ledger_rows(tmp_path, stage="reward_query") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("pooling", ["last", "mean", "layers"])
def test_a_base_in_half_precision_leaves_a_release_too(pooling, dtype, tmp_path, capsys):
    """Mutant: a head in float32, which plain transformers round: everything was spent, and then nothing released."""
    model = {"name_or_path": small_model(), "is_public": True, "dtype": dtype}
    path = recipe(tmp_path, QUERY | {"pooling": pooling, "target_epsilon": 100}, model=model)
    assert call(capsys, "run", path, "--json").json["reward_model_release"]
    assert (tmp_path / "run" / "reward_model" / "privacy.json").exists()


REFUSED = {
    "a rate": ({"learning_rate": 0.1}, "learning_rate means nothing for a reward from one query"),
    "an adapter": ({"adapter": {"r": 3}}, "adapter means nothing"),
    "metrics": ({"metrics_noise_ratio": 5}, "metrics_noise_ratio"),
    "a batch": ({"expected_batch_size": 8}, "expected_batch_size"),
    "few texts": ({"own_texts": 4}, "own_texts 4 cannot show 4 directions"),
    "many directions": ({"directions": 40, "own_texts": 64}, "directions 40 are more than the model's 32 features"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_what_means_nothing_is_refused_before_a_draw(change, says, tmp_path, capsys):
    assert says in call(capsys, "run", recipe(tmp_path, QUERY | change)).error
    assert not (tmp_path / "ledger.sqlite").exists() or ledger_rows(tmp_path) == 0


def test_a_margin_and_a_second_reward_model_are_refused(tmp_path, capsys):
    margin = [record | {"margin": 1.0} for record in judged(24)]
    assert "a margin, which a vote does not have" in call(capsys, "run", recipe(tmp_path, QUERY, margin)).error
    both = recipe(tmp_path, QUERY, reward_model={"expected_batch_size": 8}, reward_model_data={"path": "pairs.jsonl"})
    assert "both reward_model and reward_query: keep one" in call(capsys, "run", both).error


def test_directions_need_a_policy_that_writes():
    algorithm = RewardQuery(RewardQueryConfig(target_epsilon=1, directions=2))
    _, model = reader()
    algorithm.setup(model)
    with pytest.raises(DPAlignError, match="this run has no policy"):
        algorithm.warm_up(model)


def test_whitening_shrinks_and_refuses_too_few_directions():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([4.0, 2.0, 1.0, 0.0])
    features = torch.randn(4000, 1, 4, generator=generator) * scales
    mean = float((scales**2).mean())
    for shrinkage in (0.001, 1.0):
        spread = (features[:, 0] @ whitening(features, 3, shrinkage, 3).T).std(0)
        # Without shrinkage two texts differ by a squared norm of 1.
        wanted = [s / (s * s + shrinkage * mean) ** 0.5 / 6**0.5 for s in (4.0, 2.0, 1.0)]
        assert torch.allclose(spread, torch.tensor(wanted), rtol=0.03)
    with pytest.raises(DPAlignError, match="differs in 3 directions and not in 4"):
        whitening(features, 4, 1.0, 4)
    assert torch.equal(whitening(features, 5, 1.0, 1)[3:], torch.zeros(2, 4))  # what own text does not show


def test_more_directions_leave_the_leading_ones_as_they_were():
    """And their scale, against which that of the public scores is fixed."""
    features = torch.randn(600, 3, 70, generator=torch.Generator().manual_seed(0))
    few, many = (whitening(features, count, 1.0, 1) for count in (8, 180))
    torch.testing.assert_close(many[:8], few, rtol=1e-4, atol=1e-6)
    assert many.norm(dim=1).min() > 0


def test_directions_of_several_layers_are_the_leading_ones_of_all_together():
    generator = torch.Generator().manual_seed(0)
    said, once = torch.randn(4000, generator=generator), torch.randn(4000, 2, generator=generator)
    # Both layers say `said`, the second at a hundredth of the length; each says something of its own.
    features = torch.stack([torch.stack([said, once[:, 0]], 1), 0.01 * torch.stack([once[:, 1], said], 1)], 1)
    first, *others = (features.flatten(1) @ whitening(features, 4, 0.001, 1).T).T
    assert float(torch.corrcoef(torch.stack([first, said]))[0, 1].abs()) > 0.99
    assert float(first.var()) == pytest.approx(2 / 8, rel=0.1)  # twice what a layer says alone
    assert [float(other.var()) for other in others[:2]] == pytest.approx([1 / 8, 1 / 8], rel=0.1)
    assert float(others[2].var()) < 0.01


# Several layers, and beside them what is free -------------------------------------------------------------------------

FREE = [{"source": "vader"}, {"source": "contrast", "wanted": "w1 w2", "unwanted": "w40 w41", "written_texts": 24}]
FREE[1] |= {"written_tokens": 8}
LAYERED = {"own_texts": 64, "max_length": 20, "prepend_bos": True, "target_epsilon": 3, "free": FREE}


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "reward_model" / "reward.safetensors")


def vivid(count) -> list[dict]:
    """Pairs that a sentiment lexicon can tell apart, and words of the model's own."""
    said = [("great", "awful"), ("good", "bad"), ("w4 w5", "w8"), ("lovely", "horrible")]
    return [
        record | {"chosen": f"{record['chosen']} {said[i % 4][0]}", "rejected": f"{record['rejected']} {said[i % 4][1]}"}
        for i, record in enumerate(judged(count, start=100))
    ]


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """A run without noise."""
    folder = tmp_path_factory.mktemp("layered")
    path = recipe(folder, LAYERED | {"target_epsilon": "inf", "directions": 6}, vivid(24))
    return folder, run_recipe(recipe_from("run", [str(path)]))


def coordinates(folder, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """`(texts, directions)` and `(texts, 2)`, by the run's own directions and the constants that it has kept."""
    policy, _ = reader()
    model = RewardModel.from_policy(policy, TextFormat(20, True, False, "layers"))
    (final,) = (folder / "run" / "private" / "reward_query" / "final").glob("step-*")
    (directions,) = [t for name, t in load_file(final / "tensors.safetensors").items() if "directions" in name]
    (mean,) = (folder / "run" / "rewards").glob("mean-*")
    public = PublicModels(PublicModel(policy, small_model()))
    free = load_reward(RewardConfig(source=f"fitted:{mean}", is_public=True), public=public).function
    return model.features(texts).double() @ directions.double().T, free.scores(texts).double()


def test_the_released_weights_are_the_sum_of_votes_in_layers_and_free_scores(layered):
    """Mutants: free scores at another share; a vote of their own instead of one of norm 1 together."""
    folder, _ = layered
    pairs = vivid(24)
    read, free = coordinates(folder, [text for pair in pairs for text in pair_texts(pair)])  # chosen, rejected, ...
    share = 24**-0.5
    cast = torch.cat([read[0::2] - read[1::2], share * (free[0::2] - free[1::2])], 1)
    cast = cast / (cast.norm(dim=1, keepdim=True) + GAMMA)
    saved = weights_of(folder / "run")
    assert torch.allclose(saved["free"].double(), share * cast.sum(0)[-2:], rtol=1e-3, atol=1e-4)
    assert float(saved["free"][0]) > 0.1  # the lexicon has something to say
    source = f"reward_model:{folder / 'run' / 'reward_model'}"
    rewarded = load_reward(RewardConfig(source=source), public=PublicModels()).function
    found = torch.tensor(rewarded([""] * len(pairs), [pair["chosen"] for pair in pairs]))
    expected = read[0::2] @ cast.sum(0)[:-2] + free[0::2] @ saved["free"].double()
    assert torch.allclose(found.double(), expected, rtol=2e-3, atol=1e-3)


def test_the_more_people_are_heard_the_less_free_scores_count():
    """Mutants: the noise left out, or the votes' own."""
    assert free_share(400, 0.0) == pytest.approx(0.05) and free_share(400, 3.0) == pytest.approx(0.0889, abs=1e-4)
    assert free_share(100, 7.0) == pytest.approx(0.2659, abs=1e-4) and free_share(2, 7.0) == 1.0


def test_directions_are_of_what_the_policy_writes_itself_and_of_what_is_written_for_free_rewards(layered):
    folder, _ = layered
    policy, _ = reader()
    model = RewardModel.from_policy(policy, TextFormat(20, True, False, "layers"))
    (mean,) = (folder / "run" / "rewards").glob("mean-*")
    public = PublicModels(PublicModel(policy, small_model()))
    written = load_reward(RewardConfig(source=f"fitted:{mean}", is_public=True), public=public).function.written()
    assert len(written) == 48 and len({*written}) > 24
    own = own_texts(policy, 64, prompt_tokens=8, max_new_tokens=10, seed=0)
    features = model.features(own + written)
    (final,) = (folder / "run" / "private" / "reward_query" / "final").glob("step-*")
    (directions,) = [t for name, t in load_file(final / "tensors.safetensors").items() if "directions" in name]
    expected = whitening(features.reshape(len(features), model.maps, -1), 6, 1.0, 6)
    assert torch.allclose(directions, expected, atol=1e-4)


def test_layers_say_the_mean_of_all_tokens_but_the_first_and_the_last_token():
    _, model = reader()
    model.text = TextFormat(20, True, False, "layers")
    config = SimpleNamespace(num_hidden_layers=30)
    deep = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)))
    assert maps_read(deep) == ([15, 20, 25, 30], [15, 25])
    assert maps_read(model) == ([1], [1]) and model.maps == 2  # it has one layer
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    found = maps_of(model, *model.pad(rows))
    for row, maps in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        hidden = body_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        states = hidden.hidden_states[1][0]
        mean = states[1:].mean(0) if len(row) > 1 else states[0]
        assert torch.allclose(maps, torch.stack([mean, states[-1]]), atol=1e-5)
    assert maps_of(model, *model.pad([[]]))[0, 0].isnan().all()  # nothing to take a mean of


def test_people_move_weights_by_their_vote_and_nothing_that_it_is_cast_in(layered, tmp_path):
    """Mutants: directions, the scale of free scores, the contrast or a weight that reads the pairs."""
    folder, _ = layered
    changed = vivid(24)
    changed[5] |= {"chosen": "w9 great great", "rejected": "w8 terrible hateful"}
    path = recipe(tmp_path, LAYERED | {"target_epsilon": "inf", "directions": 6}, changed)
    run_recipe(recipe_from("run", [str(path)]))
    one, two = weights_of(folder / "run"), weights_of(tmp_path / "run")
    same = [name for name in one if name.startswith("free.")]
    assert len(same) == 4 and all(torch.equal(one[name], two[name]) for name in same)
    assert json.loads((folder / "run/reward_model/reward.json").read_text())["free"] == json.loads(
        (tmp_path / "run/reward_model/reward.json").read_text()
    )["free"]
    moved = (two["free"] - one["free"]) * 24**0.5
    assert 0 < float(moved.norm()) <= 2 + 1e-3


def test_the_noise_sets_the_directions_and_the_step_towards_what_is_free(tmp_path):
    """Mutants: a prior of another length, added twice or away from the free mean; directions without their rule."""
    path = recipe(tmp_path, LAYERED | {"insecure_seed": 7}, vivid(40))
    run_recipe(recipe_from("run", [str(path)]))
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    sigma = line["noise_multiplier"]
    (final,) = (tmp_path / "run" / "private" / "reward_query" / "final").glob("step-*")
    trained = load_file(final / "tensors.safetensors")
    (votes,) = [t for name, t in trained.items() if "votes" in name]
    assert votes.numel() == max(8, int(0.5 * 40 / sigma))
    (free,) = [t for name, t in trained.items() if "free_head" in name]
    prior = 0.3 * sigma * (votes.numel() + 2) ** 0.5 / 2**0.5
    (tmp_path / "b").mkdir()
    again = recipe(tmp_path / "b", LAYERED | {"insecure_seed": 7}, vivid(40))
    mutant = pytest.MonkeyPatch()
    mutant.setattr("dpalign.algorithms.reward_query.PRIOR", 0.0)
    run_recipe(recipe_from("run", [str(again)]))
    mutant.undo()
    (final,) = (tmp_path / "b" / "run" / "private" / "reward_query" / "final").glob("step-*")
    without = load_file(final / "tensors.safetensors")
    (plain,) = [t for name, t in without.items() if "free_head" in name]
    assert torch.allclose(free - plain, torch.full((1, 2), prior), rtol=1e-3)
    (same,) = [t for name, t in without.items() if "votes" in name]
    assert torch.equal(same, votes)


HOW_MANY = [(40, 2.0, 10), (40, 5.0, 8), (3, 1.0, 8), (10_000, 1.0, 63), (40, 0.0, 63)]


@pytest.mark.parametrize(("units", "sigma", "count"), HOW_MANY)
def test_there_are_as_many_directions_as_the_noise_leaves_readable(units, sigma, count):
    """64 own texts differ in 63 directions."""
    algorithm = RewardQuery(RewardQueryConfig(target_epsilon=1, own_texts=64))
    algorithm.declared_units, algorithm.noise_multiplier = units, sigma
    model = RewardModel.from_policy(reader()[0], TextFormat(20, True, False, "layers"))
    assert algorithm.directions(model) == count


def test_of_a_layer_no_more_directions_are_taken_than_it_has_features():
    algorithm = RewardQuery(RewardQueryConfig(target_epsilon=1, own_texts=1000))
    algorithm.declared_units, algorithm.noise_multiplier = 40, 0.0
    model = RewardModel.from_policy(reader()[0], TextFormat(20, True, False, "layers"))
    found = algorithm.directions(model)
    assert isinstance(found, int) and found == model.maps * min(32, model.features_width // model.maps)


def test_its_audit_takes_the_directions_from_what_the_policy_writes(tmp_path, capsys):
    path = recipe(tmp_path, QUERY | {"target_epsilon": 2})
    done = call(capsys, "audit", path, "--stage", "reward_query", "--canaries", 60, "--black_box", "--json")
    assert done.status == 0, done.err
    (stage,) = done.json["stages"]
    assert (stage["stage"], stage["steps"], stage["sampling_rate"]) == ("reward_query", 1, 1.0) and stage["passed"]


def test_the_released_adapter_is_the_smallest_that_there_is(layered):
    """It does nothing: what was learned is in the head."""
    folder, _ = layered
    released = folder / "run" / "reward_model"
    assert json.loads((released / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 1
    tensors = load_file(released / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_a_pair_that_cannot_be_scored_casts_no_vote():
    config = RewardQueryConfig(target_epsilon=1, directions=2, free=[{"source": "vader"}])
    policy, _ = reader()
    model = RewardModel.from_policy(policy, TextFormat(20, True, False, "layers"))

    class Nothing:
        count = 1

        def scores(self, texts):
            return torch.tensor([[float("nan") if "w7" in text else 0.5] for text in texts])

    algorithm = RewardQuery(config, Reward(lambda *_, **__: [], -4, 4, rows_at_once=None))
    algorithm.free = Nothing()
    algorithm.setup(model)
    pairs = [{"chosen": "w1", "rejected": "w2"}, {"chosen": "w3", "rejected": "w7"}, {"chosen": "w4", "rejected": "w5"}]
    units = [[algorithm.encode(model, pair)] for pair in pairs]
    rows = algorithm.rows(model, units, None)
    assert rows.unit.tolist() == [0, 0, 2, 2] and rows.tensors["free"].tolist() == [[0.5]] * 4
    assert len(algorithm.rows(model, [units[1]], None).unit) == 0


def test_what_is_free_reads_the_answer_that_ends_a_chat():
    asked = [{"role": "user", "content": "Is it good?"}]
    chat = [*asked, {"role": "assistant", "content": "great"}]
    assert answered(chat) == (asked, "great") and answered("all of it") == ("", "all of it")
    assert answered([*asked, {"role": "assistant", "content": None}]) == (asked, "") and answered([]) == ("", "")
    mean = load_reward(
        RewardConfig(source="mean", of=[{"source": "vader"}]),
        public=PublicModels(PublicModel(Policy.load(ModelConfig()), "tiny-review-lm")),
    )
    great, rude = mean.function.scores([chat, [*asked, {"role": "assistant", "content": "terrible"}]])[:, 0].tolist()
    assert mean([asked], ["great"])[0] == pytest.approx(great, abs=1e-5) and great > 0 > rude
    own = [chat, chat]  # a chat's public texts are answers to what the policy asks itself
    assert as_answers(["w1", "w2"], own) == [[*asked, {"role": "assistant", "content": text}] for text in ("w1", "w2")]
    assert as_answers(["w1"], ["w2"]) == ["w1"]


NOT_FREE = {
    "a function": ([{"source": "os.path:join"}], {}, "cannot go into a release"),
    "a release": ([{"source": "reward_model:somewhere"}], {}, "cannot go into a release"),
    "an unknown field": ([{"source": "vader", "weight": 2}], {}, "has no field weight"),
    "one logit": (FREE, {"pooling": "mean"}, "free rewards need pooling layers"),
    "no question": ([{"source": "judge:base"}], {}, "a judge needs questions"),
}


@pytest.mark.parametrize(("free", "more", "says"), NOT_FREE.values(), ids=NOT_FREE)
def test_what_cannot_be_a_free_reward_is_refused_before_a_draw(free, more, says, tmp_path, capsys):
    assert says in call(capsys, "run", recipe(tmp_path, LAYERED | {"free": free} | more)).error
    assert not (tmp_path / "ledger.sqlite").exists() or ledger_rows(tmp_path) == 0


def test_a_damaged_release_is_refused(layered, tmp_path):
    folder, _ = layered
    remember_base(private_folder(tmp_path / "private"), small_model())
    for number, (file, change) in enumerate(
        {
            "reward.json": lambda text: text.replace('"mean": [', '"mean": [7, '),
            "reward.safetensors": lambda text: text[:-9],
        }.items()
    ):
        copy = copied(folder, tmp_path / str(number))
        content = (copy / file).read_bytes()
        changed = change(content) if file.endswith("s") else change(content.decode()).encode()
        (copy / file).write_bytes(changed)
        with pytest.raises(DPAlignError, match="is not the release of this reward model"):
            load_reward(RewardConfig(source=f"reward_model:{copy}"))
    copy = copied(folder, tmp_path / "free")
    described = json.loads((copy / "reward.json").read_text())
    described["free"]["reward"]["of"] = [{"source": "contrast", "wanted": "w1"}]
    (copy / "reward.json").write_text(json.dumps(described))
    with pytest.raises(DPAlignError):
        load_reward(RewardConfig(source=f"reward_model:{copy}"))


def copied(folder, run) -> Path:
    """A copy of the release, which still knows where its base lies."""
    shutil.copytree(folder / "run" / "reward_model", run / "reward_model")
    (run / "private").mkdir()
    shutil.copy(folder / "run" / "private" / "bases.json", run / "private")
    return run / "reward_model"


def test_it_is_no_classifier_that_is_trained_further(layered, tmp_path, capsys):
    folder, _ = layered
    release = str(folder / "run" / "reward_model")
    fields = {"expected_batch_size": 8, "max_steps": 1, "model": {"name_or_path": release}}
    write_jsonl(tmp_path / "pairs.jsonl", judged(24, start=100))
    data = {"name": "judges", "path": str(tmp_path / "pairs.jsonl")}
    path = write_recipe(tmp_path, sft=None, ppo=None, reward_model=fields, reward_model_data=data, target_epsilon="inf")
    assert "cannot be trained further with pooling last" in call(capsys, "run", path).error


def test_a_text_with_one_number_that_is_none_is_left_out_whole():
    features = torch.randn(60, 2, 5, generator=torch.Generator().manual_seed(0))
    features[7, 1, 3] = float("inf")
    others = torch.cat([features[:7], features[8:]])
    assert torch.equal(whitening(features, 4, 1.0, 4), whitening(others, 4, 1.0, 4))
