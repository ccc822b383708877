"""What a run computes with: its models, each of them once, and its rewards, each loaded once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .errors import DPAlignError
from .models import AdapterStack, ModelConfig, Policy, RewardModel, TextFormat
from .models.loading import device_of
from .models.precision import faster_dtype
from .models.reward_model import FORMAT_FILE, is_classifier, normalization_of
from .plan import RecipeStage
from .recipe import Recipe
from .release import REWARD_MODEL
from .rewards import Reward, RewardConfig, RewardFunction, load_reward
from .rewards.written import PublicModel, PublicModels
from .settings.base import TrainingConfig
from .settings.reward_model import RewardModelConfig
from .settings.rewards import RELEASED
from .settings.rollouts import SamplingConfig
from .stages import kind
from .workspace import Workspace

REWARDS = "rewards"  # of the run: what was found for rewards that need nobody's data
M = TypeVar("M", bound=AdapterStack)


def with_dtypes(
    recipe: Recipe, workspace: Workspace, policy: Policy | None = None, reward_model: RewardModel | None = None
) -> Recipe:
    """The recipe with a dtype for each of its models: what the run began with, or, of a new one, what is faster here.

    policy, reward_model: loaded models instead of the recipe's.

    Raises:
        DPAlignError: a model's configuration cannot be read, or the run was begun in another dtype.
    """
    device, given = device_of(recipe.device), policy or reward_model

    def settle(entry: str, config: ModelConfig) -> Any:
        def choose() -> str:
            return faster_dtype(config, device) if given is None else str(given.model.dtype).removeprefix("torch.")

        return replace(config, dtype=workspace.dtype_of(entry, config.dtype, choose))  # type: ignore[arg-type]

    changed: dict[str, Any] = {}
    for name, owned in models_of_stages(recipe).items():
        named = {setting: settle(f"{name}.{setting}", config) for setting, config in owned.items()}
        changed[name] = replace(recipe.stages[name], **named)
    return replace(recipe, model=settle("model", recipe.model), **changed)


def dtypes_of(recipe: Recipe) -> dict[str, str]:
    """Of the frozen weights of each of its models, by the names that `Workspace.dtype_of` knows."""
    of_stages = models_of_stages(recipe).items()
    own = {f"{name}.{setting}": config.dtype for name, owned in of_stages for setting, config in owned.items()}
    return {"model": recipe.model.dtype, **own}


def models_of_stages(recipe: Recipe) -> dict[str, dict[str, ModelConfig]]:
    """Models that stages name for themselves, by stage and setting."""
    found: dict[str, dict[str, ModelConfig]] = {}
    for name, config in recipe.stages.items():
        entering = kind(name).entering(kind(name).completed(config, recipe.stages.values()))
        owned = {setting: value for setting, value in entering.items() if isinstance(value, ModelConfig)}
        found |= {name: owned} if owned else {}
    return found


class Models:
    """The models of a run, by kind. A reward model starts as the policy's body and adapters when it is asked for."""

    def __init__(self, *models: AdapterStack | None, text: TextFormat | None = None) -> None:
        self._made, self._text = [model for model in models if model is not None], text

    @classmethod
    def load(cls, recipe: Recipe, policy: Policy | None = None, reward_model: RewardModel | None = None) -> Models:
        """Those that are given, and those that the recipe names.

        Raises:
            DPAlignError: a model that cannot be loaded.
        """
        device = device_of(recipe.device)
        kinds = [kind(name).model_kind for name in recipe.stages]
        scoring = next((c for c in recipe.stages.values() if isinstance(c, RewardModelConfig)), None)
        if scoring is not None and reward_model is None:
            own = scoring.model
            if own is None and Policy not in kinds and policy is None and is_classifier(recipe.model):
                own = recipe.model
            if own is not None:
                reward_model = RewardModel.load(own, device, scoring.text)
        if policy is None and (Policy in kinds or reward_model is None):
            policy = Policy.load(recipe.model, device)
        trained = [name for name, c in recipe.stages.items() if isinstance(c, TrainingConfig)]
        if policy is not None and policy.asked_with and any(kind(name).model_kind is Policy for name in trained):
            raise DPAlignError(
                f"model {recipe.model.name_or_path} has learned to be asked with words in front of every prompt, and a "
                "further stage would leave them out: start from the model that it was trained from."
            )
        text = scoring.text if scoring is not None else None
        if reward_model is not None and text is not None:
            reward_model.read_as(text)  # a release is trained further as the recipe says
        return cls(policy, reward_model, text=text)

    def get(self, model_kind: type[M]) -> M | None:
        """The model of a kind, if there is one yet."""
        return next((model for model in self._made if isinstance(model, model_kind)), None)

    def of(self, model_kind: type[M]) -> M:
        """The model of a kind.

        Raises:
            DPAlignError: there is none, and none can be made.
        """
        found = self.get(model_kind)
        if found is not None:
            return found
        policy = self.get(Policy)
        if policy is None or model_kind is not RewardModel:
            raise DPAlignError(f"the recipe loads no {model_kind.__name__}: name a model in its section model.")
        self._made.append(RewardModel.from_policy(policy, self._text))
        return self.of(model_kind)

    def on_trial(self, model_kind: type[AdapterStack]) -> AdapterStack:
        """The model of a kind, or one like what it will be, which is forgotten again."""
        found = self.get(model_kind)
        return RewardModel.from_policy(self.of(Policy), self._text) if found is None else found

    def reader(self, model_kind: type[AdapterStack]) -> AdapterStack:
        """The model that a kind is, or will be made of: the same tokenizer and body."""
        return self.get(model_kind) or self.of(Policy)


class Rewards:
    """The rewards of a run, each loaded once.

    Args:
        folder: of the run, where the constants of rewards that need nobody's data are, and the reward model's release.
        function: a Python function instead of what the recipe's sections name.
    """

    def __init__(self, recipe: Recipe, models: Models, folder: Path, function: RewardFunction | None = None) -> None:
        self.recipe, self.models, self.folder, self.function = recipe, models, folder, function
        self._loaded: list[tuple[RewardConfig, Reward]] = []

    def of(self, config: RewardConfig) -> Reward:
        """The reward that a section describes.

        Raises:
            DPAlignError: it cannot be loaded.
        """
        known = self.known(config)
        if known is not None:
            return known
        trained = None
        if config.source == RELEASED and self.function is None:
            trained = (self.models.of(RewardModel), normalization_of(self.folder / REWARD_MODEL))
        public = None if self.function else self.public_models()
        reward = load_reward(config, self.models.of(Policy).device, self.function, trained, public=public)
        self._loaded.append((config, reward))
        return reward

    def known(self, config: RewardConfig) -> Reward | None:
        """The reward of a section, if it has been loaded."""
        return next((reward for loaded, reward in self._loaded if loaded == config), None)

    def entering(self, stage: RecipeStage) -> dict[str, Reward]:
        """Those that a stage is given, by setting."""
        sections = stage.kind.entering(stage.config).items()
        return {name: self.of(section) for name, section in sections if isinstance(section, RewardConfig)}

    def public_models(self) -> PublicModels:
        """What rewards are made with that need nobody's data; their constants are kept in the run's folder."""
        return public_models(self.recipe, self.models.of(Policy), self.folder / REWARDS)

    def files(self) -> dict[str, bytes]:
        """What they have written down or read there, by name: enough for the same rewards elsewhere."""
        found = [*(self.folder / REWARDS).rglob("*"), self.folder / REWARD_MODEL / FORMAT_FILE]
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in found if file.is_file()}


def public_models(recipe: Recipe, policy: Policy, folder: Path | None = None) -> PublicModels:
    """The recipe's model as it came, for rewards that need nobody's data.

    folder: where their constants are kept, if anywhere.
    """
    base = PublicModel(policy, base_name(policy, recipe.model.name_or_path), has_run=True)
    lengths = recipe.rollouts or SamplingConfig()
    rows = lengths.prompt_tokens, lengths.max_completion_length, policy.asks_in_chats
    return PublicModels(base, policy.device, *rows, folder)


def base_name(model: AdapterStack, loaded: str) -> str:
    """The model under all adapters: the one that was `loaded`, or that an earlier release was trained on."""
    if "earlier" in model.adapters:
        return str(model.model.peft_config["earlier"].base_model_name_or_path)
    return loaded
