"""Where one iteration of DP-PPO, DP-RLOO or DP-SFT spends its seconds and bytes, on CPU or GPU (random weights).

    python benchmarks/profile_iteration.py --model gpt2 smollm2 --device cuda --dtype bfloat16 --output profile.jsonl
    python benchmarks/profile_iteration.py --model tiny --prompts 64

Three variants run over the same number of rows and tokens, every completion at full length:

private      `dpalign.training.Stage` itself, noise multiplier 1; its parts are timed by wrapping the library's methods;
nonprivate   the same loop with `clipping: none` and `target_epsilon: inf`;
plain        transformers and peft alone: `generate(do_sample=True)`, mean log-likelihood, AdamW. It trains the same
             adapter; for ppo it also decodes, scores and computes reference log-probabilities. rloo's would be ppo's.

An iteration is one optimiser step on `--prompts` rows (rloo: half as many prompts, two rollouts each; a micro-batch
counts prompts there), from the first prompt to the update: no journal, accountant or checkpoint. After a warm-up on one
micro-batch (on a CPU of at most 16 new tokens), `--repeats` iterations run freely (`iteration_s`), and as many with a
synchronisation at every change of part (`seconds`); both are medians. `floor_s` is what the forward passes that nothing
can spare take in the same micro-batches: four for ppo and rloo (sample, reference, forward, and the backward pass of a
frozen base), two for sft.

`peak_bytes` is the most memory in use during a part: allocated on the GPU, and on a CPU the process's highest resident
set until then. `share_of_peak` counts 2 FLOPs per parameter and token (prompt included) for a forward pass and 4 for
forward and backward, over seconds and the card's rate. Each result is one line of `--output`; those there are skipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from models import word_tokenizer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dpalign.algorithms import PPOConfig, RLOOConfig, SFTConfig
from dpalign.algorithms.base import Algorithm, Rows
from dpalign.algorithms.ppo import PPO
from dpalign.algorithms.rloo import RLOO
from dpalign.algorithms.sft import SFT
from dpalign.data import UnitDataset
from dpalign.models import AdapterConfig, Policy, embedded
from dpalign.models.kernels import chunks
from dpalign.privacy.ledger import Ledger
from dpalign.privacy.mechanism import GaussianMechanism
from dpalign.privacy.parts import Part
from dpalign.rewards import Reward
from dpalign.training import Stage

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
SHAPES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_layer=24, n_embd=1024, n_head=16),
    "gpt2-large": GPT2Config(n_layer=36, n_embd=1280, n_head=20),
    "smollm2": SMOLLM2,
    "tiny": None,  # tiny-review-lm with its own weights
}
TRAINING = ("batching", "forward", "backward", "clip", "noise", "step")
PARTS = ("generation", "reward", "reference", *TRAINING, "other")
VARIANTS = ("private", "nonprivate", "plain")
PEAK = {"bfloat16": 989e12, "float32": 67e12}  # FLOP/s of an H100 or H200: dense, and fp32 without tf32
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Job:
    """What a line of the output is about; its first columns."""

    model: str
    algorithm: str
    variant: str
    device: str
    dtype: str
    prompts: int
    prompt_tokens: int
    completion_tokens: int
    micro_batch_size: int
    repeats: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def learned(self) -> int:
        """Tokens of a row that the loss reads."""
        return self.tokens - 1 if self.algorithm == "sft" else self.completion_tokens

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass
class Clock:
    """First iterations as they are, then iterations taken apart: at each moment of those exactly one part runs."""

    job: Job
    whole: list[float] = field(default_factory=list)
    apart: list[dict[str, float]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    part: str | None = None  # that runs, while an iteration is taken apart

    def start(self) -> None:
        if len(self.whole) == self.job.repeats:
            self.apart.append(dict.fromkeys(PARTS, 0.0))
            self.part = "other"
            self._peak()
        self.since = self.now()

    def switch(self, part: str) -> None:
        if self.part is not None:
            now = self.now()
            self.apart[-1][self.part] += now - self.since
            self.peaks[self.part] = max(self.peaks.get(self.part, 0), self._peak())
            self.part, self.since = part, now

    def stop(self) -> None:
        if self.part is None:
            self.whole.append(self.now() - self.since)
        self.switch("other")
        self.part = None

    def now(self) -> float:
        if self.job.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int:
        if not self.job.on_gpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def timed(self, part: str, function: Callable[..., Any], after: str = "other") -> Callable[..., Any]:
        """`function` as `part`; what follows it is `after`."""

        def call(*args: Any, **options: Any) -> Any:
            self.switch(part)
            try:
                return function(*args, **options)
            finally:
                self.switch(after)

        return call


@contextmanager
def observed(algorithm: type[Algorithm], clock: Clock) -> Iterator[None]:
    """Within the block the clock is told which part of the library runs."""
    rows, reference = algorithm.rows, Policy.reference

    @contextmanager
    def timed_reference(policy: Policy) -> Iterator[None]:
        clock.switch("reference")
        with reference(policy):
            yield
        clock.switch("other")

    def first(*args: Any) -> Rows:
        clock.start()
        return rows(*args)

    wrapped = {
        (algorithm, "rows"): first,
        (Policy, "sample"): clock.timed("generation", Policy.sample),
        (Policy, "decode"): clock.timed("reward", Policy.decode),
        (Reward, "__call__"): clock.timed("reward", Reward.__call__),
        (Policy, "reference"): timed_reference,
        (Rows, "of"): clock.timed("batching", Rows.of),
        (algorithm, "row_losses"): clock.timed("forward", algorithm.row_losses, after="backward"),  # until the clip
        (GaussianMechanism, "add"): clock.timed("clip", GaussianMechanism.add),
        (GaussianMechanism, "release"): clock.timed("noise", GaussianMechanism.release),
    }
    with ExitStack() as stack:
        for (owner, name), function in wrapped.items():
            stack.enter_context(patch.object(owner, name, function))
        stack.callback(register_optimizer_step_pre_hook(lambda *_: clock.switch("step")).remove)
        stack.callback(register_optimizer_step_post_hook(lambda *_: clock.stop()).remove)
        yield


def run_library(job: Job, policy: Policy, clock: Clock) -> None:
    units = job.prompts // 2 if job.algorithm == "rloo" else job.prompts
    options: dict[str, Any] = {"expected_batch_size": units, "max_steps": 2 * job.repeats}  # every unit, every step
    options |= {"micro_batch_size": job.micro_batch_size, "learning_rate": LEARNING_RATE}
    none = {"target_epsilon": math.inf, "clipping": "none"}
    options |= {"noise_multiplier": 1.0} if job.variant == "private" else none
    column, words = "prompt", job.prompt_tokens
    if job.algorithm == "sft":
        column, words = "text", job.tokens
        algorithm: Algorithm = SFT(SFTConfig(max_length=job.tokens, **options))
    else:
        options |= {"max_prompt_length": job.prompt_tokens, "max_completion_length": job.completion_tokens}
        options |= {"min_completion_length": job.completion_tokens}
        reward = Reward(share_of_sevens, 0.0, 1.0)
        rloo = job.algorithm == "rloo"
        algorithm = RLOO(RLOOConfig(**options), reward) if rloo else PPO(PPOConfig(**options), reward)
    chance, vocabulary = random.Random(0), policy.model.config.vocab_size
    texts = [" ".join(f"w{chance.randrange(1, vocabulary)}" for _ in range(words)) for _ in range(units)]
    data = UnitDataset(
        part=Part("profile"),
        units=[[{column: text}] for text in texts],
        ids=[str(unit).encode() for unit in range(units)],
        declared_units=float(units),
        unit="record",
        fingerprint="none",
    )
    with tempfile.TemporaryDirectory() as folder, observed(type(algorithm), clock):
        ledger = Ledger(":memory:")
        Stage(policy, algorithm, data, folder=Path(folder), run="profile", ledger=ledger).train()


def run_plain(job: Job, policy: Policy, clock: Clock) -> None:
    policy.add_adapter("plain", AdapterConfig())
    model = policy.model  # a PeftModel with ordinary linear layers
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    lengths = {"min_new_tokens": job.completion_tokens, "max_new_tokens": job.completion_tokens}
    sampling = lengths | {"do_sample": True, "top_k": 0, "eos_token_id": 0, "pad_token_id": 0}
    rows_at_once = 256 if policy.model.dtype == torch.float32 else job.micro_batch_size  # about as the library
    given, width = random_ids(job, policy), job.learned

    def loss_of(ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids[:, :-1])
        logits = model(input_ids=ids[:, :-1], attention_mask=mask, logits_to_keep=width).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, -width:].flatten())

    for _ in range(2 * job.repeats):
        clock.start()
        ids = given
        if job.algorithm != "sft":
            clock.switch("generation")
            prompts = given[:, : job.prompt_tokens].split(rows_at_once)
            ids = torch.cat([model.generate(p, attention_mask=torch.ones_like(p), **sampling) for p in prompts])
            clock.switch("reward")
            share_of_sevens([], policy.tokenizer.batch_decode(ids[:, -width:], skip_special_tokens=True))
            clock.switch("reference")
            with torch.no_grad(), model.disable_adapter():
                for chunk in ids.split(job.micro_batch_size):
                    loss_of(chunk)
        for chunk in ids.split(job.micro_batch_size):
            clock.switch("forward")
            loss = loss_of(chunk) * len(chunk) / len(ids)
            clock.switch("backward")
            loss.backward()
        clock.switch("step")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop()


def share_of_sevens(prompts: list[str], completions: list[str]) -> list[float]:
    return [text.count("7") / max(1, len(text)) for text in completions]


def random_ids(job: Job, policy: Policy) -> Tensor:
    return torch.randint(1, policy.model.config.vocab_size, (job.prompts, job.tokens), device=policy.device)


@torch.no_grad()
def forward_pass(job: Job, policy: Policy, clock: Clock) -> float:
    """Seconds of one forward pass over all rows."""
    ids, times = random_ids(job, policy)[:, :-1], []
    for _ in range(job.repeats):
        start = clock.now()
        for chunk, _ in chunks(len(ids), job.micro_batch_size):
            policy(ids[chunk], torch.ones_like(ids[chunk]), job.learned)
        times.append(clock.now() - start)
    return statistics.median(times)


def build(job: Job) -> Policy:
    if job.on_gpu:
        gc.collect()  # the policy of the run before is part of a cycle
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    dtype, shape = getattr(torch, job.dtype), SHAPES[job.model]
    if shape is None:
        base = AutoModelForCausalLM.from_pretrained(embedded.resolve(embedded.TINY_REVIEW_LM), dtype=dtype)
    else:
        with torch.device(job.device):  # quicker there
            base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    return Policy(base.to(job.device), word_tokenizer(base.config.vocab_size))


def run(job: Job) -> dict[str, Any]:
    """The measurements of a job, at its micro-batch size."""
    policy, clock = build(job), Clock(job)
    parameters = policy.model.num_parameters()
    forward = forward_pass(job, policy, clock)
    (run_plain if job.variant == "plain" else run_library)(job, policy, clock)
    seconds = {part: statistics.median(lap[part] for lap in clock.apart) for part in PARTS if part in clock.peaks}
    iteration, training = statistics.median(clock.whole), sum(seconds.get(part, 0.0) for part in TRAINING)
    passes, work = 2 if job.algorithm == "sft" else 4, 2 * parameters * job.prompts * job.tokens
    rates = {"iteration": passes * work / iteration, "training": 2 * work / training, "forward_pass": work / forward}
    result = {"parameters": parameters, "iteration_s": iteration, "floor_s": passes * forward, "seconds": seconds}
    result |= {"peak_bytes": clock.peaks, "training_tokens_per_s": job.prompts * job.tokens / training}
    if "generation" in seconds:
        result["generated_tokens_per_s"] = job.prompts * job.completion_tokens / seconds["generation"]
        rates["generation"] = work / seconds["generation"]
    known = job.on_gpu and {"H100", "H200"} & set(torch.cuda.get_device_name().split())
    result["share_of_peak"] = {name: rate / PEAK[job.dtype] for name, rate in rates.items()} if known else None
    return result


def measure(job: Job) -> dict[str, Any]:
    """The line of a job. Where memory runs out the micro-batch is halved, and the line says so."""
    line = asdict(job) | {"card": torch.cuda.get_device_name() if job.on_gpu else "cpu", "torch": torch.__version__}
    size = job.micro_batch_size
    while True:
        try:
            tokens = job.completion_tokens if job.on_gpu else min(job.completion_tokens, 16)
            few = {"prompts": max(2, min(job.prompts, size)), "completion_tokens": tokens}
            run(replace(job, micro_batch_size=size, repeats=1, **few))  # warm-up
            return line | {"micro_batch_size_used": size} | run(replace(job, micro_batch_size=size))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2


def print_table(lines: list[dict[str, Any]]) -> None:
    texts = ("model", "algorithm", "variant", "dtype", "rows x tokens", "micro")
    numbers = ("iteration s", "floor s", *PARTS, "GiB", "generated/s", "trained/s", "of peak")
    table = Table(*texts)
    for number in numbers:
        table.add_column(number, justify="right")
    for line in lines:
        asked, used, seconds = line["micro_batch_size"], line["micro_batch_size_used"], line["seconds"]
        cells = [*(line[text] for text in texts[:4])]
        cells += [f"{line['prompts']} x {line['prompt_tokens']}+{line['completion_tokens']}"]
        cells += [str(used) if used == asked else f"{used} ({asked}: out of memory)"]
        cells += [f"{line[name]:.3f}" for name in ("iteration_s", "floor_s")]
        cells += [f"{seconds[part]:.3f}" if part in seconds else "" for part in PARTS]
        cells += [f"{max(line['peak_bytes'].values()) / 2**30:.2f}", f"{line.get('generated_tokens_per_s', 0):,.0f}"]
        cells += [f"{line['training_tokens_per_s']:,.0f}"]
        cells += [f"{line['share_of_peak']['iteration']:.1%}" if line["share_of_peak"] else ""]
        table.add_row(*cells)
    Console(width=None if Console().is_terminal else 240).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=["tiny"])
    parser.add_argument("--algorithms", nargs="+", choices=["ppo", "rloo", "sft"], default=["ppo", "rloo", "sft"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(PEAK), default="float32")
    parser.add_argument("--prompts", type=int, default=4096, help="rows of an iteration: an even number")
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--completion_tokens", type=int, default=16)
    parser.add_argument("--micro_batch_size", type=int, default=PPOConfig.micro_batch_size)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON lines to add to; default: the table only")
    parser.add_argument("--show", type=Path, help="print the table of such a file, and measure nothing")
    options = vars(parser.parse_args(arguments))
    shown = options.pop("show")
    if shown:
        print_table([json.loads(line) for line in shown.read_text(encoding="utf-8").splitlines()])
        return
    if options["prompts"] < 2 or options["prompts"] % 2 or options["repeats"] < 1:
        parser.error("--prompts must be a positive even number, and --repeats at least 1.")
    if options["device"].startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here: use --device cpu.")
    models, algorithms, variants, output = (options.pop(n) for n in ("model", "algorithms", "variants", "output"))
    jobs = [Job(m, algorithm, v, **options) for m in models for algorithm in algorithms for v in variants]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    known = output.read_text(encoding="utf-8").splitlines() if output and output.exists() else []
    lines = [json.loads(line) for line in known]
    for job in jobs:
        done = any(asdict(job).items() <= line.items() for line in lines)
        if done or (job.algorithm, job.variant) == ("rloo", "plain"):
            continue
        lines.append(measure(job))
        if output:
            with open(output, "a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print_table(lines)


if __name__ == "__main__":
    main()
