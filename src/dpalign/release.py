"""The release folder: adapter, tokenizer, card and privacy statement. Nothing else is for sharing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCardData

from .errors import DPAlignError
from .evaluation import TextEvaluation
from .files import replace_folder, write_json, write_text
from .models import Normalization, Policy, RewardModel
from .models.bases import told
from .models.prompt_format import PROMPTS_FILE, PromptFormat, prompt_format_of
from .models.quantized import as_python
from .models.verify import check_release
from .printable import code_span
from .privacy.statement import PrivacyStatement
from .reporting.numbers import all_runs, at_most, attacks
from .settings.models import TINY_REVIEW_LM

NOT_COVERED, BOUGHT = "## What the guarantee does not cover\n", "## What the private data bought\n"
MEASURED = "## What it was measured to be worth\n"
RELEASE, REWARD_MODEL = "release", "reward_model"  # folders of a run that are for sharing
EMBEDDED = "The base comes with dpalign: it is the folder `dpalign/assets/tiny-review-lm` of the package."
FOLDER = "The base was a folder of that name: put the same model there, or give its path."

# Whatever a stranger's statement, a data set or a path may have named is code: nothing in it is markup.
CARD = """\
---
{{ front_matter }}---
# {{ title | code }}

{% if statement.private and not statement.stages -%}
This adapter was trained with dpalign **on no private data**: nothing was drawn and nothing was spent.
{%- elif statement.private -%}
This adapter was trained with dpalign under **({{ statement.epsilon | at_most }}, {{ "%.3g"|format(statement.delta) }})
differential privacy**: adding or removing all data of any one {{ units | code }} changes the probability of any
outcome, this adapter included, by at most a factor e^epsilon, except for a delta.
{{ statement.attack_success | attacks }}
{%- else -%}
**NOT PRIVATE.** At least one stage of this adapter was trained without a guarantee (no noise, or a known seed).
{%- endif %}

| stage | dataset | unit | units (declared) | epsilon alone | sampling rate | noise multiplier | steps | passes | C |
|---|---|---|---|---|---|---|---|---|---|
{% for stage in statement.stages %}{% for m in stage.mechanisms -%}
| {{ stage.stage | code }} | {{ stage.dataset | code }} | {{ stage.unit | code }} | \
{{ "%g"|format(stage.declared_units) }} | \
{{ stage.epsilon_alone | float | at_most }} | {{ "%.5f"|format(m.sampling_rate) }} | \
{{ "%.4f"|format(m.noise_multiplier) }} | {{ "%d"|format(m.steps) }} | {{ "%d"|format(m.passes) }} | \
{{ stage.max_grad_norm | float }} |
{% endfor %}{% endfor %}
Accountant: {{ statement.accountant }}; numbers to recompute it are in `privacy.json`.
{% if heldout %}
{{ heldout }}
{% endif %}
{% for entry in statement.ledger -%}
The ledger knows {{ entry.runs }} run(s) on {{ entry.dataset | code }}, together {{ entry | all_runs | code }} \
at delta {{ "%.3g"|format(entry.delta) }}\
{% if entry.runs_without_privacy %}; {{ entry.runs_without_privacy }} of them ran WITHOUT privacy, and whatever was \
published from those is not covered{% endif %}\
{% if entry.demo_data %} (demo data: public text playing private){% endif %}.
{% endfor %}
{% if statement.assumptions %}Assumptions:
{% for line in statement.assumptions %}- {{ line | code }}
{% endfor %}{% endif %}
## What the guarantee does not cover
{% for line in statement.not_covered %}- {{ line }}
{% endfor %}
## Use
```python
from peft import PeftModel
from transformers import {{ auto_class }}, AutoTokenizer{{ ", BitsAndBytesConfig" if "BitsAndBytes" in options }}

base = {{ auto_class }}.from_pretrained({{ base_model | tojson }}{{ options }})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{% if where_base -%}
{{ where_base }}
{% endif -%}
{% if asked_with -%}
It has learned to be asked with {{ asked_with | code }} in front of the prompt (`prompts.json`); `dpalign generate` and
`evaluate` do so by themselves.
{% endif -%}
{% if pooling == "layers" -%}
This model is no classifier (its logit is 0): a text's score is linear in what several layers say of it, with the \
weights in `reward.safetensors`. `reward.json` names the layers (of the ones the mean over all tokens but the first is \
read, of the others the last token), the public scores that are added, how a text is tokenised, and the constants that \
bring scores to mean 0 and standard deviation 1 on the SFT model's own text. As the reward of a dpalign recipe:
`reward: {source: "reward_model:path/to/this/folder"}`; its stages then join that run's statement.
{% elif auto_class == "AutoModelForSequenceClassification" -%}
The score of a text is the model's only logit{% if pooling == "mean" %}, but averaged over all tokens \
instead of read at the
last one: `model.base_model.model.score(hidden_states).squeeze(-1)`, mean over the text{% endif %}; \
how a text is tokenised, and the constants that bring scores to mean 0 and
standard deviation 1 on the SFT model's own text, are in `reward.json`. As the reward of a dpalign recipe:
`reward: {source: "reward_model:path/to/this/folder"}`; its stages then join that run's statement.
{% endif -%}
"""


def as_trained(models: Sequence[str], prepend_bos: bool | None) -> bool:
    """Whether prompts get a BOS: what is asked for, or else what the releases among the models say of themselves.

    Raises:
        DPAlignError: they differ.
    """
    if prepend_bos is not None:
        return prepend_bos
    said = {model: found.prepend_bos for model in models if (found := prompt_format_of(model)) is not None}
    if len(set(said.values())) > 1:
        with_bos = [model for model, yes in said.items() if yes]
        raise DPAlignError(
            f"{', '.join(with_bos)} was trained with BOS in front of prompts, another one was not: say --prepend_bos "
            "or --no-prepend_bos for all."
        )
    return any(said.values())


def write_release(
    folder: Path,
    policy: Policy,
    statement: PrivacyStatement,
    base_model: str,
    title: str,
    prompts: PromptFormat,
    texts: Mapping[str, TextEvaluation] | None = None,
) -> None:
    """Writes the release folder in one move: the old one or the whole new one.

    Args:
        texts: how well the base model, and the policy after each stage, predict public texts, if that was measured.

    Raises:
        DPAlignError: plain peft makes something else of it than what was trained; the old one stays.
    """
    with replace_folder(folder) as temporary:
        policy.save_adapter(temporary, told(base_model))
        check_release(policy, temporary, base_model)
        write_json(temporary / PROMPTS_FILE, asdict(prompts))
        options = {"auto_class": "AutoModelForCausalLM", "options": as_python(policy.quantization), "pooling": ""}
        _describe(temporary, statement, base_model, title, texts, asked_with=prompts.asked_with, **options)


def write_reward_model(
    folder: Path,
    model: RewardModel,
    statement: PrivacyStatement,
    base_model: str,
    title: str,
    normalization: Normalization,
) -> None:
    """Writes a reward model as a release of its own, in one move.

    Raises:
        DPAlignError: plain peft makes something else of it than what was trained; the old one stays.
    """
    with replace_folder(folder) as temporary:
        model.save(temporary, told(base_model), normalization)
        check_release(model, temporary, base_model)
        _describe(
            temporary,
            statement,
            base_model,
            title,
            None,
            asked_with="",
            auto_class="AutoModelForSequenceClassification",
            options=f", num_labels=1{as_python(model.quantization)}",
            pooling=model.text.pooling,
        )


def say_in_card(folder: Path, sentences: Sequence[str], title: str = BOUGHT) -> None:
    """Puts a section into a release's card, what a comparison says, say, in place of what it said before."""
    before, heading, rest = (folder / "README.md").read_text(encoding="utf-8").partition(NOT_COVERED)
    lines = "".join(f"- {code_span(sentence)}\n" for sentence in sentences)
    card = f"{before.partition(title)[0]}{title}{lines}\n{heading}{rest}"
    write_text(folder / "README.md", card)
    (folder / "README.md").chmod(0o644)


def heldout_line(measured: Mapping[str, TextEvaluation]) -> str:
    """What the models' loss on public texts is, in one line of Markdown; nothing where it was not measured."""
    if not measured:
        return ""
    losses = [f"{code_span(name)} {_with_interval(found)}" for name, found in measured.items()]
    count = next(iter(measured.values())).text_records
    said = f"Held-out loss on {count:,} public texts, in nats per token (± is a 95% interval over texts)"
    return f"{said}: {', '.join(losses)}."


def _with_interval(found: TextEvaluation) -> str:
    half = "" if math.isnan(found.text_loss_ci95) else f" ± {found.text_loss_ci95:.3f}"
    return f"{found.text_loss:.3f}{half}"


def _describe(
    folder: Path,
    statement: PrivacyStatement,
    base_model: str,
    title: str,
    measured: Mapping[str, TextEvaluation] | None,
    **texts: str,
) -> None:
    base_model = told(base_model)
    write_json(folder / "privacy.json", statement.as_dict())
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined)
    environment.filters |= {"at_most": at_most, "all_runs": all_runs, "attacks": attacks, "code": code_span}
    about = ModelCardData(
        base_model=base_model,
        library_name="peft",
        pipeline_tag="text-generation" if texts["auto_class"] == "AutoModelForCausalLM" else "text-classification",
        tags=["differential-privacy", "dpalign", "lora"],
        differential_privacy={
            "private": statement.private,
            "epsilon": str(statement.epsilon),
            "delta": statement.delta,
        },
    )
    # Not its own to_yaml, which writes what turns text around as it is.
    metadata = about.to_dict()  # type: ignore[no-untyped-call]
    front_matter = yaml.safe_dump(metadata, sort_keys=False, width=math.inf)
    units = " or ".join(sorted({s.unit for s in statement.stages})) or "unit"
    fields: dict[str, Any] = {"statement": statement, "base_model": base_model, "title": title, "units": units}
    fields["where_base"] = EMBEDDED if base_model == TINY_REVIEW_LM else FOLDER if base_model.startswith("./") else ""
    fields["heldout"] = heldout_line(measured or {})
    card = environment.from_string(CARD).render(front_matter=front_matter, **fields, **texts)
    write_text(folder / "README.md", card)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
