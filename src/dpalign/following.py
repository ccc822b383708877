"""A run in another process than the first one, which says what is to be done."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from .errors import RECORDS_READ
from .loaded import Models, Rewards
from .models import Policy, RewardModel
from .plan import RecipeStage
from .privacy.context import own_context
from .recipe import Recipe
from .results import Results
from .rewards import RewardFunction
from .training import Follower
from .world import World, lost_is_said


@dataclass(frozen=True)
class Order:
    """What the first process tells the others of a stage that trains.

    chats: whether the policy asks in chats. noise_multiplier, declared_units: as planned. files: that rewards read, by
    their names in the run's folder. is_shared: whether its work is shared; else the first process does all of it.
    """

    stage: RecipeStage
    chats: bool
    noise_multiplier: float
    declared_units: float
    files: dict[str, bytes]
    is_shared: bool


@lost_is_said()
@own_context()
def follow(
    world: World,
    policy: Policy | None = None,
    reward_model: RewardModel | None = None,
    reward_function: RewardFunction | None = None,
) -> Results:
    """A run in another process than the first one: the same models and rewards, and no record, ledger or file.

    Args:
        policy, reward_model, reward_function: as in `run_recipe`.

    Raises:
        DPAlignError: a model or reward cannot be loaded here, or the first process has ended.
    """
    quiet_libraries()
    recipe: Recipe = world.share()
    RECORDS_READ.set()  # what comes now may be made of them
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    models = Models.load(recipe, policy, reward_model)
    with TemporaryDirectory(prefix="dpalign-") as temporary:
        folder = Path(temporary)
        rewards = Rewards(recipe, models, folder, reward_function)
        while isinstance(order := world.share(), Order):
            for name, content in order.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            follow_stage(world, order, models, rewards)
    world.forget()
    results: Results = order
    return results


def follow_stage(world: World, order: Order, models: Models, rewards: Rewards) -> None:
    """Leaves the model as the stage leaves it in the first process."""
    chosen, own = models.get(Policy), order.stage
    if chosen is not None:
        chosen.asks_in_chats = order.chats
    model = models.of(own.kind.model_kind)
    algorithm = own.kind(own.config, **rewards.entering(own))
    algorithm.noise_multiplier, algorithm.declared_units = order.noise_multiplier, order.declared_units
    follower = Follower(model, algorithm, world)
    if order.is_shared:
        follower.follow()
    else:
        follower.take_over()
    world.spread([*model.stage_state().values()])


def quiet_libraries() -> None:
    # Their warnings may quote lengths or texts of records.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
