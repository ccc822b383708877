"""What goes to the Hub: the release's files and no others, to a private repository, naming nothing of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dpalign import DPAlignError, DPSFTTrainer, Privacy, SFTConfig, hub
from dpalign.hub import Repository
from helpers import call, reviews, small_model, write_jsonl, write_recipe
from tiny import tiny_folder, words

TOKEN = "hf_secretsecretsecret"


class Hub:
    """Stands for huggingface_hub's HfApi; keeps what it is sent."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.files: dict[str, str] = {}
        self.is_private, self.broken = True, None

    def __call__(self, **about: Any) -> Hub:
        return self

    def create_repo(self, name: str, **options: Any) -> Any:
        if self.broken:
            raise self.broken
        self.calls.append(("create_repo", name, options))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        self.calls.append(("upload_folder", repo_id, allow_patterns))
        for file in (path for path in Path(folder_path).rglob("*") if path.is_file()):
            self.files[str(file.relative_to(folder_path))] = file.read_bytes().decode(errors="replace")


@pytest.fixture
def api(monkeypatch):
    api = Hub()
    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(ModelCard, "validate", lambda card: api.calls.append(("validate", dict(card.data.to_dict()))))
    return api


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose base is a folder, with public measurements."""
    folder = tmp_path_factory.mktemp("shared")
    public = write_jsonl(folder / "public.jsonl", reviews(4, "public"))
    recipe = write_recipe(
        folder, data={"eval_path": str(public), "eval_is_public": True}, sft={"max_steps": 1}, ppo={"max_steps": 1}
    )
    from dpalign.cli import main

    assert main(["run", str(recipe)]) == 0
    return folder / "run"


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "privacy.json", "prompts.json", "tokenizer.json",
         "tokenizer_config.json"]  # fmt: skip
NAMES = ("--push_to_hub", "me/private-reviews", "--base_model", "org/base", "--license", "apache-2.0")


def test_a_release_is_sent_with_a_card_that_the_hub_reads(run, api, capsys):
    before = {f: f.read_bytes() for f in (run / "release").iterdir()}
    called = call(capsys, "export", run, *NAMES, "--json")
    assert called.status == 0 and called.json == {"merged": False, "pushed": "me/private-reviews"}
    assert [name for name, *_ in api.calls] == ["validate", "create_repo", "upload_folder"]
    assert api.calls[1][1:] == ("me/private-reviews", {"private": True, "exist_ok": True})
    assert sorted(api.files) == api.calls[2][2] == FILES
    assert before == {f: f.read_bytes() for f in (run / "release").iterdir()}

    about = ModelCard(api.files["README.md"]).data
    summary = json.loads((run / "summary.json").read_text())
    assert (about.base_model, about.license, about.library_name) == ("org/base", "apache-2.0", "peft")
    assert about.pipeline_tag == "text-generation" and about.base_model_relation == "adapter"
    assert about.differential_privacy["epsilon"] == str(summary["epsilon"])
    measured = {result.metric_type: result.metric_value for result in about.eval_results}
    row = summary["evaluation"]["ppo"]
    assert measured == {k: row[k] for k in measured} and {"reward", "kl", "perplexity"} <= measured.keys()
    assert "prompts" in row.keys() - measured.keys() and not any(name.endswith("_ci95") for name in measured)
    assert {r.dataset_name for r in about.eval_results} <= {"public prompts (declared)", "public texts (declared)"}
    assert json.loads(api.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert 'from_pretrained("org/base")' in api.files["README.md"] and '"me/private-reviews"' in api.files["README.md"]
    assert "model 'org/base' was made without the private data" in api.files["privacy.json"]


def test_no_path_of_this_machine_is_told(run, api, tmp_path, capsys):
    release = shutil.copytree(run / "release", tmp_path / "release")
    said = "reward 'classifier:/home/me/clinic/clf' was made without the private data (declared)"
    card, statement = release / "README.md", release / "privacy.json"
    card.write_text(card.read_text().replace("Assumptions:\n", f"Assumptions:\n- `{said}`\n"))
    value = json.loads(statement.read_text())
    statement.write_text(json.dumps(value | {"assumptions": [*value["assumptions"], said]}))
    template = "{% if '/no_think' in m %}a '/a/b' b{% endif %}"
    (release / "chat_template.jinja").write_text(template)
    (release / "additional_chat_templates").mkdir()
    (release / "additional_chat_templates" / "rag.jinja").write_text(template)
    assert call(capsys, "export", release, *NAMES).status == 0
    told = {name: text for name, text in api.files.items() if name != "adapter_model.safetensors"}
    assert not [name for name, text in told.items() if any(p in text for p in (small_model(), str(run), "/home/me"))]
    assert "reward 'classifier:clf' was made" in told["README.md"] and "classifier:clf" in told["privacy.json"]
    assert told["chat_template.jinja"] == template == told["additional_chat_templates/rag.jinja"]
    assert api.calls[2][2] == sorted(api.files)
    weights = (run / "release" / "adapter_model.safetensors").read_bytes().decode(errors="replace")
    assert api.files["adapter_model.safetensors"] == weights


def test_a_base_that_nobody_else_has_is_refused_with_the_cure(run, api, capsys):
    said = call(capsys, "export", run, "--push_to_hub", "me/x").error
    assert f"the base ./{Path(small_model()).name} is a folder of this machine" in said and "--base_model USER/NAME" in said
    assert "no name of the Hub" in call(capsys, "export", run, "--push_to_hub", "me/x/y").error
    assert "no name of the Hub" in call(capsys, "export", run, "--push_to_hub", "me/x", "--base_model", "/org/b").error
    assert "say where the release goes" in call(capsys, "export", run).error
    assert "are for --push_to_hub" in call(capsys, "export", run, "--to", "x", "--license", "mit").error
    with pytest.raises(DPAlignError, match="the base is org/a, and base_model says org/b"):
        Repository("me/x", base_model="org/b").check("org/a")
    Repository("me/x").check("org/a")
    assert not api.calls


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "data.jsonl", "private", "link.json", "model.bin", "tokenizer.json.tmp"]
)
def test_anything_else_in_the_folder_stops_it(name, run, api, tmp_path, capsys):
    release = shutil.copytree(run / "release", tmp_path / "release")
    if name == "private":
        (release / name).mkdir()
    elif name == "link.json":
        (release / "prompts.json").unlink()
        (release / "prompts.json").symlink_to(run / "private" / "run.json")
    else:
        (release / name).write_text("x")
    said = call(capsys, "export", release, *NAMES).error
    assert f"holds {'prompts.json' if name == 'link.json' else name}, which is no part of a release" in said
    assert not api.calls


def test_a_public_repository_is_not_taken_for_a_private_one(run, api, capsys):
    api.is_private = False
    said = call(capsys, "export", run, *NAMES).error
    assert "me/private-reviews is there already, and public: nothing was sent" in said and not api.files
    assert call(capsys, "export", run, *NAMES, "--no_private").status == 0
    assert api.calls[-2][2]["private"] is False and api.files


@pytest.mark.parametrize(
    "broken", [ConnectionError(f"no route with {TOKEN}\nsecond line"), ValueError("401 Unauthorized.")]
)
def test_what_the_hub_says_is_one_sentence_without_the_token(broken, run, api, capsys):
    api.broken = broken
    called = call(capsys, "export", run, *NAMES)
    assert called.status == 1 and TOKEN not in called.out + called.err and "second" not in called.err
    first = str(broken).splitlines()[0].replace(TOKEN, "...").rstrip(".")
    assert called.err.strip().splitlines() == [
        f"dpalign: error: the release was not sent to me/private-reviews: {first}."
    ]


def test_full_weights_need_no_base(run, api, tmp_path, capsys):
    called = call(capsys, "export", run, "--merge", "--push_to_hub", "me/full", "--to", tmp_path / "full", "--json")
    assert called.json == {"merged": True, "pushed": "me/full", "exported": str(tmp_path / "full")}
    assert "model.safetensors" in api.files and "adapter_config.json" not in api.files
    about = ModelCard(api.files["README.md"]).data
    assert (about.base_model, about.library_name) == (None, "transformers")
    assert 'AutoModelForCausalLM.from_pretrained("me/full")' in api.files["README.md"]
    assert "PeftModel" not in api.files["README.md"]
    for name in ("README.md", "config.json", "privacy.json"):
        assert small_model() not in api.files[name]


# Trainers -------------------------------------------------------------------------------------------------------------


def trainer(base: str, folder: Path, **hub_settings: Any) -> DPSFTTrainer:
    sizes = {"expected_batch_size": 8, "micro_batch_size": 8, "max_steps": 1, "max_length": 8}
    declared = Privacy(noise_multiplier=2.0, dataset_name="toy", model_is_public=True, ledger=str(folder) + ".sqlite")
    rows = [{"text": words(6, seed)} for seed in range(32)]
    args = SFTConfig(output_dir=str(folder), **sizes, **hub_settings)
    return DPSFTTrainer(base, args, rows, privacy=declared, quiet=True)


def test_a_trainer_sends_its_release(api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_folder("llama", tmp_path / "org" / "base")
    with pytest.raises(DPAlignError, match="the base org/base is a folder of this machine"):
        trainer("org/base", tmp_path / "run", push_to_hub=True)
    monkeypatch.setattr(DPSFTTrainer, "_base", lambda self: "org/other")  # as where there is no such folder
    monkeypatch.setattr("dpalign.release.told", lambda base: base)
    made = trainer("org/base", tmp_path / "my-run", push_to_hub=True)
    share = hub.share
    monkeypatch.setattr("dpalign.trainers.base.share", lambda *given: (shutil.rmtree("org"), share(*given))[1])
    made.train()
    assert api.calls[1][1:] == ("my-run", {"private": True, "exist_ok": True}) and api.calls[2][1] == "me/my-run"
    assert "adapter_model.safetensors" in api.files and "private" not in str(sorted(api.files))
    made.args.hub_model_id, made.args.hub_private_repo = "me/other", False
    monkeypatch.setattr("dpalign.trainers.base.share", share)
    assert made.push_to_hub() == "me/other" and api.calls[-2][2]["private"] is False


def test_a_token_in_a_script_is_refused_by_name():
    with pytest.raises(DPAlignError, match="SFTConfig has no hub_token: huggingface_hub reads its own login"):
        SFTConfig(output_dir="x", hub_token="hf_x")
