"""Updates on prompts that the policy writes itself: no record, no draw, no intent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
import torch
from harness import Interrupted, ppo, prompts, rloo, run_stage
from torch import Tensor

from dpalign.algorithms import PPO, RLOO, PPOConfig
from dpalign.algorithms.base import Algorithm, encode_units
from dpalign.algorithms.rollouts import RolloutAlgorithm
from dpalign.privacy.ledger import Ledger
from dpalign.rewards import Reward, RewardConfig
from dpalign.training import Stage
from tiny import dataset, tiny_policy, words

LEARNS = {
    "synthetic_steps": 2, "synthetic_batch_size": 6, "max_prompt_length": 8, "prompt_max_tokens": 3,
    "reward": RewardConfig(),
}  # fmt: skip
OTHERS = [[{"id": f"o{i}", "prompt": words(1 + i % 5, 50 + i), "score": -100.0 * i}] for i in range(9)]


def by_length(algorithm: RolloutAlgorithm) -> RolloutAlgorithm:
    """The algorithm with a public reward that needs no column."""
    algorithm.reward = Reward(lambda prompts, completions, **_: [len(c) / 20 for c in completions], -1.0, 1.0)
    return algorithm


class ReadsPrompts(RLOO):
    """Learns from the prompts of its units before the first draw."""

    def warm_up(self, policy):
        def own(policy, count, prompt_tokens, rows_at_once):
            return [unit[0] for unit in self.seen[:count]]

        with patch("dpalign.algorithms.rollouts.write_prompts", own):
            return super().warm_up(policy)


class EncodesFirst(Stage):
    def _warm_up(self):
        self.algorithm.seen = encode_units(self.algorithm, self.model, self.data.units)
        super()._warm_up()


def warmed_up(algorithm: Callable[[], RolloutAlgorithm], units: list, stage_class: type[Stage]) -> tuple[Tensor, int]:
    """The trained weights after the warm-up, and the number of intents at that moment."""
    found: list[tuple[Tensor, int]] = []
    ledger = Ledger(":memory:")

    class Watched(stage_class):  # type: ignore[misc, valid-type]
        def _warm_up(self):
            before = torch.cat([p.detach().flatten() for p in self.gradients.parameters]).clone()
            super()._warm_up()
            after = torch.cat([p.detach().flatten() for p in self.gradients.parameters])
            assert (after - before).norm() > 1e-3, "something is learned"
            found.append((after.clone(), len(ledger.intents())))
            raise Interrupted

    run_stage(
        by_length(algorithm()), dataset(units), dtype=torch.float32, stage_class=Watched, ledger=ledger,
        completions_are_fixed=False,
    )  # fmt: skip
    return found[0]


@pytest.mark.parametrize(
    "algorithm", [partial(ppo, **LEARNS), partial(rloo, **LEARNS), partial(ppo, num_ppo_epochs=2, **LEARNS)]
)
def test_the_warm_up_is_the_same_whoever_the_units_are(algorithm):
    """Equal seeds, different data: the weights are equal bit for bit, and nothing is journaled."""
    (one, intents), (other, _) = (warmed_up(algorithm, units, Stage) for units in (prompts(), OTHERS))
    assert torch.equal(one, other) and intents == 0


def test_a_warm_up_on_the_units_prompts_is_found():
    """Mutant: the synthetic prompts are those of the units."""
    mutant = partial(rloo, ReadsPrompts, **LEARNS)
    one, other = (warmed_up(mutant, units, EncodesFirst)[0] for units in (prompts(), OTHERS))
    assert (one - other).norm() > 1e-3


def test_the_warm_up_spends_nothing_and_is_not_repeated(tmp_path):
    """A run that stops at its first draw resumes from what was learned, and only draws are journaled."""
    ledger, warm_ups = Ledger(":memory:"), []

    class Counting(PPO):
        def warm_up(self, policy):
            warm_ups.append(len(ledger.intents()))
            return super().warm_up(policy)

    def dies_at_first(data, call):
        if len(ledger.intents()) == 1:
            raise Interrupted
        return list(range(len(data.units)))

    for _ in range(2):
        run_stage(
            by_length(ppo(Counting, max_steps=2, **LEARNS)), dataset(prompts()), dtype=torch.float32, ledger=ledger,
            sampler=dies_at_first, folder=tmp_path, completions_are_fixed=False,
        )  # fmt: skip
    assert warm_ups == [0] and [(i.step, i.attempt) for i in ledger.intents()] == [(0, 0), (0, 1), (1, 1)]


def test_without_synthetic_steps_nothing_is_learned_before_the_first_draw():
    policy, algorithm = tiny_policy("gpt2"), by_length(PPO(PPOConfig(), Reward(lambda *_, **__: [], 0, 1)))
    algorithm.setup(policy)
    state = {n: p.clone() for n, p in policy.named_parameters()}
    assert algorithm.warm_up(policy) == 0 and Algorithm.warm_up(algorithm, policy) == 0
    assert all(torch.equal(p, state[n]) for n, p in policy.named_parameters())


@pytest.mark.parametrize("algorithm", [ppo, rloo])
def test_a_synthetic_text_that_cannot_be_scored_does_not_spoil_the_weights(algorithm):
    """A reward that is not a number for some text would make every weight one."""
    stage = algorithm(**LEARNS | {"synthetic_batch_size": 32})
    stage.reward = Reward(
        lambda prompts, completions, **_: [float("nan") if len(c) > 12 else len(c) / 20 for c in completions], -1, 1
    )
    policy = tiny_policy("gpt2")
    torch.manual_seed(0)
    stage.setup(policy)
    stage.warm_up(policy)
    assert all(p.isfinite().all() for p in policy.parameters())
