"""Chats from end to end: a chat model learns from people's polite e-mails, and from their judgement, under one epsilon.

    .venv/bin/python benchmarks/chat_emails.py --emails email_rewrites.jsonl.gz --output_dir runs/chat_emails

--emails: JSON lines with `original` and `revised`, an e-mail and what a person made of it to be more polite (and
`person`); 1,881 such pairs by 228 people are in Jiaxin-Pei/Potato-Prolific-Dataset. They become chats: "Make this e-mail
more polite: ..." and the revised e-mail as the answer (SFT, on `messages`), the revised answer against the original one
(the reward, on chat pairs). A sixth of the originals is held out and public; an eighth, public too, are RLOO's prompts.
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


def chat(original: str, revised: str, person: str) -> dict[str, object]:
    """One record with the columns of every stage."""
    asked = [{"role": "user", "content": ASKED + original}]
    good, bad = ([{"role": "assistant", "content": text}] for text in (revised, original))
    return {"person": person, "messages": asked + good, "prompt": asked, "chosen": good, "rejected": bad}


def same(text: str) -> str:
    """Equal for texts that differ in spaces, case and marks alone."""
    return "".join(c for c in text.casefold() if c.isalnum())


def write(emails: Path, folder: Path, longest: int) -> tuple[int, int]:
    """private.jsonl, prompts.jsonl and public.jsonl; sizes of the first two. An e-mail without a person is one's own.

    Several people rewrote the same e-mail: the private part has none that the other two have.
    """
    with gzip.open(emails, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if max(len(row["original"]), len(row["revised"])) <= longest]
    random.Random(0).shuffle(rows)
    first = {same(row["original"]): row for row in reversed(rows)}
    names = sorted(first)
    random.Random(1).shuffle(names)
    held, prompts = len(names) // 6, len(names) // 8
    public, asked = names[:held], names[held : held + prompts]
    taken = {same(first[name][side]) for name in public + asked for side in ("original", "revised")}
    private = [row for row in rows if not {same(row["original"]), same(row["revised"])} & taken]
    parts = {"public": [first[n] for n in public], "prompts": [first[n] for n in asked], "private": private}
    folder.mkdir(parents=True, exist_ok=True)
    for part, of_part in parts.items():
        chats = [chat(r["original"], r["revised"], r["person"] or f"nobody{i}") for i, r in enumerate(of_part)]
        lines = [json.dumps({"prompt": c["prompt"]} if part == "prompts" else c) + "\n" for c in chats]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(private), len(asked)


def recipe(args: argparse.Namespace, model: str, data: Path, units: int, prompts: int) -> dict[str, object]:
    """SFT, one query for the reward, RLOO on public prompts: the last draws nothing, so the first two have everyone."""
    people = {"unit": "person", "max_records_per_unit": 16} if args.unit == "person" else {}
    public = {"eval_path": str(data / "public.jsonl"), "eval_is_public": True}
    batch = max(1, min(args.batch, units // 3))
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
            "max_length": args.max_length,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
            "adapter": {"r": 1},
        },
        "reward_query": {
            "max_length": args.max_length,
            "micro_batch_size": args.micro_batch_size,
            "own_texts": args.own_texts,
        },
        "rloo": {
            "prompts": f"public:{data / 'prompts.jsonl'}",
            "expected_batch_size": min(args.prompts, prompts),
            "max_steps": args.steps,
            "micro_batch_size": args.micro_batch_size,
            "num_generations": 4,
            "max_prompt_length": args.max_length - args.completion,
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
    parser.add_argument("--longest", type=int, default=600, help="characters; e-mails with more are left out")
    parser.add_argument(
        "--batch", type=int, default=256, help="e-mails of an SFT step, if there are three times as many"
    )
    parser.add_argument("--prompts", type=int, default=32, help="of an RLOO step")
    parser.add_argument("--max_length", type=int, default=448, help="tokens of a chat")
    parser.add_argument("--steps", type=int, default=16, help="of SFT, and of RLOO")
    parser.add_argument("--completion", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--own_texts", type=int, default=512)
    parser.add_argument("--eval_prompts", type=int, default=128)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--record", type=Path, help="JSON lines of finished runs")
    args = parser.parse_args(argv)
    data = args.output_dir.with_name(args.output_dir.name + "-data")
    units, prompts = write(args.emails, data, args.longest)
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
