"""Every command, recipe and Python block of README.md and docs/ runs, small; one that is new and not listed here fails.

A document is followed from top to bottom in a folder of its own, with self-written data and a small model in place of the
reader's. A command inside a sentence is run for the first document that has it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

from chats import model_folder
from dpalign import cli, sweep
from dpalign.parsing import recipe_from
from dpalign.stages import STAGES
from helpers import judged, reviews, write_jsonl, write_recipe
from reader import ROOT, at_home, run_here, small_model, write_gzip
from test_benchmarks import SMOKE

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


# What a document holds -----------------------------------------------------------------------------------------------

PROGRAM = re.compile(r"(dpalign|python|make|pip) |(benchmarks|examples)/\w+\.py")


@dataclass(frozen=True)
class Piece:
    """kind: "command", "python" or "yaml"."""

    kind: str
    text: str
    in_sentence: bool = False


def command(text: str) -> str | None:
    """A command as the lists below name it, or None if it is something else."""
    words = re.sub(r"\s+#.*", "", " ".join(text.replace("\\\n", " ").split())).removeprefix("$ ")
    words = words.removeprefix(".venv/bin/")
    if not PROGRAM.match(words):
        return None
    return words if words.split()[0] in ("dpalign", "python", "make", "pip") else f"python {words}"


def pieces(text: str) -> Iterator[Piece]:
    """Commands (of blocks, and in sentences), Python blocks and recipes, in their order."""
    for part in re.split(r"^(```\w*\n.*?^```)$", text, flags=re.DOTALL | re.MULTILINE):
        fence = re.fullmatch(r"```(\w*)\n(.*?)```", part, re.DOTALL)
        if fence and fence[1] in ("python", "yaml"):
            yield Piece(fence[1], fence[2])
            continue
        for given in fence[2].replace("\\\n", " ").splitlines() if fence else re.findall(r"`([^`]+)`", part):
            if found := command(given):
                yield Piece("command", found, in_sentence=not fence)


def followed() -> dict[Path, list[Piece]]:
    """What is done for each document."""
    done: set[Piece] = set()
    todo = {}
    for document in DOCUMENTS:
        todo[document] = [p for p in pieces(document.read_text(encoding="utf-8")) if p not in done]
        done |= {piece for piece in todo[document] if piece.in_sentence}
    return {document: found for document, found in todo.items() if found}


# How each is run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """What is appended to a command, what stands for its placeholders, and what it must leave or say."""

    more: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    leaves: str = ""
    says: str = ""


QUICK = (
    "--model.name_or_path little --model.is_public true --eval_prompts 4 --sft.expected_batch_size 4 --sft.max_steps 1 "
    "--sft.micro_batch_size 4 --ppo.expected_batch_size 4 --ppo.max_steps 1 --ppo.micro_batch_size 4 "
    "--sft.adapter.init_rows 16 --ppo.adapter.init_a random"  # a reward says nothing of what a model of random weights writes
)
# A model with one token a byte that chats stands for SmolLM2, and eight short texts for those that show a contrast.
QUICK_SMOLLM2 = (
    "--eval_prompts 4 --eval_best_of 2 --split null --reward_query.own_texts 24 --reward_query.directions 4 "
    "--reward_query.max_length 16 --reward_query.micro_batch_size 4 --reward_query.free "
    "'[{source: vader}, {source: contrast, wanted: a, unwanted: b, written_texts: 8, written_tokens: 6, max_length: 12}]' "
    "--dpo.max_prompt_length 200 --dpo.max_completion_length 6 --dpo.expected_batch_size 2 --dpo.max_steps 1 "
    "--dpo.num_generations 2 --dpo.micro_batch_size 2"
)
RUN = {
    "dpalign COMMAND --help": Small(instead={"COMMAND": "ppo"}, says="explained by --ppo.help"),
    "dpalign quickstart": Small(QUICK, leaves="runs/quickstart/report.html"),
    "dpalign quickstart --model smollm2": Small(QUICK_SMOLLM2, leaves="runs/quickstart-smollm2/judged.png"),
    "dpalign quickstart --model smollm2 --compare": Small(
        f"{QUICK_SMOLLM2} --output_dir runs/beside_smollm2", leaves="runs/beside_smollm2/completions_to_read.json"
    ),
    "dpalign run recipes/quickstart_private_prompts.yaml --output_dir runs/x --ppo.FIELD VALUE ...": Small(
        f"{QUICK} --output_dir runs/changed", {"--ppo.FIELD VALUE ...": "--ppo.beta 0.05"}, "runs/changed/release"
    ),
    "dpalign run recipes/quickstart_private_prompts.yaml --sft.adapter '{r: 1, freeze_a: true, target_modules: all-linear, init_a: activations, "
    "init_rows: 256}' --sft.learning_rate 5e-3 --sft.max_steps 16 --ppo.beta 0.045 --ppo.max_steps 32 "
    "--ppo.adapter.init_rows 512": Small(
        f"{QUICK} --output_dir runs/stronger",
        {" --sft.max_steps 16": "", " --ppo.max_steps 32": "", " --ppo.adapter.init_rows 512": "", "256": "16"},
        "runs/stronger/release",
    ),
    "dpalign sft recipes/quickstart.yaml --data.path demo:movie-snippets/private --data.eval_path demo:movie-snippets/public --sft.adapter "
    "'{kind: full, r: 4, freeze_a: false, init_a: random, init_rows: 1024}' --sft.learning_rate 3e-3 --sft.micro_batch_size 64 "
    "--model.dtype float32 --output_dir runs/whole": Small(
        "--model.name_or_path little --model.is_public true --eval_prompts 4 --sft.expected_batch_size 4 --sft.max_steps 1 --sft.micro_batch_size 4",
        leaves="runs/whole/release",
    ),
    # Plans
    "dpalign plan --units 12500 --batch_size 512 --steps 60 --epsilon 4": Small(
        "--units 100 --batch_size 20 --steps 2 --json", says="noise_multiplier"
    ),
    "dpalign plan --units N --batch_size B --steps T --delta D --noise_multiplier S": Small(
        "", {" N": " 100", " B": " 20", " T": " 2", " D": " 1e-5", " S": " 2.0"}, says="epsilon"
    ),
    "dpalign plan --units 12500 --batch_size 256 --steps 4883 --delta 4e-5 --epsilon 4 --passes T": Small(
        "--json", {" T": " 2"}, says='"noise_multiplier": 2.2865'
    ),
    "dpalign plan --units 10000000 --batch_size 4096 --steps 2441 --delta 1e-8 --epsilon 4": Small(
        "--json", says='"noise_multiplier": 0.53635'
    ),
    "dpalign plan recipe.yaml": Small(says="ppo"),
    "dpalign plan RECIPE": Small(instead={"RECIPE": "recipe.yaml"}, says="ppo"),
    "dpalign plan RECIPE.yaml": Small(instead={"RECIPE": "recipe"}, says="ppo"),
    # Runs
    "dpalign run recipe.yaml": Small(leaves="runs/support/release/privacy.json"),
    "dpalign run RECIPE.yaml": Small(
        "--output_dir runs/again", {"RECIPE": "recipe"}, "runs/again/release/privacy.json"
    ),
    "dpalign run recipe.yaml --ppo.learning_rate 0.01": Small(
        "--output_dir runs/faster", leaves="runs/faster/release/privacy.json"
    ),
    "dpalign run recipe.yaml --report_to tensorboard": Small("--output_dir runs/board", leaves="runs/board/logs"),
    "dpalign sft recipe.yaml --output_dir runs/sft": Small(leaves="runs/sft/release/privacy.json"),
    "dpalign ppo recipe.yaml --output_dir runs/ppo --model.name_or_path runs/sft/release": Small(
        leaves="runs/ppo/release/privacy.json"
    ),
    "dpalign ppo recipe.yaml --ppo.prompts self_written --output_dir runs/free": Small(
        leaves="runs/free/release/privacy.json"
    ),
    "dpalign ppo recipe.yaml --output_dir runs/after --model.name_or_path runs/free/release": Small(
        leaves="runs/after/release/privacy.json"
    ),
    "dpalign run recipes/quickstart_preferences.yaml --eval_prompts 500 --reference_reward.source vader": Small(
        "--output_dir runs/judged", leaves="runs/judged/reward_model/privacy.json"
    ),
    "dpalign run recipes/quickstart_preferences.yaml": Small(
        leaves="runs/quickstart_preferences/reward_model/privacy.json"
    ),
    "dpalign run recipes/quickstart_private_prompts.yaml": Small(leaves="runs/quickstart_private_prompts/report.html"),
    "dpalign run recipes/quickstart_dpo.yaml": Small(leaves="runs/quickstart_dpo/release/privacy.json"),
    "dpalign run recipes/smollm2_imdb.yaml --data.path imdb_train.jsonl.gz --data.eval_path imdb_unsup.jsonl.gz "
    "--data.eval_is_public true --eval_prompts 64 --model.name_or_path ~/.cache/dpalign/smollm2-135m --model.dtype float32 "
    "--sft.max_steps 2 --sft.expected_batch_size 32 --sft.micro_batch_size 16 --ppo.max_steps 2 "
    "--ppo.expected_batch_size 32 --ppo.micro_batch_size 16 --ppo.adapter.init_rows 64": Small(
        "--ppo.adapter.init_a random", leaves="runs/smollm2_imdb/release/privacy.json"
    ),
    "dpalign run recipe.yaml --compare": Small("--output_dir runs/compared", leaves="runs/compared/free/summary.json"),
    "dpalign run recipe.yaml --audit": Small("--output_dir runs/audited", leaves="runs/audited/audit.json"),
    "dpalign sft recipe.yaml --audit": Small("--output_dir runs/audited_sft", leaves="runs/audited_sft/audit.json"),
    # Sweeps
    "dpalign sweep recipe.yaml --epsilons 4 --compare": Small(
        "--seeds 1 --output_dir runs/beside", leaves="runs/beside/sweep.png"
    ),
    "dpalign sweep RECIPE.yaml": Small(
        "--epsilons 4 --seeds 1 --output_dir runs/one", {"RECIPE": "recipe"}, "runs/one/sweep.png"
    ),
    "dpalign sweep recipe.yaml --epsilons 0 1 2:1 4 8:1 inf --seeds 3 --output_dir runs/sweep": Small(
        leaves="runs/sweep/sweep.png"
    ),
    "dpalign sweep recipe.yaml --epsilons 4 --vary ppo.num_ppo_epochs 1 2 4 8 --output_dir runs/passes": Small(
        leaves="runs/passes/sweep.png"
    ),
    "dpalign sweep recipe.yaml --epsilons 4 --public_proxy public.jsonl --vary ppo.learning_rate 2e-3 4e-3 "
    "--output_dir runs/tuning": Small(leaves="runs/tuning/sweep.png"),
    "dpalign sweep recipes/quickstart_sentiment.yaml --epsilons 1 --seeds 1 --ppo.beta 0.04 "
    "--ppo.adam_noise_correction true --output_dir runs/adambc": Small(leaves="runs/adambc/sweep.md"),
    "dpalign sweep recipes/quickstart_sentiment.yaml --epsilons 4 --seeds 1 --vary ppo.num_ppo_epochs 1 2 4 8 "
    "--ppo.max_steps 12 --ppo.num_generations 1 --output_dir runs/passes": Small(leaves="runs/passes/sweep.md"),
    "dpalign sweep recipes/quickstart_sentiment.yaml --epsilons 0 free 1 2:1 4 8:1 inf --seeds 3 --at inf ppo.beta=0.042 "
    "--at 1 ppo.beta=0.04 --output_dir runs/sentiment": Small(leaves="runs/sentiment/sweep.md"),
    "dpalign sweep recipes/quickstart_sentiment_rloo.yaml --epsilons 4 1 --seeds 1 --at 1 rloo.beta=0.04 "
    "--output_dir runs/rloo": Small(leaves="runs/rloo/sweep.md"),
    "dpalign sweep recipes/quickstart_preferences.yaml --epsilons 4 --seeds 1 --vary ppo.max_steps 1 --output_dir "
    "runs/preferences_private_steps --reference_reward.source reward_model:runs/reference/reward_model": Small(
        leaves="runs/preferences_private_steps/sweep.md"
    ),
    "dpalign sweep recipes/quickstart_preferences.yaml --epsilons 0 free 1 4 inf --seeds 3 --output_dir runs/preferences "
    "--reference_reward.source reward_model:runs/reference/reward_model": Small(leaves="runs/preferences/sweep.md"),
    # What is done with a release
    # The tutorials
    "dpalign plan letters.yaml": Small(says="rloo"),
    "dpalign run letters.yaml": Small(leaves="runs/letters/private/report.html"),
    "dpalign report runs/letters": Small(says="runs/letters/report.html"),
    'dpalign generate runs/letters/release --prompt "My parcel"': Small(says="My parcel"),
    "dpalign export runs/letters --to letters-adapter": Small(leaves="letters-adapter/privacy.json"),
    "dpalign run verdicts.yaml": Small(leaves="runs/verdicts/reward_model/privacy.json"),
    "dpalign plan --units PEOPLE --batch_size SAMPLE --steps 60 --delta 1e-5 --epsilon 4": Small(
        "--json", {"PEOPLE": "500", "SAMPLE": "50"}, says='"noise_per_update": 0.02397'
    ),
    "dpalign report runs/x --beside runs/a": Small(says="private/report.html"),
    "dpalign report RUN": Small(instead={"RUN": "runs/x"}, says="runs/x/report.html"),
    "dpalign ledger": Small(),
    "dpalign audit recipes/quickstart_private_prompts.yaml --stage sft --data.path PRIVATE.jsonl --to quickstart_audit": Small(
        "--canaries 40", {"PRIVATE.jsonl": "chats.jsonl"}, "quickstart_audit/audit.json"
    ),
    "dpalign audit recipe.yaml --to audit": Small("--stage sft --canaries 40", leaves="audit/audit.json"),
    'dpalign generate runs/x/release --prompt "The film" --prepend_bos': Small(says="The film"),
    'dpalign generate runs/x/release --prompt "The film" --prepend_bos --best_of 16 --reward vader': Small(
        "--max_completion_length 4", says="mean of 16"
    ),
    "dpalign evaluate tiny-review-lm runs/x/release --data public.jsonl --eval_is_public --prompt_tokens 5 "
    "--prepend_bos": Small("--max_completion_length 4", says="perplexity"),
    "dpalign evaluate tiny-review-lm runs/a/release runs/b/release --data public.jsonl --eval_is_public "
    "--prompt_tokens 5 --prepend_bos --baseline tiny-review-lm --output compared.json --plot compared.png": Small(
        "--max_completion_length 4", leaves="compared.png"
    ),
    "dpalign evaluate RELEASE --private": Small(
        "--dataset_name support-chats-heldout --data held_out.jsonl --epsilon 1 --max_completion_length 4 "
        "--output_dir runs/x-heldout",
        {"RELEASE": "runs/x/release"},
        "runs/x-heldout/evaluation.json",
    ),
    "dpalign export runs/support --to FOLDER": Small(instead={"FOLDER": "to_share"}, leaves="to_share/privacy.json"),
    "dpalign export runs/x --to adapter": Small(leaves="adapter/adapter_model.safetensors"),
}
# Run by other tests, under these names.
ELSEWHERE = {
    "dpalign export runs/x/release --check": "test_boundary.py::test_a_release_as_it_is_written_may_leave",
    "dpalign report runs/x --nist": "test_nist.py::test_the_numbers_are_the_runs",
    "python tools/recompute.py release/privacy.json": "test_recompute.py::test_it_is_short_and_says_by_its_exit_status_whether_the_statement_holds",
    "pip install .": "test_wheel.py::test_the_installed_command_works",
    "python examples/one_private_step.py": "test_examples.py::test_one_private_step",
    "dpalign evaluate --private": "test_provenance.py::test_a_private_measurement_states_what_it_and_the_model_spent",
}
MAKE = {
    "make docs": "python -m sphinx --fail-on-warning",
    "make quickstart": ".venv/bin/dpalign quickstart",
    "make quickstart COMPARE=1": ".venv/bin/dpalign quickstart --compare",
    "make test": ".venv/bin/python -m pytest",
    "make faults": ".venv/bin/python benchmarks/faults.py",
    "make mutants": ".venv/bin/python benchmarks/mutants.py",
    'make mutants ARGS="--files privacy/gate.py"': ".venv/bin/python benchmarks/mutants.py",
    "make bench-setup": "trl==0.11.4",
}
PYTHON = {  # by its first line: what makes it small
    "from peft import PeftModel": {},
    "from dpalign import DPSFTTrainer, Privacy, SFTConfig": {"max_steps=10": "max_steps=1", "_steps=8": "_steps=1"},
    "from dpalign import DPPPOTrainer, PPOConfig, Privacy": {
        "expected_batch_size=64, max_steps=8, max_completion_length=12": "expected_batch_size=4, max_steps=1, max_completion_length=4, micro_batch_size=4",
        "range(400)": "range(40)",
    },
    '# my_rewards.py, called as ppo.reward.source: "my_rewards:politeness" with low: 0, high: 1, is_public: true': {},
    "from dpalign import compare": {"prompt_max_tokens=5": "prompt_max_tokens=5, max_completion_length=4"},
    "from dpalign import run_sweep": {},
    "import json, random  # letters to a support desk": {},
    "import json, random  # pairs of answers and who judged them": {},
}


def smaller(recipe: str) -> str:
    """A recipe with one update on a few units in each stage, short texts and a few prompts to measure on."""
    fields = yaml.safe_load(recipe) | {"eval_prompts": 4}
    if fields.get("model", {}).get("name_or_path") == "tiny-review-lm":
        fields["model"] = {"name_or_path": "little", "is_public": True}
    if "reward_query" in fields:  # one release of all units, whatever their number
        fields["reward_query"] |= {"max_length": 32, "own_texts": 40, "directions": 4}
    for name in (STAGES.keys() & fields.keys()) - {"reward_query"}:
        stage = fields[name] = fields[name] | {"expected_batch_size": 4, "max_steps": 1, "micro_batch_size": 4}
        samples = name in ("ppo", "rloo", "grpo", "offline") or stage.get("prompts", "private") != "private"
        if not samples:
            stage |= {"max_length": 32}
            continue
        stage |= {"max_completion_length": 4}
        # a reward may say the same of all that a model of random weights writes
        stage |= {"adapter": stage["adapter"] | {"init_a": "random"}} if "adapter" in stage else {}
    return yaml.safe_dump(fields)


# The reader's folder -------------------------------------------------------------------------------------------------


def block(document: str, kind: str, start: str) -> str:
    """The block of a document that starts so."""
    found = [p.text for p in pieces((ROOT / document).read_text(encoding="utf-8")) if p.kind == kind]
    (text,) = [text for text in found if text.startswith(start)]
    return text


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A small model, a release of one stage on the embedded model, and a reference reward model."""
    folder = tmp_path_factory.mktemp("shared")
    small_model(folder / "little")
    model_folder(folder / "chatty", "smol", 512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPALIGN_LEDGER", str(folder / "ledger.sqlite"))
        patch.chdir(folder)
        at_home(folder, patch)
        write_recipe(folder, ppo=None, sft={"max_steps": 1})
        assert cli.main(["run", "recipe.yaml", "--json"]) == 0
        preferences = (ROOT / "recipes" / "quickstart_preferences.yaml").read_text(encoding="utf-8")
        (folder / "preferences.yaml").write_text(smaller(preferences), encoding="utf-8")
        words = "reward_model preferences.yaml --target_epsilon inf --reward_model.max_steps 4 --output_dir reference"
        assert cli.main(words.split()) == 0  # one sample of 4 of 32 may be empty, and then nothing is learned
    return folder


@pytest.fixture
def reader(shared, tmp_path, monkeypatch) -> Path:
    """Where a reader would be: smaller recipes, the README's own as recipe.yaml, and files of the names that are used."""
    folder = tmp_path / "reader"
    for name in ("runs", "HuggingFaceTB", "recipes"):
        (folder / name).mkdir(parents=True)
    cache = at_home(folder, monkeypatch)
    models = ("little", "HuggingFaceTB/SmolLM2-135M")
    links = dict.fromkeys(models, shared / "little") | {"docs": ROOT / "docs", "runs/reference": shared / "reference"}
    links |= {str(cache / "smollm2-135m"): shared / "chatty"}
    links |= dict.fromkeys(("runs/x", "runs/a", "runs/b"), shared / "run")
    for name, target in links.items():
        (folder / name).symlink_to(target)
    for file in (ROOT / "recipes").glob("*.yaml"):
        (folder / "recipes" / file.name).write_text(smaller(file.read_text(encoding="utf-8")), encoding="utf-8")
    for name, count in {"chats": 40, "held_out": 40, "public": 40, "other_public": 8}.items():
        records = [{"customer": r["id"], "text": f"{r['text']} {r['text']}"} for r in reviews(count, name)]
        write_jsonl(folder / f"{name}.jsonl", records)
    for name in ("feedback", "judgements"):
        pairs = [
            pair | {"customer": who, "judge": who, "prompt": f"{who}, any {name}? ", "completion": f"No {name}, {who}."}
            for pair in judged(60, name)
            for who in [pair["id"]]
        ]
        write_jsonl(folder / f"{name}.jsonl", pairs)
    write_gzip(folder / "imdb_train.jsonl.gz", reviews(64, "train"))
    write_gzip(folder / "imdb_unsup.jsonl.gz", reviews(8, "unsup"))
    own = yaml.safe_load(smaller(block("README.md", "yaml", "# recipe.yaml")))
    own["data"] |= {"eval_path": "other_public.jsonl", "eval_is_public": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    (folder / "my_rewards.py").write_text(block("docs/guide.md", "python", "# my_rewards.py"), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sweep, "_in_fresh_process", trial)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return folder


trials: dict[str, str] = {}  # what the first run of each recipe printed


def trial(words: list[str]) -> tuple[int, str]:
    """A run of a sweep: the first of a recipe happens, in this process; the others say the same again."""
    assert words[0] == "run"
    if words[1] not in trials:
        done = run_here([sys.executable, "-m", "dpalign", *words])
        if done.returncode:
            return done.returncode, ""
        trials[words[1]] = done.stdout
    return 0, trials[words[1]]


# Following -----------------------------------------------------------------------------------------------------------


def follow_command(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = text.split()[0]
    if text in ELSEWHERE:
        file, name = ELSEWHERE[text].split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), text
    elif program == "make":
        done = subprocess.run([*shlex.split(text), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and MAKE[text] in done.stdout, text
    elif program == "python":
        asked = text.removeprefix("python benchmarks/")
        assert any(known == asked or known.split()[0] == asked for known in SMOKE), f"{text}: not in test_benchmarks.py"
    elif text.removeprefix("dpalign ") in cli.COMMANDS and text not in RUN:
        follow_dpalign(f"{text} --help", Small(says="usage: "), folder, capsys)
    else:
        assert text in RUN, f"`{text}` is in a document, and no test runs it"
        follow_dpalign(text, RUN[text], folder, capsys)


def follow_dpalign(text: str, small: Small, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for placeholder, value in small.instead.items():
        assert placeholder in text
        text = text.replace(placeholder, value)
    words = [str(Path(w).expanduser()) if w.startswith("~") else w for w in shlex.split(f"{text} {small.more}")]
    capsys.readouterr()
    try:
        status = cli.main(words[1:])
    except SystemExit as end:  # --help
        status = int(end.code or 0)
    told = capsys.readouterr()
    assert status == 0, f"{text}: {told.err[-500:]}"
    assert small.says in told.out, f"{text}: {told.out[-500:]}"
    assert (folder / small.leaves).exists(), f"{text} leaves no {small.leaves}"


def follow_python(code: str) -> None:
    first = code.splitlines()[0]
    assert first in PYTHON, f"{first}: this block is in a document, and no test runs it"
    for old, new in PYTHON[first].items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, first, "exec"), {})


def follow_recipe(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a recipe as it stands, and runs when smaller; one that begins with its name is run by its document's commands."""
    (folder / "as_it_stands.yaml").write_text(text, encoding="utf-8")
    output = recipe_from("run", ["as_it_stands.yaml"]).output_dir
    if named := re.match(r"# (\w+\.yaml)\n", text):
        if named[1] != "recipe.yaml":  # the README's, which the reader has
            (folder / named[1]).write_text(smaller(text), encoding="utf-8")
    else:
        (folder / "smaller.yaml").write_text(smaller(text), encoding="utf-8")
        policy_less = set(yaml.safe_load(text)) & STAGES.keys() <= {"reward_model", "reward_query"}
        left = f"{output}/{'reward_model' if policy_less else 'release'}/privacy.json"
        follow_dpalign("dpalign run smaller.yaml", Small(leaves=left), folder, capsys)


@pytest.mark.parametrize("document", followed(), ids=lambda d: str(d.relative_to(ROOT)))
def test_what_a_document_says_works(document, reader, capsys):
    for piece in followed()[document]:
        torch.set_num_threads(1)
        if piece.kind == "command":
            follow_command(piece.text, reader, capsys)
        elif piece.kind == "python":
            follow_python(piece.text)
        else:
            follow_recipe(piece.text, reader, capsys)


def test_the_lists_name_nothing_that_is_gone():
    found = [piece for pieces_of in followed().values() for piece in pieces_of]
    commands = {piece.text for piece in found if piece.kind == "command"}
    assert not {*RUN, *ELSEWHERE, *MAKE} - commands
    assert not {*PYTHON} - {piece.text.splitlines()[0] for piece in found if piece.kind == "python"}


def test_commands_are_found_wherever_they_stand():
    text = (
        "Try `dpalign\nledger`, `.venv/bin/dpalign plan --units 3`, `benchmarks/reward_head.py` and `privacy.json`.\n\n"
        "```bash\nmake test   # tests\ndpalign run a.yaml \\\n    --json\n```\n\n```\n$ dpalign quickstart\nepsilon 4\n```\n"
        "```yaml\noutput_dir: x\n```\n```python\nimport dpalign\n```\n`dpalign` is a name."
    )
    assert [(piece.kind, piece.text, piece.in_sentence) for piece in pieces(text)] == [
        ("command", "dpalign ledger", True),
        ("command", "dpalign plan --units 3", True),
        ("command", "python benchmarks/reward_head.py", True),
        ("command", "make test", False),
        ("command", "dpalign run a.yaml --json", False),
        ("command", "dpalign quickstart", False),
        ("yaml", "output_dir: x\n", False),
        ("python", "import dpalign\n", False),
    ]


def test_an_unknown_command_fails(tmp_path, capsys):
    with pytest.raises(AssertionError, match="no test runs it"):
        follow_command("dpalign run another.yaml", tmp_path, capsys)
    with pytest.raises(AssertionError, match="not in test_benchmarks"):
        follow_command("python benchmarks/another.py", tmp_path, capsys)
    with pytest.raises(AssertionError, match="no test runs it"):
        follow_python("import this\n")
