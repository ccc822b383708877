"""`PPOTrainer` under TRL's name: TRL 0.12's trainer on our stages, and the door to TRL 0.11's loop."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from peft import LoraConfig
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, TrainerCallback

from ..data.text import encode_prompt_text, read_text, template_options
from ..errors import DPAlignError
from ..printable import printable
from ..reporting.progress import Reporter
from ..reporting.terminal import Terminal, plain
from ..rewards import is_reward_model
from ..settings.privacy import Privacy
from ..settings.trainers import PPOConfig as Settings
from ..trainers import DPPPOTrainer
from .config import PPOConfig
from .translate import OUTPUT, SCORES, Scored, check_reference, check_stop, eval_steps, read_reward, read_rows, settings

OPEN = (
    "NOT PRIVATE: this run adds no noise and clips no row, as in TRL. Give PPOTrainer "
    "privacy=Privacy(target_epsilon=..., dataset_name=...) for a guarantee."
)
THE_LOOP = (
    "between generate and step the script holds the rows of a secret sample and their rewards, so nobody can say "
    "whether one row changed another's reward or the number of steps; with privacy, give the trainer the reward and "
    "call train() in place of the loop: PPOTrainer(args=config, processing_class=tokenizer, model=model, "
    "ref_model=None, reward_model=your_function_of_texts, train_dataset=dataset, privacy=Privacy(...)).train()"
)


class PPOTrainer:
    """TRL's `PPOTrainer`: without privacy unless `privacy` says so. The policy is a LoRA adapter with a value head.

    A call with TRL 0.11's arguments (config, model, ref_model, tokenizer, dataset) makes a `LoopTrainer`.

    Args:
        args: a `PPOConfig`.
        processing_class: the tokenizer.
        model: a causal LM that holds what its folder holds; it is never changed.
        ref_model: nothing, or the same weights: the reference is what the policy starts from.
        reward_model: a sequence classifier, its folder, the release of a dpalign reward model; or a function
            f(prompts, completions, **columns) -> list[float] that scores every row by itself.
        train_dataset: rows with `input_ids`, or with `prompt` (text or messages).
        value_model: refused: the value is a head on the policy's own body.
        eval_dataset: rows as in train_dataset, completed and scored at the end, with eval_strategy="steps" while it
            trains too; with privacy, declared public.
        callbacks: transformers' callbacks, told steps, epsilon, noised metrics and what eval_dataset says.
        peft_config: plain LoRA; without one, an adapter of rank 4 on the attention.
        privacy: what makes the run private; None is a run without privacy, and is recorded as one.
        quiet: prints nothing.

    Raises:
        DPAlignError: what cannot be honoured, by name; all that privacy still has to be told, at once.
    """

    def __new__(cls, *args: Any, **options: Any) -> PPOTrainer:
        from .loop import LoopTrainer

        second = args[1] if len(args) > 1 else None
        later = {"args", "processing_class", "policy", "ref_policy", "train_dataset", "value_model", "eval_dataset"}
        is_later = later & options.keys() or isinstance(second, PreTrainedTokenizerBase)
        return super().__new__(cls if cls is not PPOTrainer else Trainer if is_later else LoopTrainer)

    def __init__(self, *args: Any, **options: Any) -> None:  # of a subclass; else it is a `Trainer` or a `LoopTrainer`
        raise DPAlignError(
            f"{type(self).__name__} is a subclass of PPOTrainer, which is one of two by its arguments: subclass "
            "dpalign.trl.trainer.Trainer (arguments as from TRL 0.12 on) or dpalign.trl.loop.LoopTrainer instead."
        )


class Trainer(PPOTrainer):
    """TRL 0.12's trainer; see `PPOTrainer`. `config`, `tokenizer`, `policy` and `ref_policy` are older names."""

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: Any = None,
        ref_model: Any = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: LoraConfig | None = None,
        *,
        privacy: Privacy | None = None,
        quiet: bool | None = None,
        config: PPOConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        policy: Any = None,
        ref_policy: Any = None,
    ) -> None:
        self.args = _one_of(args, config, "args", PPOConfig)
        self.args.resolve("trainer")
        self.processing_class = _one_of(processing_class, tokenizer, "processing_class", PreTrainedTokenizerBase)
        given = policy if model is None else model
        _refuse_parts(self.args, value_model, data_collator, optimizers)
        check_stop(self.args, self.processing_class)
        check_reference(given, ref_policy if ref_model is None else ref_model)
        rows = read_rows(train_dataset, self.processing_class)
        shown = None if eval_dataset is None else read_rows(eval_dataset, self.processing_class)
        longest = self._longest(rows + (shown or []), privacy)
        scored = read_reward(reward_model, longest + self.args.response_length)
        told = privacy or _open(self.args, scored)
        quiet = bool(self.args.disable_tqdm) if quiet is None else quiet
        if privacy is None:
            Reporter(quiet=quiet).note(OPEN)
        self._trainer = DPPPOTrainer(
            given,
            _clipped(settings(self.args, len(rows), longest, scored.config), self.args, told),
            rows,
            None if self.args.num_sample_generations == 0 and eval_steps(self.args, 1) is None else shown,
            self.processing_class,
            peft_config,
            reward_funcs=scored.function,
            callbacks=callbacks,
            privacy=told,
            quiet=quiet,
        )

    def _longest(self, rows: list[dict[str, Any]], privacy: Privacy | None) -> int:
        """Most tokens of a prompt: as declared, or without privacy that of the longest."""
        declared: int | None = self.args.max_prompt_length
        if declared is not None:
            return declared
        if privacy is not None:
            raise DPAlignError(
                "PPOConfig(max_prompt_length=...) is needed with privacy: taken from the data, the longest prompt "
                "would tell of its record."
            )
        tokenizer = self.processing_class
        found: Iterator[list[int]] = (
            encode_prompt_text(tokenizer, read_text(row["prompt"]), options=template_options(row))
            for row in rows
            if "prompt" in row
        )
        return max(map(len, found), default=64)

    # What a script does ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | None = None) -> dict[str, Any]:
        """Trains, or goes on from the newest checkpoint of output_dir; returns the summary.

        Args:
            resume_from_checkpoint: None and True go on, False demands that there is nothing; TRL's path of a checkpoint
                is refused, because an older one would draw again what was spent.
        """
        if isinstance(resume_from_checkpoint, str):
            raise DPAlignError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: a run goes on from its newest checkpoint, which "
                "is found in output_dir; pass True, or nothing."
            )
        return self._trainer.train(resume_from_checkpoint)

    @property
    def model(self) -> Any:
        """The trained policy, as plain peft loads it."""
        return self._trainer.model

    @property
    def privacy(self) -> dict[str, Any]:
        """The privacy statement of what was trained."""
        return self._trainer.privacy

    @property
    def summary(self) -> dict[str, Any] | None:
        return self._trainer.summary

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes adapter, tokenizer, card and privacy statement; by default where TRL does, beside private/."""
        self._trainer.save_model(str(output_dir or self.args.output_dir or OUTPUT))

    def generate_completions(self, sampling: bool = False) -> None:
        """Prints some completions of eval_dataset, that train() left: of the model as it was, and as it is."""
        file = Path(str(self.args.output_dir or OUTPUT)) / "completions.json"
        if not file.is_file():
            return  # no eval_dataset, as in TRL
        for number, row in enumerate(json.loads(file.read_text(encoding="utf-8"))):
            if sampling and number >= 5:
                break
            lines = "\n".join(f"{name:12} {printable(str(text))}" for name, text in row.items())
            Terminal().print(plain(f"{lines}\n", lines=True), soft_wrap=True)

    def push_to_hub(self, *args: Any, **options: Any) -> NoReturn:
        raise DPAlignError(
            "push_to_hub: output_dir holds private/, which is not for sharing; save_model writes a folder that is: "
            "upload that one."
        )

    # TRL 0.11's loop, of which nothing can be private ----------------------------------------------------------------

    @property
    def dataloader(self) -> NoReturn:
        raise DPAlignError(f"dataloader: {THE_LOOP}.")

    def generate(self, *args: Any, **options: Any) -> NoReturn:
        raise DPAlignError(f"generate: {THE_LOOP}.")

    def step(self, *args: Any, **options: Any) -> NoReturn:
        raise DPAlignError(f"step: {THE_LOOP}.")


def _one_of(given: Any, older: Any, name: str, kind: type) -> Any:
    """An argument by the name that it has in this TRL, or had in an older one."""
    value = older if given is None else given
    if not isinstance(value, kind):
        raise DPAlignError(
            f"{name} must be a {kind.__name__} of {kind.__module__}, and it is a {type(value).__name__}."
        )
    return value


def _refuse_parts(args: PPOConfig, value_model: Any, collator: Any, optimizers: tuple[Any, Any]) -> None:
    if value_model is not None:
        raise DPAlignError(
            "value_model cannot be honoured: the value is a head on the policy's own body here, as in TRL 0.11, so "
            "that one clip bounds both; leave value_model out."
        )
    if collator is not None and not isinstance(collator, DataCollatorWithPadding):
        raise DPAlignError("data_collator cannot be honoured: prompts are padded to one constant length; leave it out.")
    if any(optimizers):
        raise DPAlignError(
            "optimizers cannot be honoured: the optimizer is AdamW with the settings of args; leave it out."
        )


# Privacy -------------------------------------------------------------------------------------------------------------


def _open(args: PPOConfig, scored: Scored) -> Privacy:
    """A run without privacy: recorded under its folder's name, so that nothing private is ever built on it."""
    return Privacy(
        target_epsilon=math.inf,
        dataset_name=Path(str(args.output_dir or OUTPUT)).resolve().name,
        model_is_public=True,
        reward_is_public=not is_reward_model(scored.config),
        eval_is_public=True,
        reward_range=None if is_reward_model(scored.config) else SCORES,
    )


def _clipped(section: Settings, args: PPOConfig, privacy: Privacy) -> Settings:
    """The settings of a private run: every row's gradient is clipped to `max_grad_norm`."""
    if privacy.target_epsilon == math.inf or privacy.noise_multiplier == 0:
        return section
    return replace(section, clipping="automatic", max_grad_norm=args.max_grad_norm or 1.0)
