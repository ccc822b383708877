"""Malformed recipes, data, models, rewards, ledgers, statements, calls and checkpoints, each through the command.

    .venv/bin/python benchmarks/malformed.py --output malformed.jsonl

None may be accepted, end in an internal error, be refused after a draw, or take longer than 20 seconds. One JSON line a
case; the same command goes on after an interruption. The last line of the output is the sum.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main(arguments: list[str] | None = None) -> None:
    from malformed_inputs import all_cases, judge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="one JSON line a case")
    parser.add_argument("--groups", nargs="+", help="only these kinds of input")
    parser.add_argument("--per-field", type=int, help="most values of each of a recipe's fields (default: all)")
    parser.add_argument("--most", type=int, help="most cases of each group")
    given = parser.parse_args(arguments)
    lines = given.output.read_text(encoding="utf-8").splitlines() if given.output.exists() else []
    rows = {(row["group"], row["name"]): row for row in map(json.loads, lines)}
    counts: Counter[str] = Counter()
    asked = []
    for case in all_cases(given.per_field):
        counts[case.group] += 1
        if case.group in (given.groups or [case.group]) and counts[case.group] <= (given.most or 10**9):
            asked.append(case)
    for case in asked:
        if (case.group, case.name) in rows:
            continue
        with tempfile.TemporaryDirectory(prefix="malformed-") as folder, patch.dict(os.environ):
            os.environ["DPALIGN_LEDGER"] = str(Path(folder) / "ledger.sqlite")
            row = {"group": case.group, "name": case.name, **asdict(judge(case, Path(folder)))}
        with open(given.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        rows[case.group, case.name] = row
        if row["fault"]:
            print(f"{case.group}: {case.name}: {row['fault']}: {row['error'][-200:]}", flush=True)
    found = [rows[case.group, case.name] for case in asked]
    kinds = Counter(str(row["fault"]) for row in found if row["fault"])
    slowest = max((row["seconds"] for row in found), default=0.0)
    print(json.dumps({"inputs": len(found), "faults": dict(kinds), "slowest_s": slowest}))


if __name__ == "__main__":
    main()
