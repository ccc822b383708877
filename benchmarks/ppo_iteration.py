"""One DP-PPO iteration of dpalign against one iteration of TRL 0.11.4's non-private PPOTrainer.

    make bench-setup && python benchmarks/ppo_iteration.py --json

Both: the same GPT-2 (random weights), LoRA r=4 on the attention projection, a value head, the same 128 prompts
of 8 tokens, exactly 24 sampled tokens each, one pass over the batch, one optimiser step, the same trivial
reward on the decoded text, 2 threads. Ours clips per prompt and adds noise; TRL does neither. TRL runs with the
mini-batch size that is fastest for it here (32, gradients accumulated to one step); ours with its default.

TRL needs older libraries, so it lives in `.venv-trl` and runs in a child process (`trl_ppo_worker.py`). After a
warm-up each, the two alternate iteration by iteration (A B, B A, ...); the idle one is blocked on a pipe.
OpenMP threads of both sleep while they wait (`OMP_WAIT_POLICY`), so that neither spins into the other's turn.
`ratio` is the median over pairs of ours / TRL's.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits sleeps instead of spinning

from iteration import compare, length_reward, options

from dpalign.algorithms.ppo import PPO, PPOConfig
from dpalign.models import AdapterConfig
from dpalign.rewards import Reward


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, ".venv-trl")
    parser.add_argument("--prompts", type=int, default=128)
    args = parser.parse_args(arguments)

    def ours() -> PPO:
        config = PPOConfig(
            expected_batch_size=args.prompts,
            micro_batch_size=args.micro_batch_size,
            max_prompt_length=args.prompt_tokens,
            max_completion_length=args.new_tokens,
            min_completion_length=args.new_tokens,
            adapter=AdapterConfig(r=args.rank),
        )
        return PPO(config, Reward(length_reward, 0.0, 1.0))

    compare(args, "trl_ppo_worker.py", ours, rows=args.prompts)


if __name__ == "__main__":
    main()
