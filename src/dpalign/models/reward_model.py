"""The reward model: a sequence classifier with one output on stacked adapters.

A causal LM becomes one by a linear layer on the last token's hidden state (Wu et al. 2024, section 3.2), which is
what transformers' `AutoModelForSequenceClassification` builds; a sequence-classification model gets a new head.
It reads text and has its own tokenizer, which need not be the policy's. With pooling `layers` it is linear in what
several layers say of a text, and may add scores that need nobody's data: no sequence classifier, so only dpalign reads
its release.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..data.text import Text, encode_text
from ..domains import check_settings, within
from ..errors import DPAlignError
from ..files import write_json
from ..settings.models import LAYERS, ModelConfig, TextFormat
from . import embedded
from .features import maps_of, maps_read
from .kernels import chunks
from .loading import check_weights, load_adapter, loaded, positions_of, refuse_missing
from .lora import check_layers
from .objects import Given
from .policy import Policy
from .precision import settled
from .quantized import copied, is_quantized, settings_of
from .sharded import refuse_nan, share_shards
from .stack import AdapterStack, load_pretrained

FORMAT_FILE, WEIGHTS_FILE = "reward.json", "reward.safetensors"


def encode_as(how: TextFormat, tokenizer: Any, text: Text, options: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of one text, the same wherever it comes from: a record, or a completion of the policy's."""
    ids = encode_text(tokenizer, text, prepend_bos=how.prepend_bos, append_eos=how.append_eos, options=options)
    return ids[-how.max_length :]


@dataclass(frozen=True)
class Normalization:
    """Reward = scale * score + shift; constants from public text or a DP release's own text, never private text."""

    scale: float = within(1.0, "(0, 1e30]")
    shift: float = within(0.0, "[-1e30, 1e30]")


class FreeScores(Protocol):
    """Public scores of texts, that a reward model may add to its own."""

    @property
    def count(self) -> int:
        """How many scores a text has."""

    def scores(self, texts: Sequence[Text]) -> Tensor:
        """`(texts, count)` float32 on the CPU; NaN for a text that cannot be scored."""

    def kept(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it takes to load them again: as JSON, and constants."""


class RewardModel(AdapterStack):
    """Scores `(rows,)` of texts; the head is float32 whatever the base's dtype.

    reading: the head on several layers, with pooling `layers`. free, free_head: public scores, and their weights.
    """

    auto_class = AutoModelForSequenceClassification
    auto_options: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: TextFormat | None = None):
        super().__init__(base, tokenizer)
        self.reading: Any = None
        self.free: FreeScores | None = None
        self.free_head: nn.Linear | None = None
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            config.pad_token_id = tokenizer.pad_token_id  # transformers finds the last token of a text by it
        heads = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if not heads:
            raise DPAlignError(f"{type(base).__name__} has no linear head of one output: a reward model needs one.")
        self.head_name = heads[-1]
        self.excluded = [self.head_name]  # it is trained itself
        self.text = text or TextFormat()
        if self.text.append_eos and tokenizer.eos_token_id == tokenizer.pad_token_id:
            raise DPAlignError("append_eos needs a padding token other than EOS: transformers would not see that EOS.")
        head = base.get_submodule(self.head_name)
        head.float().register_forward_pre_hook(_widen)
        self._whole_head: Any = None  # while votes are cast in a few directions of what it reads
        self._free_share = 1.0  # that a public score has of a vote
        refuse_nan(base, self.shards)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        device: str | torch.device = "cpu",
        text: TextFormat | None = None,
        given: Given | None = None,
    ) -> RewardModel:
        """A new head on a public model or a release, or the reward model of a release with its head.

        Raises:
            DPAlignError: the folder or dtype is wrong.
        """
        config, options = settled(config, device), {"num_labels": 1, "ignore_mismatched_sizes": True}
        base, tokenizer, adapter, missing = load_pretrained(
            AutoModelForSequenceClassification, config, device, given, **options
        )
        model = cls(base, tokenizer, text)
        model.quantization = settings_of(config.quantization, config.dtype)
        refuse_missing(config.name_or_path, [n for n in missing if not n.startswith(f"{model.head_name}.")])
        model.reset_head()
        if adapter is None:
            return model
        lora = loaded("an adapter", adapter, lambda: LoraConfig.from_pretrained(adapter))
        model._refuse_saved_modules(adapter, lora.modules_to_save or [])
        lora.task_type = lora.modules_to_save = None
        model.model = load_adapter(base, adapter, config=lora)
        check_layers(model.model, "earlier")
        model.adapters.append("earlier")
        model.requires_grad_(False)
        model.eval()
        if (Path(adapter) / FORMAT_FILE).exists():
            loaded("a reward model", adapter, lambda: model._take_head(Path(adapter)))
            check_weights(model, f"the reward model {adapter}")
        return model

    def _take_head(self, release: Path) -> None:
        """The head and the text's format of a released reward model."""
        try:
            value = json.loads((release / FORMAT_FILE).read_text(encoding="utf-8"))
            text = TextFormat(**value["text"])
            check_settings(text, f"{release / FORMAT_FILE}: text")
            if text.max_length > (positions_of(self.model.config) or text.max_length):
                raise ValueError
            self.text = text
            if self.reading is not None:
                self._take_weights(value, load_file(release / WEIGHTS_FILE))
                return
            saved = load_file(release / "adapter_model.safetensors")
            with torch.no_grad():
                for name, p in self.head.named_parameters():
                    p.copy_(saved[f"base_model.model.{self.head_name}.{name}"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
            raise DPAlignError(f"{release} is not the release of this reward model (its head or format).") from None

    @torch.no_grad()
    def _take_weights(self, value: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
        """Of a head on several layers, and of free scores; raises ValueError for other layers than are read here."""
        if value["layers"] != self._layers():
            raise ValueError
        self.head.weight.copy_(saved["layers"].reshape(1, -1))
        if "free" in saved:
            self.free_head = self._head_of(len(saved["free"]))
            self.free_head.weight.copy_(saved["free"].unsqueeze(0))

    @classmethod
    def from_policy(cls, policy: Policy, text: TextFormat | None = None) -> RewardModel:
        """A new head on the policy's body and adapters; the frozen weights are shared, not copied.

        Raises:
            DPAlignError: transformers has no sequence classifier of this architecture.
        """
        causal = policy.model.get_base_model() if policy.adapters else policy.model
        config = AutoConfig.for_model(**{**causal.config.to_dict(), "num_labels": 1})
        try:
            with torch.device("meta"):
                base = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
                    config, dtype=causal.dtype
                )
        except ValueError:
            raise DPAlignError(
                f"transformers has no sequence classifier for {type(causal).__name__}: name another model in "
                "reward_model.model."
            ) from None
        if is_quantized(causal):
            setattr(base, base.base_model_prefix, copied(causal.base_model))
        else:
            body = causal.base_model.state_dict().items()
            plain = {k.replace(".base_layer.", "."): v for k, v in body if ".lora_" not in k}
            base.base_model.load_state_dict(plain, assign=True, strict=True)
            _fill_buffers(base, causal)
            share_shards(base, causal)
        head = [m for m in base.modules() if isinstance(m, nn.Linear) and m.out_features == 1][-1]
        head.to_empty(device=causal.device)
        head.requires_grad_(False)
        for p in head.parameters():
            p.zero_()
        model = cls(base, policy.tokenizer, text)
        model.quantization = policy.quantization
        model.reset_head()
        if policy.adapters:
            model.copy_adapters(policy)
        return model

    @property
    def classifier(self) -> Any:
        """The sequence classifier under the adapters."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def text(self) -> TextFormat:
        """How it reads a text."""
        return self._text

    @text.setter
    def text(self, text: TextFormat) -> None:
        self._text = text
        if text.pooling != LAYERS:
            self.reading = None
        elif self.reading is None:
            width = self.model.config.get_text_config().hidden_size
            self.reading = self._head_of(sum(map(len, maps_read(self))) * width)

    def read_as(self, text: TextFormat) -> None:
        """Has a release read texts in another way.

        Raises:
            DPAlignError: it is linear in several layers, and shall be a classifier.
        """
        if self.reading is not None and text.pooling != LAYERS:
            raise DPAlignError(
                f"a reward model with pooling {LAYERS} cannot be trained further with pooling {text.pooling}: start "
                "from the model that it was made on."
            )
        self.text = text

    def _head_of(self, inputs: int) -> nn.Linear:
        """One output, zero, frozen."""
        head = nn.Linear(inputs, 1, bias=False, device=self.device)
        head.requires_grad_(False)
        head.weight.zero_()
        return head

    def _layers(self) -> dict[str, list[int]]:
        """What is read with pooling `layers`, for reward.json."""
        means, lasts = maps_read(self)
        return {"mean": means, "last": lasts}

    @property
    def head(self) -> Any:
        return self.classifier.get_submodule(self.head_name) if self.reading is None else self.reading

    def _put_head(self, head: Any) -> None:
        if self.reading is None:
            self.classifier.set_submodule(self.head_name, head)
        else:
            self.reading = head

    @property
    def layers_read(self) -> list[int]:
        means, lasts = maps_read(self)
        return [] if self.reading is None else sorted({*means, *lasts})

    def heads(self) -> list[nn.Linear]:
        return [self.head, *([] if self.free_head is None else [self.free_head])]

    def _refuse_saved_modules(self, folder: str, names: Collection[str]) -> None:
        """Raises DPAlignError for an adapter that has trained more than the head: that would be dropped."""
        found = [n for n, _ in self.classifier.named_modules() if any(f".{n}".endswith(f".{name}") for name in names)]
        more = [name for name in found if name != self.head_name]
        if more:
            raise DPAlignError(
                f"the adapter in {folder} is no plain LoRA: modules_to_save ({', '.join(more)}) would be used and then "
                "be missing in the release; merge it into its base with peft, save that, and pass that folder."
            )

    def reset_head(self) -> None:
        """Zero: all texts score alike at first, so there is no random score to unlearn under noise."""
        with torch.no_grad():
            for head in (self.classifier.get_submodule(self.head_name), self.head):
                for p in head.parameters():
                    p.zero_()

    def train_head(self) -> None:
        """Makes the weight of the head trainable; a bias cancels in the difference of two scores and stays frozen."""
        self.head.weight.requires_grad_(True)

    # One query: the head in two steps, of which the first is fixed ------------------------------------------------

    @property
    def maps(self) -> int:
        """Layers that the head reads at once."""
        return 1 if self.reading is None else sum(map(len, maps_read(self)))

    @property
    def features_width(self) -> int:
        """What the head reads of a token, or with pooling `layers` of a text: all maps, one after the other."""
        return int((self._whole_head or self.head).in_features)

    def vote_in(self, directions: Tensor, free: FreeScores | None = None, share: float = 1.0) -> None:
        """Splits the head until its stage is finished: fixed `(count, width)` directions, trainable zero weights.

        Args:
            free: public scores that have weights of their own. share: what a vote in them counts for.
        """
        self.free, self._free_share = free, share
        self.free_head = None if free is None else self._head_of(free.count).requires_grad_(True)
        self._whole_head = self.head
        count, width = directions.shape
        fixed, votes = nn.Linear(width, count, bias=False), nn.Linear(count, 1, bias=False)
        split = nn.Sequential(OrderedDict(directions=fixed, votes=votes)).to(self._whole_head.weight.device)
        split.requires_grad_(False)
        split.register_forward_pre_hook(_widen)
        self._put_head(split)
        with torch.no_grad():
            fixed.weight.copy_(directions)
            votes.weight.zero_()
        votes.weight.requires_grad_(True)

    @torch.no_grad()
    def set_directions(self, directions: Tensor) -> None:
        """Others, `(count, width)`, in a head that was split."""
        self.head.directions.weight.copy_(directions)

    @torch.no_grad()
    def finish_stage(self) -> None:
        if self._whole_head is not None:
            split, whole = self.head, self._whole_head
            whole.weight.copy_(split.votes.weight @ split.directions.weight)
            if whole.bias is not None:
                whole.bias.zero_()
            self._put_head(whole)
            self._whole_head = None
            if self.free_head is not None:
                self.free_head.weight.mul_(self._free_share)
            self._free_share = 1.0
        if self.reading is None:  # plain transformers hold a classifier's head in the base's dtype
            for p in self.head.parameters():
                p.copy_(p.to(self.model.dtype))
        super().finish_stage()

    @torch.no_grad()
    def features(
        self, texts: Sequence[Text], options: Sequence[Mapping[str, Any]] | None = None, rows_at_once: int = 64
    ) -> Tensor:
        """`(texts, width)` float32 on the CPU: what the head reads of each text, pooled as its scores are.

        Args:
            options: as in `encode`, one a text.
        """
        head, width = self.head, self.features_width
        identity = nn.Identity()
        identity.register_forward_pre_hook(_widen)
        self._put_head(identity)
        try:
            encoded = [self.encode(text, o) for text, o in zip(texts, options or [{}] * len(texts), strict=True)]
            parts = [
                self._read(*self.pad([encoded[i] for i in chunk]))[:count].cpu()
                for chunk, count in chunks(len(texts), rows_at_once)
            ]
        finally:
            self._put_head(head)
        return torch.cat(parts) if parts else torch.zeros(0, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, free: Tensor | None = None) -> Tensor:
        """Scores `(rows,)` float32 of right-padded `(rows, length)` ids; with `free`, `(rows, count)`, of both."""
        scores = self._read(input_ids, attention_mask)[:, 0]
        if self.free_head is None or free is None:
            return scores
        added: Tensor = self.free_head(self._free_share * free.to(scores.device))
        return scores + added[:, 0]

    def _read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`(rows, outputs)` of the head, pooled."""
        if self.reading is not None:
            read: Tensor = self.head(maps_of(self, input_ids, attention_mask).flatten(1))
            return read
        if self.text.pooling == "last":
            logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            return logits
        hidden: Tensor = self.classifier.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        scores: Tensor = self.head(hidden)  # (rows, length, outputs)
        return (scores * attention_mask.unsqueeze(2)).sum(1) / attention_mask.sum(1, keepdim=True)

    def encode(self, text: Text, options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of one text, at most `text.max_length` (its last ones).

        Args:
            options: a record's `template_options`.
        """
        return encode_as(self.text, self.tokenizer, text, options)

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Right-pads token lists to `(rows, max_length)` ids and mask: a length taken from the data would show."""
        ids = torch.full((len(rows), self.text.max_length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def score(
        self,
        texts: Sequence[Text],
        options: Sequence[Mapping[str, Any]] | None = None,
        rows_at_once: int = 64,
        free: Tensor | None = None,
    ) -> Tensor:
        """Scores `(rows,)` of texts, each by itself; `options` as in `encode`, one a text.

        Args:
            free: `free_scores` of the texts, where they are known already.

        Raises:
            DPAlignError: it adds free scores, and nobody has loaded them.
        """
        encoded = [self.encode(text, o) for text, o in zip(texts, options or [{}] * len(texts), strict=True)]
        free = self.free_scores(texts) if free is None else free
        parts = [
            self(*self.pad([encoded[i] for i in chunk]), None if free is None else free[chunk])[:count].cpu()
            for chunk, count in chunks(len(texts), rows_at_once)
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def free_scores(self, texts: Sequence[Text], rows_at_once: int = 32) -> Tensor | None:
        """`(texts, count)` float32 on the CPU, always so many texts at once; None if it adds none.

        Raises:
            DPAlignError: nobody has loaded them.
        """
        if self.free_head is None:
            return None
        if self.free is None:
            raise DPAlignError("this reward model adds scores that need nobody's data: load it as a reward.")
        parts = [
            self.free.scores([texts[i] for i in chunk])[:count] for chunk, count in chunks(len(texts), rows_at_once)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self.free.count)

    def save(self, folder: Path, base_model: str, normalization: Normalization) -> None:
        """Adapter and head as a peft SEQ_CLS adapter that plain peft loads on the base, tokenizer, and reward.json.

        Of pooling `layers` the classifier's own head is zero, and reward.safetensors has the weights.
        """
        self.save_adapter(folder, base_model)
        file = folder / "adapter_model.safetensors"
        own = self.classifier.get_submodule(self.head_name)
        head = {f"base_model.model.{self.head_name}.{n}": p.detach().cpu() for n, p in own.named_parameters()}
        save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, config | {"task_type": "SEQ_CLS", "modules_to_save": [self.head_name]})
        described = {"text": asdict(self.text), "normalization": asdict(normalization)}
        if self.reading is not None:
            described |= self._save_weights(folder / WEIGHTS_FILE)
        write_json(folder / FORMAT_FILE, described)

    def _save_weights(self, file: Path) -> dict[str, Any]:
        """Writes weights `layers` `(maps, width)` and `free` `(count,)` with its constants; says what they are of."""
        tensors = {"layers": self.head.weight.detach().cpu().reshape(self.maps, -1)}
        described: dict[str, Any] = {"layers": self._layers()}
        if self.free is not None and self.free_head is not None:
            tensors["free"] = self.free_head.weight.detach().cpu()[0]
            described["free"], constants = self.free.kept()
            tensors |= {f"free.{name}": value for name, value in constants.items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
        return described


def is_classifier(config: ModelConfig) -> bool:
    """Whether a model that can be read here is a sequence classifier, and so no policy."""
    try:
        known = AutoConfig.from_pretrained(
            embedded.resolve(config.name_or_path), trust_remote_code=config.trust_remote_code
        )
    except Exception:
        return False  # a release, a short name, or something whose loading will say what is wrong
    return any(name.endswith("ForSequenceClassification") for name in known.architectures or [])


def normalization_of(folder: Path) -> Normalization:
    """The constants that a released reward model carries.

    Raises:
        DPAlignError: the folder is no reward model's release.
    """
    try:
        value = json.loads((folder / FORMAT_FILE).read_text(encoding="utf-8"))
        normalization = Normalization(**value["normalization"])
        check_settings(normalization)
        return normalization
    except (OSError, ValueError, KeyError, TypeError, DPAlignError):
        raise DPAlignError(f"{folder} is not the release of a reward model (it has no valid {FORMAT_FILE}).") from None


def _widen(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden = arguments[0]
    return (hidden.to(torch.promote_types(hidden.dtype, torch.float32)),)


def _fill_buffers(base: PreTrainedModel, causal: PreTrainedModel) -> None:
    # Buffers that no checkpoint holds (rotary frequencies) are still on the meta device.
    theirs = dict(causal.base_model.named_buffers())
    for name, buffer in list(base.base_model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            base.base_model.get_submodule(owner)._buffers[leaf] = theirs[name]
