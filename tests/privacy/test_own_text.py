"""A policy stage whose prompts are no one's: no record, no draw, no row in the ledger, and the statement says so."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import grpo, offline, ppo, prompts, rloo
from safetensors.torch import load_file

from dpalign import run as running
from dpalign.algorithms import RLOO, GRPOConfig, OfflineConfig, PPOConfig, RLOOConfig
from dpalign.data import DataConfig
from dpalign.domains import check_settings
from dpalign.errors import DPAlignError
from dpalign.plan import split_parts
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.statement import read_statement
from dpalign.recipe import Recipe
from dpalign.rewards import Reward, RewardConfig
from dpalign.settings.base import TrainingConfig
from dpalign.settings.privacy import Privacy
from dpalign.settings.sft import SFTConfig
from dpalign.settings.trainers import RLOOConfig as RLOOArguments
from dpalign.trainers.stages import DPRLOOTrainer
from dpalign.training import OwnTextStage, Stage
from dpalign.training.loop import GONE_SETTINGS, MACHINE_SETTINGS, hash_of
from helpers import call, ledger_rows, reviews, small_model, statement, write_jsonl, write_recipe
from tiny import dataset, tiny_policy

OWN = {"prompts": "self_written", "max_steps": 4, "expected_batch_size": 6, "learning_rate": 1e-2}
ADAPTER = Path("release") / "adapter_model.safetensors"


def ledger_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("ledger.sqlite*")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """Two runs on different records, whose SFT stage draws but learns at rate 0: what the policy stage then makes must
    be the same. `one` has what the ledger held before and after that stage in ledger.json."""
    folders = {}
    for name, records in (("one", reviews(64)), ("other", reviews(80, "morning")[16:])):
        folders[name] = folder = tmp_path_factory.mktemp(name)
        write_jsonl(folder / "data.jsonl", records)
        recipe = write_recipe(folder, sft={"learning_rate": 0.0, "max_steps": 2}, ppo=OWN)
        train, seen = running.Run.train_on_own_text, []

        def watched(*arguments: Any) -> None:
            seen.append(ledger_bytes(folder))  # noqa: B023
            train(*arguments)  # noqa: B023
            seen.append(ledger_bytes(folder))  # noqa: B023

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(running.Run, "train_on_own_text", watched)
            assert running_main("run", recipe) == 0
        before, after = seen
        assert before == after and before["ledger.sqlite"], "the ledger is the same byte for byte"
    yield folders


def running_main(*arguments: object) -> int:
    from dpalign.cli import main

    return main([str(a) for a in arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / ADAPTER)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is spent and said ----------------------------------------------------------------------------------------


def test_nothing_is_drawn_and_epsilon_is_that_of_the_other_stages(ran, tmp_path, capsys):
    one = ran["one"]
    stated = statement(one / "run")
    assert [s["stage"] for s in stated["stages"]] == ["sft"]
    assert ledger_rows(one) == ledger_rows(one, stage="sft") == 2
    alone = write_recipe(tmp_path, sft={"learning_rate": 0.0, "max_steps": 2}, ppo=None)
    assert stated["epsilon"] == call(capsys, "plan", alone, "--json").json["epsilon"] > 1


def test_the_statement_and_the_card_say_so(ran):
    run = ran["one"] / "run"
    said = "stage ppo read prompts that the model wrote itself; it drew nothing"
    assert said in statement(run)["assumptions"] and said in (run / "release" / "README.md").read_text()
    assert (
        said in (run / "report.html").read_text()
        and said in json.loads((run / "summary.json").read_text())["assumptions"]
    )


def test_its_metrics_are_exact_and_its_log_has_no_noise(ran):
    lines = [json.loads(line) for line in (ran["one"] / "run" / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["stage"] == "ppo"]
    assert [line["step"] for line in own] == [1, 2, 3, 4] and all(line["private"] for line in own)
    assert all(line.keys() == {"private", "stage", "step", "own_text_metrics"} for line in own)
    assert own[0]["own_text_metrics"]["kl"] == pytest.approx(0, abs=1e-4)  # nothing is learned yet
    assert 0 < own[0]["own_text_metrics"]["completion_length"] <= 6


def test_all_units_go_to_the_stages_that_need_people():
    def parts(**changes: Any) -> dict[str, tuple[float, float]]:
        return split_parts(Recipe(data=DataConfig(name="d"), sft=SFTConfig(), ppo=PPOConfig(**changes)))

    assert parts() == {"sft": (0.0, 0.5), "ppo": (0.5, 1.0)}
    assert parts(prompts="self_written", max_steps=1) == {"sft": (0.0, 1.0)}


def test_the_plan_shows_it_apart(tmp_path, capsys):
    shown = call(capsys, "plan", write_recipe(tmp_path, ppo=OWN), "--json").json
    assert [s["stage"] for s in shown["stages"]] == ["sft"] and shown["stages"][0]["units"] == 64
    (own,) = shown["drawing_nothing"]
    assert (own["stage"], own["prompts"], own["steps"], own["batch_size"]) == ("ppo", "self_written", 4, 6)
    text = " ".join(call(capsys, "plan", write_recipe(tmp_path, ppo=OWN)).out.split())
    assert "ppo: 4 updates of 6 prompts; it reads prompts that the model wrote itself, draws nothing" in text


# What it reads -------------------------------------------------------------------------------------------------


def test_whoever_the_units_are_the_policy_is_the_same(ran):
    assert same(weights(ran["one"]), weights(ran["other"]))
    assert any(tensor.abs().max() > 1e-3 for name, tensor in weights(ran["one"]).items() if "lora_B" in name)


def test_a_private_record_as_a_prompt_is_found(ran, tmp_path, monkeypatch):
    """Mutant: the stage gets the records of the stage before it."""

    def leaks(self: running.Run) -> None:
        self.prompts = {"ppo": ([record for unit in self.data["sft"].units for record in unit], "leaked")}
        made(self)

    made = running.Run.__post_init__
    monkeypatch.setattr(running.Run, "__post_init__", leaks)
    found = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_bytes((ran[name] / "data.jsonl").read_bytes())
        recipe = write_recipe(tmp_path / name, sft={"learning_rate": 0.0, "max_steps": 2}, ppo=OWN)
        assert running_main("run", recipe) == 0
        found.append(weights(tmp_path / name))
    assert not same(*found)


@pytest.mark.parametrize("made", [ppo, rloo, grpo, offline])
def test_a_text_that_cannot_be_scored_is_left_out(made, tmp_path):
    """A reward that is not a number for some text would make every weight one."""
    algorithm = made(prompts="self_written", expected_batch_size=32, max_prompt_length=9, max_steps=2, learning_rate=1e-2,
                     reward=RewardConfig(), noise_multiplier=None, clipping="automatic")  # fmt: skip
    algorithm.reward = Reward(
        lambda prompts, completions, **_: [float("nan") if zlib.crc32(c.encode()) % 2 else 0.5 for c in completions],
        -1,
        1,
    )
    policy, told = tiny_policy("gpt2"), []
    OwnTextStage(policy, algorithm, None, folder=tmp_path, report=told.append).train()
    assert all(p.isfinite().all() for p in policy.parameters())
    assert all(report.epsilon is None and report.metrics["reward"] == 0.5 for report in told)


def trained(folder: Path, **changes: Any) -> tuple[RLOO, dict[str, torch.Tensor]]:
    """An algorithm after two updates on self-written prompts, and what it has trained."""
    algorithm = rloo(prompts="self_written", max_prompt_length=9, noise_multiplier=None, clipping="automatic",
                     reward=RewardConfig(), **{"max_steps": 2, "learning_rate": 1e-2} | changes)  # fmt: skip
    algorithm.reward = Reward(lambda prompts, completions, **_: [zlib.crc32(c.encode()) % 7 for c in completions], 0, 7)
    policy = tiny_policy("gpt2")
    OwnTextStage(policy, algorithm, None, folder=folder).train()
    return algorithm, {name: p.detach() for name, p in policy.named_parameters() if "lora_B" in name}


def test_its_optimiser_is_that_of_its_settings(tmp_path):
    """With Adam's epsilon at 1 an update is the gradient's size: the norm's clip shows, and so does the schedule."""
    wide, narrow = (trained(tmp_path / str(bound), adam_epsilon=1.0, max_grad_norm=bound)[1] for bound in (1e9, 1e-6))
    assert max(p.abs().max() for p in wide.values()) > 1e-5 and max(p.abs().max() for p in narrow.values()) < 1e-7
    rate = {"learning_rate": 1e-2, "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1e-12}  # moves by the rate
    steps = {kind: trained(tmp_path / kind, lr_scheduler_type=kind, **rate)[1] for kind in ("constant", "linear")}
    most = {kind: max(float(p.abs().max()) for p in moved.values()) for kind, moved in steps.items()}
    assert most == {"constant": pytest.approx(2e-2, rel=0.01), "linear": pytest.approx(1.5e-2, rel=0.01)}


def test_what_adapts_is_told_the_exact_metrics(tmp_path):
    assert trained(tmp_path / "a")[0].beta == 0.05
    assert trained(tmp_path / "b", adaptive_kl_target=1.0, adaptive_kl_horizon=10.0)[0].beta < 0.05


# Kill and resume -----------------------------------------------------------------------------------------------

KILLED = {
    "self_written": ("ppo", OWN | {"num_mini_batches": 2, "num_ppo_epochs": 2}),
    "grpo": ("grpo", OWN | {"num_mini_batches": 2, "num_iterations": 2}),
    "offline": ("offline", OWN | {"num_generations": 2}),
    "conditional": ("offline", OWN | {"num_generations": 2, "method": "conditional", "max_prompt_length": 14}),
    "public": ("rloo", OWN | {"prompts": "public:public.jsonl", "num_generations": 2}),
}


@pytest.mark.parametrize("source", KILLED)
def test_a_killed_run_ends_where_it_would_have_ended(source, tmp_path, monkeypatch, capsys):
    """Equal weights, bit for bit; the mutant in which a phase has no seed of its own dies here."""
    name, own = KILLED[source]
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "public.jsonl", reviews(20, "public"))
    stage = {"micro_batch_size": 32, "prepend_bos": True, "adapter": {"r": 2}, "prompt_max_tokens": 4,
             "max_prompt_length": 5, "max_completion_length": 6}  # fmt: skip
    shown = {"eval_path": "shown.jsonl", "eval_is_public": True}
    write_jsonl(tmp_path / "shown.jsonl", reviews(2, "shown"))
    recipe = write_recipe(tmp_path, **{"sft": None, "ppo": None, "data": shown, name: stage | own | {"eval_steps": 2}})
    assert call(capsys, "run", recipe, "--output_dir", "whole").status == 0
    save = OwnTextStage._save

    def dies(self: OwnTextStage, step: int, where: str) -> None:
        save(self, step, where)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OwnTextStage, "_save", dies)
        assert call(capsys, "run", recipe).status == 130
    again = call(capsys, "run", recipe)
    assert f"stage {name} resumes after step 2 of 4" in again.err and again.status == 0
    assert same(load_file(tmp_path / "whole" / ADAPTER), weights(tmp_path))
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    done = call(capsys, "run", recipe)
    assert f"stage {name} is already done" in done.err and same(
        load_file(tmp_path / "whole" / ADAPTER), weights(tmp_path)
    )
    assert "changed since this run began" in call(capsys, "run", recipe, f"--{name}.temperature", 0.5).error
    assert ledger_rows(tmp_path) == 0 and "no private record was read" in done.out.lower()


def test_what_nothing_was_spent_on_is_trained_further(tmp_path, capsys):
    """Free updates first, private ones on the release: the second statement has the second's spending, and both say so."""
    recipe = write_recipe(tmp_path, sft=None, ppo=OWN, output_dir=str(tmp_path / "free"))
    free = call(capsys, "run", recipe, "--json").json
    assert free["epsilon"] == 0 and free["stages"] == [] and free["private"]
    recipe = write_recipe(tmp_path, sft=None, model={"name_or_path": free["release"], "is_public": False})
    done = call(capsys, "run", recipe, "--json").json
    assert [s["stage"] for s in done["stages"]] == ["ppo"] and 0 < done["epsilon"] <= 2
    assert "stage ppo read prompts that the model wrote itself; it drew nothing" in done["assumptions"]


@pytest.mark.parametrize("change", [{"epsilon": 0.5}, {"private": False}, {"epsilon": "inf"}])
def test_a_statement_that_lost_its_stages_is_damaged(change, tmp_path):
    stated = {"format": 1, "private": True, "epsilon": 0.0, "delta": 1e-5, "assumptions": [], "stages": []}
    (tmp_path / "privacy.json").write_text(json.dumps(stated))
    assert read_statement(tmp_path) == (stated, [])
    (tmp_path / "privacy.json").write_text(json.dumps(stated | change))
    with pytest.raises(DPAlignError, match="not a privacy statement"):
        read_statement(tmp_path)


# What is refused -----------------------------------------------------------------------------------------------

OTHER = {
    "target_epsilon": 2.0, "target_delta": 1e-6, "noise_multiplier": 1.0, "num_train_epochs": 2.0,
    "adam_noise_correction": True, "adam_noise_floor": 0.2, "clipping": "flat", "clipping_gamma": 0.5,
    "metrics_noise_ratio": 5.0, "insecure_seed": 1, "kl_range": (-1.0, 9.0),
}  # fmt: skip
HONOURED = {
    "expected_batch_size", "max_steps", "micro_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_checkpointing", "save_steps",
    "logging_steps", "eval_steps", "seed", "adapter", "prompts", "max_length",
    "max_prompt_length", "truncate_prompts", "prompt_min_tokens", "prompt_max_tokens", "prepend_bos",
    "max_completion_length", "min_completion_length", "temperature", "reward", "num_generations", "beta",
    "adaptive_kl_target", "adaptive_kl_horizon", "missing_eos_penalty", "sft_coefficient",
    "num_ppo_epochs", "num_mini_batches", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "noised_baseline",
    "num_iterations", "cliprange_high", "scale_rewards", "loss_type",
    "method", "keep", "reward_temperature", "good", "bad", "engine",
}  # fmt: skip


def test_every_setting_is_honoured_or_refused():
    """A new one has to be put into one of the two."""
    known = {f.name for config in (PPOConfig, RLOOConfig, GRPOConfig, OfflineConfig) for f in fields(config)}
    assert known == HONOURED | set(OTHER) and not HONOURED & set(OTHER)
    assert all(set(OTHER) == set(config.of_private_prompts) for config in (PPOConfig, RLOOConfig, GRPOConfig, OfflineConfig))


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("source", ["self_written", "public:p.jsonl"])
def test_a_setting_of_private_prompts_is_refused_by_name(name, source):
    check_settings(PPOConfig(prompts=source, max_steps=1), "ppo")
    with pytest.raises(DPAlignError, match=f"^ppo: {name} is for private prompts.*leave {name} out"):
        check_settings(PPOConfig(prompts=source, max_steps=1, **{name: OTHER[name]}), "ppo")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": "theirs"}, "prompts 'theirs': expected private, self_written or public:PATH"),
        ({"prompts": "public:"}, "expected private, self_written or public:PATH"),
        ({"prompts": {"public": "a", "private": "b"}}, "expected private, self_written or public:PATH"),
        ({"prompts": "self_written"}, "say max_steps, the number of updates"),
        ({"prompts": "self_written", "max_steps": 1, "reward": RewardConfig(columns=["mood"])}, "reward.columns mood"),
    ],
)
def test_prompts_that_cannot_be(changes, sentence):
    with pytest.raises(DPAlignError, match=sentence):
        check_settings(PPOConfig(**changes), "ppo")


def test_a_mapping_names_a_file_too():
    assert PPOConfig(prompts={"public": "a.jsonl"}).prompts == "public:a.jsonl"
    assert PPOConfig(prompts="public:a.jsonl").public_prompts == "a.jsonl" and PPOConfig().public_prompts is None


REFUSED = {
    "records": ({"ppo_data": {"name": "r", "path": "data.jsonl"}}, "ppo_data.name, ppo_data.path names stage ppo"),
    "split": ({"split": {"sft": 0.5, "ppo": 0.5}}, "split names stage ppo, whose prompts are not private"),
    "allocation": ({"composition": "sequential", "allocation": {"sft": 1, "ppo": 1}}, "allocation names stage ppo"),
    "gone": (
        {"ppo": {"synthetic_steps": 3}},
        "synthetic_steps: prompts: self_written makes a stage's max_steps updates",
    ),
    "few": ({"ppo": {"prompts": "public:public.jsonl", "expected_batch_size": 21}}, "asks for 21 different prompts"),
    "missing": ({"ppo": {"prompts": "public:nowhere.jsonl"}}, "nowhere.jsonl"),
    "long": (
        {"ppo": {"prompt_max_tokens": 5}},
        "has 6 tokens with what stands around it, more than max_prompt_length 5",
    ),
    "shared": ({"ppo": {"prompts": "public:data.jsonl"}}, "data.jsonl (declared public)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_would_give_it_records_is_refused(case, tmp_path, capsys, monkeypatch):
    changes, sentence = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "public.jsonl", reviews(20, "public"))
    recipe = write_recipe(tmp_path, **{"ppo": OWN | changes.pop("ppo", {})} | changes)
    assert sentence in call(capsys, "run", recipe).error
    assert not (tmp_path / "ledger.sqlite").exists() or ledger_rows(tmp_path) == 0


def test_where_it_is_measured_may_be_said(tmp_path):
    shown = DataConfig(eval_path="p.jsonl", eval_is_public=True)
    Recipe(data=DataConfig(name="d"), sft=SFTConfig(), ppo=PPOConfig(**OWN), ppo_data=shown).check()


def test_a_trainer_takes_no_records(tmp_path):
    args = RLOOArguments(
        output_dir=str(tmp_path / "run"), prepend_bos=True, prompt_max_tokens=4, max_prompt_length=5,
        max_completion_length=6, **OWN | {"max_steps": 1},
    )  # fmt: skip
    privacy = Privacy(model_is_public=True, ledger=str(tmp_path / "ledger.sqlite"))
    for given, more, sentence in (
        (reviews(8), {}, "train_dataset is private, and with prompts self_written no record is read"),
        (None, {"dataset_name": "d"}, r"Privacy\(dataset_name=...\) is of private records"),
        (None, {"target_epsilon": 2.0}, "target_epsilon is for private prompts"),
    ):
        with pytest.raises(DPAlignError, match=sentence):
            DPRLOOTrainer(small_model(), args, given, privacy=Privacy(**asdict(privacy) | more), quiet=True)
    done = DPRLOOTrainer(small_model(), args, privacy=privacy, quiet=True).train()
    assert done["epsilon"] == 0 and done["stages"] == [] and ledger_rows(tmp_path) == 0


# Runs of before ------------------------------------------------------------------------------------------------


def test_a_run_that_was_begun_with_the_older_settings_goes_on(tmp_path):
    """Three settings are gone; where they did nothing, the settings are the same."""
    algorithm = ppo()
    stage = Stage(
        tiny_policy("gpt2"), algorithm, dataset(prompts()), folder=tmp_path, run="r", ledger=Ledger(":memory:")
    )
    settings = asdict(algorithm.config) | {"units": 8.0, "part": (0.0, 1.0)}
    settings["mechanism"] = stage.plan.mechanism().rounded()
    old = {
        name: value for name, value in (settings | GONE_SETTINGS).items() if name not in MACHINE_SETTINGS | {"prompts"}
    }
    assert hash_of(old) in stage.same_settings and hash_of(old | {"synthetic_steps": 16}) not in stage.same_settings
    assert isinstance(algorithm.config, TrainingConfig)
