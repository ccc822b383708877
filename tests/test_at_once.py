"""What needs no torch is answered without: a wrong field, a file that is not there, --help, the ledger."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest

from dpalign.cli import COMMANDS, main, manual
from dpalign.errors import DPAlignError
from dpalign.names import ELSEWHERE, instead
from dpalign.parsing import fields_below, section_of, unknown_field
from dpalign.privacy.ledger import Ledger
from dpalign.recipe import Recipe
from dpalign.stages import STAGES
from helpers import call, write_recipe

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "matplotlib", "scipy", "dp_accounting")
# One process answers all of these one after the other, so that what one of them imports is seen.
CALLS = [
    ["sft", "--help"],
    ["run", "--help_all"],
    ["ppo", "--reward.help"],
    ["sft", "recipe.yaml", "--sft.max_step", "3"],
    ["run", "recipe.yaml", "--sft.per_device_train_batch_size", "3"],
    ["run", "recipe.yaml", "--sft.max_steps", "few"],
    ["run", "recipe.yaml", "--sft.adam_beta1", "1.5"],
    ["run", "nowhere.yaml"],
    ["run", "recipe.yaml", "--data.path", "nowhere.jsonl"],
    ["plan", "recipe.yaml", "--sft.max_step", "3"],
    ["sweep", "recipe.yaml", "--sft.max_step", "3"],
    ["quickstart", "--sft.max_step", "3"],
    ["ledger", "--ledger", "ledger.sqlite"],
    ["export", "nowhere", "--to", "x"],
    ["generate", "tiny-review-lm"],
    ["generate", "runs/nowhere/release", "--prompt", "It"],
    ["evaluate", "tiny-review-lm", "--data", "x.jsonl", "--num_promts", "3"],
    ["evaluate", "tiny-review-lm", "--private", "--epsilonn", "3"],
    *[[command, "--help"] for command in COMMANDS],
]
PROGRAM = """
import json, sys
from dpalign.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit:
        pass
    found = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    if found:
        raise SystemExit(f"{arguments} imports {found}")
"""


def test_nothing_heavy_is_imported_for_it(tmp_path):
    write_recipe(tmp_path)
    Ledger(tmp_path / "ledger.sqlite").close()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CALLS), json.dumps(HEAVY)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stderr.count("error: ") == len(CALLS) - 4 - len(COMMANDS), done.stderr  # three --help, and the ledger


# Names that there are not --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "command", "says"),
    [
        ("sft.max_step", "run", "did you mean max_steps."),
        (
            "sft.per_device_train_batch_size",
            "sft",
            "micro_batch_size (memory only); the expected batch of an update is",
        ),
        ("ppo.reward.sauce", "run", "did you mean source."),
        ("learning_rate", "sft", "its place is sft.learning_rate."),
        ("learning_rate", "run", "its place is sft.learning_rate or reward_model.learning_rate or "),
        ("reward.source", "ppo", "its place is ppo.reward.source."),
        ("reward.margin_range", "run", "that stage is called reward_model now"),
        ("sft.r", "run", "its place is sft.adapter.r."),
        ("sft.adapter.rank.low", "run", "--sft.adapter.help lists those there are."),
        ("zzzzzz", "run", "--help_all lists those there are."),
        ("sft.packing", "run", "two records in one row share a gradient"),
        ("targetepsilon", "run", "did you mean target_epsilon."),
    ],
)
def test_an_unknown_field_says_what_was_meant(name, command, says):
    assert unknown_field(name, command).startswith(f"unknown field {name}: ") and says in unknown_field(name, command)


def test_the_command_line_and_recipes_say_it_alike(tmp_path, capsys):
    recipe = write_recipe(tmp_path, sft={"max_seq_length": 9})
    here = call(capsys, "run", write_recipe(tmp_path), "--sft.max_seq_length", 9).error
    recipe = write_recipe(tmp_path, sft={"max_seq_length": 9})
    assert call(capsys, "run", recipe).error == here == "unknown field sft.max_seq_length: it is called max_length."
    assert "did you mean num_prompts" in call(capsys, "evaluate", "x", "--data", "y", "--num_promts", "3").error


def test_names_from_elsewhere_are_no_fields_and_lead_to_fields():
    there = {place.rpartition(".")[2] for stage in STAGES for place in fields_below(stage)}
    named = {field for field in there if len(field) > 3}
    assert not set(ELSEWHERE) & {
        place
        for place in there
        if place not in ("lora_alpha", "loss_type", "missing_eos_penalty", "scale_rewards", "temperature")
    }
    for name, says in ELSEWHERE.items():
        if says.startswith("it is called "):
            meant = says.removeprefix("it is called ").split()[0].rstrip(",;:").rpartition(".")[2]
            assert meant in named | {"r", "url", "path", "name_or_path", "loss", "beta"}, name
    assert instead("qqqq", ["path"]) == ""


# --help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 110])
def test_the_help_of_a_stage_fits(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for command in STAGES:
        if not STAGES[command].is_command:
            continue
        text = manual.asked(command, ["recipe.yaml", "--help"], f"dpalign {command} recipe.yaml") or ""
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) < (60 if width == 110 or command == "sft" else 70), (command, len(lines))
        others = [stage for stage in STAGES if stage != command]
        assert not [line for line in lines if any(f"--{other}." in line for other in others)]
        assert "--data.name" in text and f"--{command}.expected_batch_size" in text and "example:" in text
        assert f"  dpalign {command} recipe.yaml" in text


def test_every_field_is_explained_somewhere():
    text = manual.asked("run", ["--help_all"], "") or ""
    missing = [p for p in [*Recipe.__dataclass_fields__, *fields_below("sft")] if not re.search(rf"--{p}\s", text)]
    assert not missing and section_of("ppo.reward") is not None
    explained = [line for line in text.splitlines() if line.startswith("  --")]
    assert not [line for line in explained if line.rstrip().endswith(("TEXT", "NUMBER", "INTEGER", "true|false"))]


def test_a_section_explains_itself_and_defaults_are_words(capsys):
    assert main(["sft", "--adapter.help"]) == 0
    told = capsys.readouterr().out
    assert "--sft.adapter.r INTEGER" in told and "(default: 4)" in told and "--sft.adapter.freeze_a true|false" in told
    assert "(default: false)" in told and "MISSING" not in told


# One spelling ----------------------------------------------------------------------------------------------------------


def test_hyphens_are_underscores(tmp_path, capsys):
    budget = ("--units", 1000, "--steps", 10, "--epsilon", 4, "--json")
    underscored = call(capsys, "plan", *budget, "--batch_size", 100).json
    assert call(capsys, "plan", *budget, "--batch-size=100").json == underscored
    assert "unknown field sft.max_step" in call(capsys, "run", write_recipe(tmp_path), "--sft.max-step", 3).error


def test_a_switch_can_be_turned_off():
    from dpalign.cli.evaluate import _parser

    def said(*words):
        return _parser().parse_args(["model", "--data", "x", *words]).prepend_bos

    assert (said(), said("--prepend_bos"), said("--no_prepend_bos")) == (None, True, False)
    with pytest.raises(DPAlignError, match="unrecognized arguments: --no_prepend_boss: did you mean no_prepend_bos"):
        said("--no_prepend_boss")


def test_no_option_has_a_hyphen(capsys):
    for command in COMMANDS:
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
    told = capsys.readouterr().out
    words = [word.strip("[],") for word in told.split() if word.strip("[],").startswith("--")]
    assert len(words) > 100 and not [word for word in words if "-" in word.removeprefix("--").partition("=")[0]]
