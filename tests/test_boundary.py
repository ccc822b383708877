"""What may leave is on a list and names nothing of this machine; what does not belong there is found, wherever it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dpalign import boundary
from dpalign.boundary import found_in
from dpalign.models import ModelConfig, Policy, embedded
from dpalign.models.bases import base_path, told
from helpers import call, judged, small_model, write_jsonl, write_recipe

FORMATS = Path(__file__).with_name("formats")


RELEASES = {"folder": "run/release", "embedded": "run/reward_model"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A policy on a base that is a folder of this machine, and a reward model of several layers of the embedded model."""
    from dpalign.cli import main

    folder = tmp_path_factory.mktemp("leaving")
    query = {"directions": 4, "own_texts": 40, "max_length": 20}
    kinds = {
        "folder": {"sft": {"max_steps": 1}},
        "embedded": {"sft": None, "reward_query": query, "model": {"name_or_path": "tiny-review-lm"}},
    }
    for name, changes in kinds.items():
        (folder / name).mkdir()
        path = write_jsonl(folder / name / "pairs.jsonl", judged(24))
        data = {"reward_query_data": {"name": "judges", "path": str(path)}} if "reward_query" in changes else {}
        assert main(["run", str(write_recipe(folder / name, ppo=None, **changes, **data))]) == 0
    return folder


@pytest.fixture
def release(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs / "folder" / "run" / "release", tmp_path / "release"))


def test_a_release_as_it_is_written_may_leave(runs, capsys):
    for name, place in RELEASES.items():
        release = runs / name / place
        called = call(capsys, "export", release, "--check", "--json")
        assert called.json == {"checked": str(release), "files": sorted(f.name for f in release.iterdir())}
    assert "may leave" in call(capsys, "export", runs / "folder" / "run" / "release", "--check").out


# The base -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base"), [("folder", lambda: f"./{Path(small_model()).name}"), ("embedded", lambda: "tiny-review-lm")]
)
def test_no_file_of_a_release_says_where_the_base_lies(name, base, runs):
    release = runs / name / RELEASES[name]
    said = {f.name: f.read_bytes() for f in release.iterdir()}
    for place in (small_model(), embedded.resolve("tiny-review-lm"), str(runs)):
        assert [file for file, content in said.items() if place.encode() in content] == []
    assert json.loads(said["adapter_config.json"])["base_model_name_or_path"] == base()
    assert f'from_pretrained("{base()}"' in said["README.md"].decode()


def test_a_release_is_loaded_where_its_run_lies_and_trained_further(runs, tmp_path, capsys):
    release = runs / "folder" / "run" / "release"
    assert base_path(release) == str(Path(small_model()).resolve())
    policy = Policy.load(ModelConfig(name_or_path=str(release)))
    assert policy.model.peft_config["earlier"].base_model_name_or_path == base_path(release)
    recipe = write_recipe(
        tmp_path, ppo=None, sft={"max_steps": 1}, model={"name_or_path": str(release)}, composition="sequential",
        target_epsilon=5,
    )  # fmt: skip
    assert call(capsys, "run", recipe).status == 0
    assert found_in(tmp_path / "run" / "release") == []
    assert base_path(tmp_path / "run" / "release") == base_path(release)


def test_a_copy_of_it_says_what_it_lacks(release, capsys):
    said = call(capsys, "generate", release, "--prompt", "A fine").error
    assert f"the base of {release}, model './{Path(small_model()).name}' is neither a folder here" in said


def test_names_of_the_hub_are_told_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told("org/llama") == "org/llama" and told("gpt2") == "gpt2"
    (tmp_path / "org" / "llama").mkdir(parents=True)
    assert told("org/llama") == told(str(tmp_path / "org" / "llama") + "/") == "./llama"
    assert told(embedded.resolve("tiny-review-lm")) == told("tiny-review-lm") == "tiny-review-lm"


# What is planted ----------------------------------------------------------------------------------------------------


def a_file(folder: Path) -> None:
    (folder / "optimizer.pt").write_text("x")


def a_folder(folder: Path) -> None:
    (folder / "private").mkdir()


def a_link(folder: Path) -> None:
    (folder / "prompts.json").unlink()
    (folder / "prompts.json").symlink_to("/etc/hosts")


def changed(name: str, change):
    def plant(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return plant


def a_sentence(text: str):
    return lambda folder: (folder / "README.md").write_text((folder / "README.md").read_text() + text + "\n")


def card_metadata(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("library_name:", "author_host: x\nlibrary_name:"))


def weights_metadata(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "seed": "17"})


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (a_file, "optimizer.pt is not on the list"),
        (a_folder, "private is not on the list"),
        (a_link, "prompts.json is not on the list"),
        (changed("privacy.json", lambda v: v["stages"][0].update(drawn=[31, 40])), "the field stages.[].drawn"),
        (changed("privacy.json", lambda v: v["stages"][0]["mechanisms"][0].update(seed=17)), "stages.[].mechanisms.[].seed"),
        (changed("privacy.json", lambda v: v["ledger"][0].update(indices=[3])), "ledger.[].indices"),
        (changed("privacy.json", lambda v: v.update(host="x")), "privacy.json: the field host"),
        (changed("prompts.json", lambda v: v.update(seed=1)), "prompts.json: the field seed"),
        (changed("adapter_config.json", lambda v: v.update(user="x")), "adapter_config.json: the field user"),
        (changed("adapter_config.json", lambda v: v.update(base_model_name_or_path="/srv/models/base")), "the path /srv/models/base"),
        (changed("tokenizer_config.json", lambda v: v.update(name_or_path="/home/ann/base")), "the path /home/ann/base"),
        (changed("privacy.json", lambda v: v["assumptions"].append("reward 'classifier:/srv/clinic/clf' was")), "/srv/clinic/clf"),
        (a_sentence("Trained in `~ann/notes/run`."), "the path ~ann/notes/run"),
        (a_sentence(r"Trained in C:\Users\ann."), "the path C:"),
        (a_sentence("Trained on clinic-gpu-7."), "names the machine clinic-gpu-7"),
        (a_sentence("Trained by annfrank."), "names the user annfrank"),
        (card_metadata, "the metadata author_host"),
        (weights_metadata, "adapter_model.safetensors: the metadata seed"),
        (changed("privacy.json", lambda v: v.update(private=False, epsilon="inf")), "NOT PRIVATE"),
    ],
)  # fmt: skip
def test_a_planted_thing_is_found(plant, found, release, capsys, monkeypatch):
    monkeypatch.setattr(boundary.socket, "gethostname", lambda: "clinic-gpu-7.example.org")
    monkeypatch.setattr(boundary.getpass, "getuser", lambda: "annfrank")
    assert found_in(release) == []
    plant(release)
    assert [what for what in found_in(release) if found in what]
    called = call(capsys, "export", release, "--check")
    assert called.status == 1 and found in called.error and "must not leave" in called.error


def test_names_that_every_card_has_are_no_names(release, monkeypatch):
    monkeypatch.setattr(boundary.getpass, "getuser", lambda: "adapter")
    monkeypatch.setattr(boundary.socket, "gethostname", lambda: "sft")
    assert found_in(release) == []


@pytest.mark.parametrize("name", [f.name for f in sorted(FORMATS.glob("privacy_*.json")) if "nonprivate" not in f.name])
def test_statements_of_older_versions_may_leave(name, release):
    shutil.copy(FORMATS / name, release / "privacy.json")
    assert [what for what in found_in(release) if "the field" in what] == []


def test_what_goes_with_check_is_said(release, capsys):
    assert "--check" in call(capsys, "export", release, "--check", "--to", "x").error
    (release / "privacy.json").unlink()
    assert "holds no privacy statement" in call(capsys, "export", release, "--check").error
