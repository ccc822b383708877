"""Public language models behind rewards: what they answer, how they read, and what they write themselves.

A run's own model takes part without the adapters of the run: as public as it came. What is worked out from the text
that it writes (scales, discriminants) is fixed by a seed, and kept beside the run, so that a resumed run, an evaluation
and another run score by the same constants.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.text import Text, as_string, encode_prompt_text, joined
from ..domains import check_settings
from ..errors import DPAlignError
from ..files import dumps, replace_folder, write_json
from ..models import ModelConfig, Policy
from ..models.generation import Prompt, answers, padded, write_rows
from ..models.loading import check_ids, embedding_rows, positions_of
from ..settings.rewards import BASE, JUDGE, RewardConfig

FORMAT = 1
DESCRIPTION, CONSTANTS = "reward.json", "constants.safetensors"


@dataclass(frozen=True)
class PublicModel:
    """A language model that a reward asks or reads, or that writes for it.

    has_run: the policy is a run's, whose adapters stay off.
    """

    policy: Policy
    name: str
    has_run: bool = False

    @contextmanager
    def as_it_came(self) -> Iterator[Policy]:
        """The policy within the block, without what a run has trained; torch's generator is as before behind it."""
        device = self.policy.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if not self.has_run:
                yield self.policy
                return
            with self.policy.base():
                yield self.policy

    def check_length(self, length: int, what: str) -> None:
        """Raises DPAlignError for more positions than the model has, and a tokenizer that is too large for it."""
        limit = positions_of(self.policy.model.config)
        if limit is not None and length > limit:
            raise DPAlignError(f"{what} needs {length} positions and the model {self.name} has {limit}.")
        check_ids(self.policy.tokenizer.get_vocab().values(), embedding_rows(self.policy.model))

    def own_rows(
        self, count: int, prompt_tokens: int, completion_tokens: int, seed: int
    ) -> tuple[list[Text], list[str]]:
        """Prompts and completions that it writes itself."""
        with self.as_it_came() as policy:
            torch.manual_seed(seed)
            return write_rows(policy, count, prompt_tokens, completion_tokens)

    def answers_to(self, asked: str, count: int, tokens: int, seed: int) -> list[str]:
        """What it writes to a request, or behind a beginning where it has no chat template."""
        tokenizer = self.policy.tokenizer
        is_chat = bool(getattr(tokenizer, "chat_template", None))
        text: Text = [{"role": "user", "content": asked}] if is_chat else asked
        prompt = Prompt(encode_prompt_text(tokenizer, text, prepend_bos=True), text)
        self.check_length(len(prompt.ids) + tokens, "what the model is asked to write")
        with self.as_it_came() as policy:
            torch.manual_seed(seed)
            prompts = [prompt] * count
            return answers(policy, prompts, policy.sample(*padded(policy, prompts), tokens))


def texts_read(how: str, prompts: Any, completions: list[str]) -> list[str]:
    """What a reward reads of each row, as one string."""
    if how == "completion":
        return completions
    return [as_string(joined(p, c)) for p, c in zip(prompts, completions, strict=True)]


@dataclass
class PublicModels:
    """What rewards that need nobody's data are made with.

    run: the run's own model; None where there is no run. prompt_tokens, completion_tokens: of rows that a model writes
        itself, as those that are scored. chats: whether its prompts are. folder: where constants are kept; None:
        nowhere. is_fixed: they are all there.
    """

    run: PublicModel | None = None
    device: str | torch.device = "cpu"
    prompt_tokens: int = 8
    completion_tokens: int = 40
    chats: bool = False
    folder: Path | None = None
    is_fixed: bool = False
    _loaded: dict[str, PublicModel] = field(default_factory=dict)
    _found: list[tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=list)  # by section
    _written: dict[tuple[str, int, int], tuple[list[Text], list[str]]] = field(default_factory=dict)

    def named(self, name: str) -> PublicModel:
        """A public model or a release, loaded once."""
        if name not in self._loaded:
            policy = Policy.load(ModelConfig(name_or_path=name, dtype="float32"), self.device)
            policy.asks_in_chats = self.chats
            self._loaded[name] = PublicModel(policy, name)
        return self._loaded[name]

    def base(self, config: RewardConfig) -> PublicModel:
        """The model that a reward's section means by `base`.

        Raises:
            DPAlignError: it names none, and there is no run that has one.
        """
        if config.base is not None:
            return self.named(config.base)
        if self.run is None:
            raise DPAlignError(
                f"the reward {config.source} needs a public model that writes, and there is no run whose own it could "
                "take: name one in reward.base."
            )
        return self.run

    def judge(self, config: RewardConfig) -> PublicModel:
        """The model that answers a judge's questions."""
        name = config.source.partition(":")[2]
        return self.base(config) if name == BASE else self.named(name)

    def writer(self, config: RewardConfig) -> PublicModel:
        """The model on whose text a reward is standardised: the base, or where there is none the judge itself."""
        alone = config.kind == JUDGE and config.base is None and self.run is None
        return self.judge(config) if alone else self.base(config)

    def own_rows(self, config: RewardConfig) -> tuple[list[Text], list[str]]:
        """Prompts and completions that show a score's scale; written once for all sections that ask for the same."""
        writer, count, seed = self.writer(config), 2 * config.written_texts, config.written_seed
        key = writer.name, count, seed
        if key not in self._written:
            self._written[key] = writer.own_rows(count, self.prompt_tokens, self.completion_tokens, seed)
        return self._written[key]

    def constants(self, config: RewardConfig, fit: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `fit` finds for a section, or what was found for it when the run began.

        Raises:
            DPAlignError: what was kept is damaged.
        """
        known = next((found for section, found in self._found if section == section_of(config)), None)
        if known is not None:
            return known
        self._found.append((section_of(config), self._fitted(config, fit)))
        return self._found[-1][1]

    def _fitted(self, config: RewardConfig, fit: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `fit` finds, in the folder if there is one."""
        if self.folder is None:
            return fit()
        folder = self.folder / self.name_of(config)
        if not folder.exists() and not self.is_fixed:
            found = {name: tensor.float().contiguous() for name, tensor in fit().items()}
            with replace_folder(folder) as temporary:
                save_file(found, temporary / CONSTANTS)
                write_json(temporary / DESCRIPTION, self.description(config))
        return load_constants(folder)

    def kept(self, config: RewardConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A section with all constants of it and of its parts, for `from_kept`: whose base is the same model."""
        described = {name: value for name, value in self.description(config).items() if name != "base"}
        sections = [section_of(one) for one in (config, *config.parts)]
        found = [next((tensors for known, tensors in self._found if known == s), {}) for s in sections]
        return described, {f"{n}.{name}": value for n, tensors in enumerate(found) for name, value in tensors.items()}

    def name_of(self, config: RewardConfig) -> str:
        """Of a section's folder: the same for the same section, model and lengths."""
        digest = hashlib.sha256(dumps(self.description(config)).encode()).hexdigest()
        return f"{config.kind}-{digest[:8]}"

    def description(self, config: RewardConfig) -> dict[str, Any]:
        """All that the constants depend on."""
        return {
            "format": FORMAT,
            "reward": section_of(config),
            "base": self.writer(config).name,
            "chats": self.chats,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }


def section_of(config: RewardConfig) -> dict[str, Any]:
    """The fields of a section that are not as by default, but for what somebody declared of it."""
    plain = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(config)}
    found = {name: value for name, value in asdict(config).items() if value != plain[name]}
    return _undeclared(found | ({"of": [_undeclared(part) for part in config.of]} if config.of else {}))


def _undeclared(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "is_public"}


def from_kept(
    described: Any, constants: Mapping[str, Tensor], base: str, here: PublicModels
) -> tuple[RewardConfig, PublicModels]:
    """A section, and the models and constants that it was made with: of what `PublicModels.kept` gave.

    Raises:
        ValueError, KeyError, TypeError, DPAlignError: it is nothing of that.
    """
    if described["format"] != FORMAT or not isinstance(described["chats"], bool):
        raise ValueError
    section = RewardConfig(**described["reward"])
    check_settings(section)
    lengths = int(described["prompt_tokens"]), int(described["completion_tokens"]), described["chats"]
    made = PublicModels(None, here.device, *lengths, is_fixed=True, _loaded=here._loaded)
    made.run = here.run if here.run is not None and here.run.name == base else made.named(base)
    for number, one in enumerate((section, *section.parts)):
        own = {name.partition(".")[2]: value for name, value in constants.items() if name.startswith(f"{number}.")}
        if own:
            made._found.append((section_of(one), own))
        elif one.is_written:
            raise ValueError
    return section, made


@dataclass(frozen=True)
class Fitted:
    """A reward that a run has fitted: its section, and the folder of its constants.

    base: the model that wrote. chats, prompt_tokens, completion_tokens: as the run had them.
    """

    section: RewardConfig
    folder: Path
    base: str
    chats: bool
    prompt_tokens: int
    completion_tokens: int

    @staticmethod
    def read(config: RewardConfig) -> Fitted:
        """What `fitted:FOLDER` names. Whether it is public is for those to declare who use it now.

        Raises:
            DPAlignError: it is no such folder.
        """
        folder = Path(config.source.partition(":")[2])
        try:
            value = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if value["format"] != FORMAT or not isinstance(value["base"], str) or not isinstance(value["chats"], bool):
                raise ValueError
            lengths = int(value["prompt_tokens"]), int(value["completion_tokens"])
            section = RewardConfig(**value["reward"], is_public=config.is_public)
            check_settings(section)
            if not section.is_written:
                raise ValueError
            return Fitted(section, folder, value["base"], value["chats"], *lengths)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, DPAlignError):
            raise DPAlignError(
                f"reward.source: {folder} holds no reward that a run has fitted (give a folder in a run's rewards/)."
            ) from None

    def public(self, here: PublicModels) -> PublicModels:
        """What it was made with, loaded; the run's own model where that is the same."""
        lengths = self.prompt_tokens, self.completion_tokens, self.chats
        made = PublicModels(None, here.device, *lengths, folder=self.folder.parent, is_fixed=True, _loaded=here._loaded)
        is_same = here.run is not None and here.run.name == self.base
        made.run = here.run if is_same else made.named(self.base)
        return made


def load_constants(folder: Path) -> dict[str, Tensor]:
    """Raises DPAlignError if they cannot be read."""
    try:
        return load_file(folder / CONSTANTS)
    except (OSError, SafetensorError):
        raise DPAlignError(
            f"the constants of a reward in {folder} cannot be read: copy them again, or take the folder away where a "
            "run can find them anew."
        ) from None
