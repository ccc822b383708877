"""Chats from end to end: a chat model learns from people's polite e-mails, and from their judgement, under one epsilon.

    .venv/bin/python benchmarks/chat_emails.py --emails email_rewrites.jsonl.gz --output_dir runs/chat_emails

--emails: JSON lines with `original` and `revised`, an e-mail and what a person made of it to be more polite (and
`person`); 1,881 such pairs by 228 people are in Jiaxin-Pei/Potato-Prolific-Dataset. They become chats: "Make this e-mail
more polite: ..." and the revised e-mail as the answer (SFT, on `messages`), the revised answer against the original one
(the reward, on chat pairs), and as prompts of RLOO 200 originals that count as public. 300 more are held out and public.
The unit is one e-mail; with --unit person all of a person's. The model is SmolLM2-135M-Instruct (fetched through pip) with
its own chat template. One line of JSON is appended to --record for each finished run; `--epsilon inf` is without privacy.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

import yaml

from dpalign.cli import main as dpalign
from dpalign.models import smollm2

ASKED = "Make this e-mail more polite:\n\n"
LONGEST = 600  # characters of an e-mail; longer ones are left out
PUBLIC_PROMPTS, HELD_OUT = 200, 300


def chat(original: str, revised: str, person: str) -> dict[str, object]:
    """One record with the columns of every stage."""
    asked = [{"role": "user", "content": ASKED + original}]
    good, bad = ([{"role": "assistant", "content": text}] for text in (revised, original))
    return {"person": person, "messages": asked + good, "prompt": asked, "chosen": good, "rejected": bad}


def write(emails: Path, folder: Path) -> tuple[int, int]:
    """private.jsonl, prompts.jsonl and public.jsonl; sizes of the first two. An e-mail without a person is one's own."""
    with gzip.open(emails, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if max(len(row["original"]), len(row["revised"])) <= LONGEST]
    random.Random(0).shuffle(rows)
    chats = [chat(row["original"], row["revised"], row["person"] or f"nobody{i}") for i, row in enumerate(rows)]
    held, prompts = HELD_OUT * len(chats) // 1881, PUBLIC_PROMPTS * len(chats) // 1881
    parts = {"public": chats[:held], "prompts": chats[held : held + prompts], "private": chats[held + prompts :]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = [json.dumps({"prompt": c["prompt"]} if name == "prompts" else c) + "\n" for c in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(parts["private"]), prompts


def recipe(args: argparse.Namespace, model: str, data: Path, units: int, prompts: int) -> dict[str, object]:
    """SFT, one query for the reward, RLOO on public prompts: the last draws nothing, so the first two have everyone."""
    people = {"unit": "person", "max_records_per_unit": 16} if args.unit == "person" else {}
    public = {"eval_path": str(data / "public.jsonl"), "eval_is_public": True}
    batch = max(1, min(256, units // 3))
    return {
        "output_dir": str(args.output_dir),
        "model": {"name_or_path": model, "is_public": True, "dtype": args.dtype},
        "data": {"name": f"chat-emails-{args.unit}", "path": str(data / "private.jsonl"), **people, **public},
        "target_epsilon": args.epsilon,
        "target_delta": 1e-5,
        "eval_prompts": args.eval_prompts,
        "sft": {
            "expected_batch_size": batch,
            "max_steps": args.steps,
            "micro_batch_size": args.micro_batch_size,
            "max_length": 256,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
            "adapter": {"r": 1},
        },
        "reward_query": {"max_length": 320, "micro_batch_size": args.micro_batch_size, "own_texts": args.own_texts},
        "rloo": {
            "prompts": f"public:{data / 'prompts.jsonl'}",
            "expected_batch_size": min(32, prompts),
            "max_steps": args.steps,
            "micro_batch_size": args.micro_batch_size,
            "num_generations": 4,
            "max_prompt_length": 224,
            "max_completion_length": args.completion,
            "learning_rate": 1e-3,
            "beta": 0.1,
            "adapter": {"r": 4},
            "reward": {"source": "reward_model"},
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emails", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", help="a chat model's folder or name; default SmolLM2-135M-Instruct")
    parser.add_argument("--epsilon", type=float, default=4.0, help="of everyone; inf is without privacy")
    parser.add_argument("--unit", choices=("email", "person"), default="email")
    parser.add_argument("--steps", type=int, default=16, help="of SFT, and of RLOO")
    parser.add_argument("--completion", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--own_texts", type=int, default=512)
    parser.add_argument("--eval_prompts", type=int, default=128)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, help="JSON lines of finished runs")
    args = parser.parse_args(argv)
    data = args.output_dir.with_name(args.output_dir.name + "-data")
    units, prompts = write(args.emails, data)
    file = data / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(recipe(args, args.model or str(smollm2.fetch()), data, units, prompts)), encoding="utf-8"
    )
    if code := dpalign(["run", str(file)]):
        raise SystemExit(code)
    summary = json.loads((args.output_dir / "summary.json").read_text())
    line = {"asked": {"epsilon": args.epsilon, "unit": args.unit, "steps": args.steps, "emails": units}, **summary}
    if args.record:
        with args.record.open("a", encoding="utf-8") as record:
            record.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
