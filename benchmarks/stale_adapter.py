"""Is an engine that goes on with the adapter of before found in one step?

    python benchmarks/stale_adapter.py --json
    python benchmarks/stale_adapter.py --model tiny-review-lm --trials 10 --processes 0 --json

A trial begins as a stage does, with a new adapter whose B is zero, and takes one step of AdamW (learning rate 3e-3, a
random gradient: the smallest step that a run takes). Then the adapter is pushed to a server that acknowledges it and goes
on with the one before: a miss is a push that is accepted. The same push to the same server, mended, must be accepted: a
false alarm is one that is not. Most trials have the server in a thread of this process, all of it over HTTP; those of
`--processes` start one of its own. The server is plain transformers and peft, with vLLM's calls (engine_server.py).

`smallest_move` is what a step moved the probe's log-probabilities by, root mean square in nats; `rounding` is what they
differ by anyway; `shares` are the engine's share of the trainer's change, furthest from what it should be: 0 and 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from engine_server import Served, serve
from models import word_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpalign.engines import Engine
from dpalign.engines.verified import rms
from dpalign.errors import EngineError
from dpalign.models import AdapterConfig, ModelConfig, Policy, embedded
from dpalign.settings.engine import EngineConfig
from dpalign.settings.rollouts import SamplingConfig

CONFIG = SamplingConfig(max_prompt_length=24, max_completion_length=8)
LEARNING_RATE = 3e-3
LOADS = 3  # before the step: two that are tried, and the new adapter


def random_model(folder: Path) -> str:
    """A Llama of two layers whose words have very different probabilities, as a trained one's."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.2)).save_pretrained(folder)
    word_tokenizer(96).save_pretrained(folder)
    return str(folder)


def engine_for(policy: Policy, url: str) -> Engine:
    engine = Engine(EngineConfig(url=url))
    engine.begin(policy, CONFIG)
    engine.try_pushes(policy, AdapterConfig())
    return engine


def new_adapter(policy: Policy, engine: Engine, seed: int) -> None:
    torch.manual_seed(seed)
    policy.add_adapter("ppo", AdapterConfig())
    engine.push(policy)


def step(policy: Policy) -> None:
    trained = [p for p in policy.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(trained, lr=LEARNING_RATE).step()
    for p in trained:
        p.grad = None


def is_accepted(policy: Policy, engine: Engine) -> bool:
    try:
        engine.push(policy)
    except EngineError:
        return False
    return True


@contextmanager
def in_a_thread(model: str, dtype: str) -> Iterator[tuple[Served, str]]:
    served = Served(AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)))
    server = serve(served)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def in_a_process(model: str, *more: str) -> Iterator[str]:
    script = str(Path(__file__).with_name("engine_server.py"))
    process = subprocess.Popen([sys.executable, script, model, *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def trials_in_a_thread(model: str, dtype: str, trials: int) -> dict[str, Any]:
    policy = Policy.load(ModelConfig(model, is_public=True, dtype=dtype))
    found = alarms = 0
    moves, stale, fresh = [], [], []
    with in_a_thread(model, dtype) as (served, url):
        engine = engine_for(policy, url)
        rounding = engine.agreement.rounding
        for trial in range(trials):
            new_adapter(policy, engine, trial)
            step(policy)
            served.planted = "stale"
            before = engine.agreement.trainer, engine.agreement.engine
            found += not is_accepted(policy, engine)
            ours, theirs = engine._answers(policy)
            stale.append(engine.agreement._share(ours - before[0], theirs - before[1]))
            served.planted = None
            engine.close()
            alarms += not is_accepted(policy, engine)
            ours, theirs = engine._answers(policy)
            fresh.append(engine.agreement._share(ours - before[0], theirs - before[1]))
            moves.append(rms(ours - before[0]))
            policy.finish_stage()
            policy.drop_newest()
        engine.close()
    return {
        "found": found,
        "false_alarms": alarms,
        "smallest_move": min(moves),
        "rounding": rounding,
        "undecided": sum(share is None for share in stale),
        "shares": [
            max((share for share in stale if share is not None), key=abs, default=None),
            max((share for share in fresh if share is not None), key=lambda share: abs(share - 1), default=None),
        ],
    }


def trial_in_a_process(model: str, seed: int) -> bool:
    policy = Policy.load(ModelConfig(model, is_public=True, dtype="float32"))
    with in_a_process(model, "--fault", "stale", "--after", str(LOADS + 1)) as url:
        engine = engine_for(policy, url)
        new_adapter(policy, engine, seed)
        step(policy)
        accepted = is_accepted(policy, engine)
        engine.close()
    return not accepted


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, or tiny-review-lm (default: a random one of two layers)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--trials", type=int, default=100, help="in each dtype")
    parser.add_argument("--processes", type=int, default=3, help="trials with a server in a process of its own")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        model = random_model(Path(temporary)) if given.model is None else str(embedded.resolve(given.model))
        each = {dtype: trials_in_a_thread(model, dtype, given.trials) for dtype in given.dtypes}
        apart = sum(trial_in_a_process(model, seed) for seed in range(given.processes))
    for dtype, row in each.items():
        print(f"{dtype}: {row['found']} of {given.trials} found, {row['false_alarms']} false alarms; {row}")
    print(f"in a process of its own: {apart} of {given.processes} found")
    if given.json:
        rows = [row["found"] for row in each.values()]
        alarms = sum(row["false_alarms"] for row in each.values())
        trials = given.trials * len(rows) + given.processes
        print(json.dumps({"trials": trials, "found": sum(rows) + apart, "false_alarms": alarms, **each}))


if __name__ == "__main__":
    main()
