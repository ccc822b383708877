"""One DP-RLOO iteration of dpalign against one iteration of the newest TRL's non-private RLOOTrainer.

    make bench-setup && python benchmarks/rloo_iteration.py --json

Both: the same GPT-2 (random weights), LoRA r=4 on the attention projection, the same 32 prompts of 8 tokens, 4
completions of exactly 24 sampled tokens each, a KL penalty against the reference, one pass over the batch, one
optimiser step, the same trivial reward on the decoded text, 2 threads. Ours clips per prompt and adds noise; TRL does
neither. TRL trains 32 rows at a time, gradients accumulated to one step, without recomputing activations.

TRL lives in `.venv-trl-new` (with the same torch, transformers and peft) and trains in a child process
(`trl_rloo_worker.py`), which waits before each of its steps. After a warm-up each, the two alternate iteration by
iteration (A B, B A, ...). `ratio` is the median over pairs of ours / TRL's.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits sleeps instead of spinning

from iteration import compare, length_reward, options

from dpalign.algorithms.rloo import RLOO, RLOOConfig
from dpalign.models import AdapterConfig
from dpalign.rewards import Reward


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, ".venv-trl-new")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=4, help="completions of a prompt")
    args = parser.parse_args(arguments)

    def ours() -> RLOO:
        config = RLOOConfig(
            expected_batch_size=args.prompts,
            num_generations=args.generations,
            micro_batch_size=args.micro_batch_size,
            max_prompt_length=args.prompt_tokens,
            max_completion_length=args.new_tokens,
            min_completion_length=args.new_tokens,
            adapter=AdapterConfig(r=args.rank),
        )
        return RLOO(config, Reward(length_reward, 0.0, 1.0))

    compare(args, "trl_rloo_worker.py", ours, rows=args.prompts * args.generations)


if __name__ == "__main__":
    main()
