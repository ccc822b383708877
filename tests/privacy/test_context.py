"""A private step computes in a context of its own: what a caller has switched on around it changes no bit of a release."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from harness import pairs, ppo, prompts, reward, sft, texts
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpalign import DPSFTTrainer, Privacy, SFTConfig
from dpalign.algorithms import SamplingConfig
from dpalign.errors import DPAlignError
from dpalign.evaluation.private import MeasurementConfig, measure_privately
from dpalign.models import AdapterConfig, Policy, RewardModel
from dpalign.privacy.context import own_context
from dpalign.privacy.entropy import SeededEntropy
from dpalign.privacy.ledger import Ledger
from dpalign.rewards import Reward, RewardConfig
from dpalign.training import Stage, plan_stage
from tiny import dataset, tiny_base, tiny_policy, tiny_tokenizer, words


@contextmanager
def switched(get: Callable, put: Callable, value: object) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Set by its backend, for which torch has no name."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


AROUND: dict[str, Callable[[], AbstractContextManager]] = {
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "float64": partial(switched, torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "anomaly": torch.autograd.detect_anomaly,
    "medium": partial(switched, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "bf16": bfloat16_products,
    "device": partial(torch.device, "meta"),
    "kernel": partial(sdpa_kernel, [SDPBackend.MATH]),
}
SEEDED = {"insecure_seed": 3, "noise_multiplier": 0.1, "max_steps": 2, "micro_batch_size": 3}
STAGES = {"sft": (sft, texts), "ppo": (ppo, prompts), "reward_model": (reward, pairs)}


def trained(stage: str, folder: Path) -> dict[str, torch.Tensor]:
    """Adapter and heads after two steps with known coins; one record has a score that is not a number."""
    make, units = STAGES[stage]
    algorithm = make(**SEEDED)
    with own_context():  # the caller's model and data: what they were made in is another affair
        records = units()
        if stage == "ppo":
            records[0][0]["score"] = float("nan")
        model: Policy | RewardModel = tiny_policy("llama")
        model = RewardModel.from_policy(model, algorithm.config.text) if stage == "reward_model" else model
    Stage(model, algorithm, dataset(records), folder=folder, run="run", ledger=Ledger(":memory:")).train()
    return {name: tensor.clone() for name, tensor in model.stage_state().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("around", AROUND)
def test_a_stage_ends_with_the_same_bits(tmp_path, stage, around):
    plain = trained(stage, tmp_path / "plain")
    with AROUND[around]():
        inside = trained(stage, tmp_path / "inside")
    assert same(plain, inside)


@pytest.mark.parametrize("around", AROUND)
def test_a_private_measurement_gives_the_same_number(tmp_path, around):
    def measured(folder: Path) -> dict:
        settings = SamplingConfig(max_prompt_length=8, max_completion_length=6, reward=RewardConfig(columns=["score"]))
        plan = plan_stage("measurement", MeasurementConfig(noise_multiplier=2.0), 8.0)
        with own_context():
            policy, data = tiny_policy("llama"), dataset(prompts())
            policy.add_adapter("ppo", AdapterConfig(r=2))
        reads = Reward(
            lambda prompts, completions, score: [
                len(set(c.split())) + s for c, s in zip(completions, score, strict=True)
            ],
            -9,
            99,
        )
        with patch("dpalign.privacy.gate.SystemEntropy", lambda: SeededEntropy(5)):
            return measure_privately(
                policy, data, plan, reads, settings, folder=folder, run="run", ledger=Ledger(":memory:")
            )  # fmt: skip

    plain = measured(tmp_path / "plain")
    with AROUND[around]():
        assert measured(tmp_path / "inside") == plain


def trainer(folder: Path, model: object) -> DPSFTTrainer:
    with own_context():
        rows = [{"text": words(6, seed)} for seed in range(32)]
    settings = {"output_dir": str(folder), "max_length": 12, "expected_batch_size": 8, "adapter": AdapterConfig(r=2)}
    return DPSFTTrainer(
        model, SFTConfig(**settings, **SEEDED), rows,
        processing_class=None if isinstance(model, str) else tiny_tokenizer(), quiet=True,
        privacy=Privacy(dataset_name="toy", model_is_public=True, ledger=str(folder) + ".sqlite"),
    )  # fmt: skip


@pytest.mark.parametrize("around", ["autocast", "float64", "inference", "device"])
def test_a_model_is_loaded_and_released_in_it_too(tmp_path, around):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    released = []
    with patch("dpalign.privacy.ledger.secrets.token_bytes", bytes):  # the same order of units
        trainer(tmp_path / "plain", str(tmp_path / "base")).train()
        with AROUND[around]():
            trainer(tmp_path / "inside", str(tmp_path / "base")).train()
    for run in ("plain", "inside"):
        released.append(load_file(tmp_path / run / "release" / "adapter_model.safetensors"))
    assert same(*released)


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        base = tiny_base("gpt2")
    with pytest.raises(DPAlignError, match="inference_mode"):
        Policy(base, tiny_tokenizer())


@pytest.mark.parametrize("around", AROUND)
def test_what_was_there_is_put_back(around):
    def state() -> tuple:
        matmul = torch.backends.mkldnn.matmul.fp32_precision
        return (
            torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), torch.is_grad_enabled(), matmul,
            torch.is_inference_mode_enabled(), torch.is_anomaly_enabled(), torch.get_default_device(),
            torch.backends.cuda.flash_sdp_enabled(), torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    with AROUND[around]():
        before = state()
        with pytest.raises(KeyError), own_context(), own_context():
            within = state()
            raise KeyError
        assert state() == before
    assert within == (False, torch.float32, True, "ieee", False, False, torch.device("cpu"), True, False)


def test_kernels_of_a_cpu_are_asked_for_nothing():
    """A CPU's sums have an order of their own; and what the caller asked for is put back."""
    torch.use_deterministic_algorithms(True)
    try:
        with own_context():
            within = torch.are_deterministic_algorithms_enabled()
        assert within == torch.cuda.is_available() and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
