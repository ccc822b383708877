"""A reward from one query: votes of norm 1, added up once, in directions that no private text has touched."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dpalign.algorithms.reward import pair_texts
from dpalign.algorithms.reward_query import RewardQuery, whitening
from dpalign.errors import DPAlignError
from dpalign.models import AdapterConfig, ModelConfig, Policy, RewardModel, TextFormat
from dpalign.models.reward_model import normalization_of
from dpalign.rewards.learned import own_texts
from dpalign.settings.reward_query import RewardQueryConfig
from helpers import call, judged, ledger_rows, reviews, small_model, statement, write_jsonl, write_recipe

DIRECTIONS = 4
QUERY = {
    "directions": DIRECTIONS, "own_texts": 64, "max_length": 20, "prepend_bos": True, "target_epsilon": "inf",
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
    expected = whitening(model.features(texts), DIRECTIONS, shrinkage=1.0)
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
    features = torch.randn(4000, 4, generator=generator) * scales
    plain, shrunk = (whitening(features, 3, shrinkage) for shrinkage in (0.0, 1.0))
    spread = (features @ plain.T).std(0)
    assert torch.allclose(spread, torch.full((3,), 1 / 6**0.5), rtol=0.02)  # two texts differ by a squared norm of 1
    mean = float((scales[:3] ** 2).mean())
    wanted = [s / (s * s + mean) ** 0.5 / 6**0.5 for s in (4.0, 2.0, 1.0)]
    assert torch.allclose((features @ shrunk.T).std(0), torch.tensor(wanted), rtol=0.03)
    with pytest.raises(DPAlignError, match="differs in 3 directions and not in 4"):
        whitening(features, 4, 0.0)
