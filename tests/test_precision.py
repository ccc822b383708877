"""`dtype: auto`: what is chosen, that it is written down, and that a run never changes it."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpalign import DPAlignError, DPSFTTrainer, Privacy, SFTConfig
from dpalign.models import ModelConfig, Policy, RewardModel, precision
from dpalign.models.precision import bfloat16_speedup, faster_dtype
from dpalign.privacy.statement import read_statement
from dpalign.recipe import Recipe
from dpalign.run import run_recipe
from dpalign.settings.data import DataConfig
from dpalign.settings.models import AdapterConfig
from dpalign.settings.sft import SFTConfig as SFTSection
from reader import small_model

HIDDEN = 16  # of the small model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def speedup(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many times as fast bfloat16 is found to be; a model of the tests is large enough to ask."""
    found = [3.0]
    monkeypatch.setattr(precision, "SMALL", HIDDEN)
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda: found[0])
    return found


# What is chosen ------------------------------------------------------------------------------------------------------


def test_the_faster_dtype_of_a_cpu(model: str, speedup: list[float]) -> None:
    chosen = []
    for speedup[0] in (3.0, 1.2, 1.02, 0.16):
        chosen.append(faster_dtype(ModelConfig(model), "cpu"))
    assert chosen == ["bfloat16", "bfloat16", "float32", "float32"]


def test_a_small_model_is_float32_and_nothing_is_tried(
    model: str, speedup: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "SMALL", HIDDEN + 1)
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda: pytest.fail("it was tried"))
    assert faster_dtype(ModelConfig(model), "cpu") == faster_dtype(ModelConfig(model), "cuda") == "float32"


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_is_asked_and_not_tried(
    model: str, speedup: list[float], monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str
) -> None:
    speedup[0] = 0.0 if native else 9.0
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert faster_dtype(ModelConfig(model), "cuda") == dtype


def test_trying_takes_half_a_second_and_leaves_nothing_behind() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    began = time.perf_counter()
    assert 0 < bfloat16_speedup() < 100
    assert time.perf_counter() - began < 5  # half a second; the machine may be busy
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_one_slow_moment_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians: float32 2 s and bfloat16 1 s, but for one of each that something else held up."""
    calls = {torch.float32: 0, torch.bfloat16: 0}

    class Layer:
        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def seconds(self) -> float:
            calls[self.dtype] += 1
            held_up = calls[self.dtype] == 3 and self.dtype is torch.bfloat16
            return 100.0 if held_up else 2.0 if self.dtype is torch.float32 else 1.0

    monkeypatch.setattr(precision, "_Layer", Layer)
    assert bfloat16_speedup() == 2.0
    assert calls[torch.float32] == calls[torch.bfloat16] == precision.ROUNDS + 1


def test_a_model_is_loaded_so(model: str, speedup: list[float]) -> None:
    assert Policy.load(ModelConfig(model)).model.dtype == torch.bfloat16
    assert RewardModel.load(ModelConfig(model)).model.dtype == torch.bfloat16
    assert Policy.load(ModelConfig(model, dtype="float32")).model.dtype == torch.float32
    speedup[0] = 0.5
    assert Policy.load(ModelConfig(model)).model.dtype == torch.float32


# A run ---------------------------------------------------------------------------------------------------------------


def recipe_in(folder: Path, model: str, dtype: str = "auto") -> Recipe:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"film number {i} was good"}) + "\n" for i in range(24)))
    sft = SFTSection(expected_batch_size=8, max_steps=2, micro_batch_size=8, max_length=8, adapter=AdapterConfig(r=1))
    return Recipe(
        output_dir=str(folder / "run"),
        ledger=str(folder / "ledger.sqlite"),
        model=ModelConfig(model, is_public=True, dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(name="films", path=str(data)),
        target_epsilon=8.0,
        sft=sft,
    )


def test_a_run_says_what_was_chosen_and_keeps_it(tmp_path: Path, model: str, speedup: list[float]) -> None:
    recipe = recipe_in(tmp_path, model)
    summary = run_recipe(recipe).to_json()
    stated = read_statement(tmp_path / "run" / "release")
    assert stated is not None
    assert summary["dtypes"] == stated[0]["dtypes"] == {"model": "bfloat16"}
    assert json.loads((tmp_path / "run/private/run.json").read_text())["dtypes"] == {"model": "bfloat16"}
    speedup[0] = 0.1  # the run goes on where bfloat16 is slow
    assert run_recipe(recipe).to_json()["dtypes"] == {"model": "bfloat16"}
    assert run_recipe(recipe_in(tmp_path, model, "bfloat16")).to_json()["dtypes"] == {"model": "bfloat16"}
    with pytest.raises(DPAlignError, match=r"model\.dtype is float32, and the run in .* was begun in bfloat16"):
        run_recipe(recipe_in(tmp_path, model, "float32"))


def test_a_run_that_has_trained_nothing_yet_may_be_told_another(
    tmp_path: Path, model: str, speedup: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object, **more: object) -> None:
        raise DPAlignError("stopped")

    with monkeypatch.context() as patch, pytest.raises(DPAlignError, match="stopped"):
        patch.setattr("dpalign.run.check_stage", stop)
        run_recipe(recipe_in(tmp_path, model))
    assert run_recipe(recipe_in(tmp_path, model, "float32")).to_json()["dtypes"] == {"model": "float32"}


def test_a_run_from_before_there_was_auto_stays_in_float32(tmp_path: Path, model: str, speedup: list[float]) -> None:
    run_recipe(recipe_in(tmp_path, model, "float32"))
    file = tmp_path / "run/private/run.json"
    value = json.loads(file.read_text())
    del value["dtypes"]
    file.write_text(json.dumps(value))
    assert run_recipe(recipe_in(tmp_path, model)).to_json()["dtypes"] == {"model": "float32"}


def test_a_stage_keeps_the_dtype_of_its_own_model(tmp_path: Path, model: str, speedup: list[float]) -> None:
    """A reward model's own base is among its stage's settings, which a run goes on with only if they are the same."""
    from dpalign.settings.reward_model import RewardModelConfig

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"chosen": f"good {i}", "rejected": f"bad {i}"}) + "\n" for i in range(24)))
    section = RewardModelConfig(
        expected_batch_size=8, max_steps=2, micro_batch_size=8, max_length=8, adapter=AdapterConfig(r=1),
        model=ModelConfig(model, is_public=True),
    )  # fmt: skip
    recipe = replace(
        recipe_in(tmp_path, model), sft=None, reward_model=section, data=DataConfig(name="pairs", path=str(pairs))
    )
    dtypes = {"model": "bfloat16", "reward_model.model": "bfloat16"}
    assert run_recipe(recipe).to_json()["dtypes"] == dtypes
    speedup[0] = 0.1
    assert run_recipe(recipe).to_json()["dtypes"] == dtypes


def test_a_trainers_model_is_what_it_was_trained_in(tmp_path: Path, model: str, speedup: list[float]) -> None:
    args = SFTConfig(output_dir=str(tmp_path / "run"), expected_batch_size=8, max_steps=1, max_length=8)
    privacy = Privacy(
        dataset_name="films", target_epsilon=8.0, model_is_public=True, ledger=str(tmp_path / "ledger.sqlite")
    )
    texts = [{"text": f"film number {i} was good"} for i in range(24)]
    trainer = DPSFTTrainer(model=model, args=args, train_dataset=texts, privacy=privacy, quiet=True)
    trainer.train()
    speedup[0] = 0.1
    assert trainer.privacy["dtypes"] == {"model": "bfloat16"}
    assert trainer.model.dtype == torch.bfloat16
