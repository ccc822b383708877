"""`dpalign evaluate`: models side by side on public prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ..algorithms import PPOConfig
from ..algorithms.rollouts import check_prompt_columns
from ..data.load import read_records
from ..errors import DPAlignError
from ..evaluation import evaluate_policy, public_prompts
from ..files import write_json
from ..models import ModelConfig, Policy
from ..reporting.tables import evaluation_table
from ..rewards import RewardConfig, load_reward
from .arguments import Parser

DESCRIPTION = """Samples one completion per public prompt from each model and reports reward, KL to the base model (nats
per completion), perplexity under the base model, distinct-2 and length. The numbers are exact, so the prompts must
be declared public with --eval_is_public."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns one row per model."""
    parser = Parser(prog="dpalign evaluate", description=DESCRIPTION)
    parser.add_argument("models", nargs="+", help="releases or base models")
    parser.add_argument("--data", required=True, help="file with `prompt`, or `text` to cut prompts from")
    parser.add_argument("--eval_is_public", action="store_true", help="declare the prompts public")
    parser.add_argument("--reward", default="vader", help="vader, classifier:PATH or module:function")
    parser.add_argument("--reward_is_public", action="store_true", help="declare any reward but vader public")
    parser.add_argument("--reward_low", type=float, help="declared range of the reward, for module:function")
    parser.add_argument("--reward_high", type=float)
    parser.add_argument(
        "--reward_columns", nargs="*", default=[], help="columns of the data that the function is given"
    )
    parser.add_argument("--prompt_tokens", type=int, help="cut `text` into prompts of this many tokens")
    parser.add_argument("--max_prompt_length", type=int, default=64)
    parser.add_argument("--max_completion_length", type=int, default=16)
    parser.add_argument("--prepend_bos", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="also write the result to this JSON file")
    given = parser.parse_args(arguments)
    if not given.eval_is_public:
        raise DPAlignError("evaluation is exact and shows no noise: declare the prompts public with --eval_is_public.")
    config = PPOConfig(
        max_prompt_length=given.max_prompt_length, max_completion_length=given.max_completion_length,
        prompt_max_tokens=given.prompt_tokens, prepend_bos=given.prepend_bos,
        reward=RewardConfig(
            source=given.reward, is_public=given.reward_is_public, low=given.reward_low, high=given.reward_high,
            columns=given.reward_columns,
        ),
    )  # fmt: skip
    reward = load_reward(config.reward)
    records = read_records(given.data)
    rows: dict[str, dict[str, Any]] = {}
    for model in given.models:
        policy = Policy.load(ModelConfig(name_or_path=model))
        check_prompt_columns(policy, records, given.data, config)
        prompts = public_prompts(policy, records, config)
        rows[model] = evaluate_policy(policy, prompts, reward, config, seed=given.seed)[0].as_dict()
    result = {"data": given.data, "reward": given.reward, "models": rows}
    if given.output:
        write_json(Path(given.output), result)
    if not as_json:
        Console(highlight=False).print(evaluation_table(rows))
    return result
