"""Fuzzing of what dpalign reads: recipes, data, ledgers, checkpoints, adapters, privacy statements and finished runs.

    python benchmarks/fuzz.py --output docs/results/fuzz.runs.jsonl --summary docs/results/fuzz.json

Every case damages a valid input: values, names and places in its tree, or its bytes. It is read by the functions that
the commands read it with, in their order, up to the first draw. It must be accepted and then be usable (what was parsed
is what it is written as, no record, draw or row is missing, epsilon is a number), or be refused by dpalign's own error, one
printable sentence that quotes no record; within 5 seconds of CPU time and 1 GB of memory; the input stays as it was, and a
ledger keeps every row. One JSON line a finished batch, with the smallest input of each fault; the same command goes on.
A batch runs in a process of its own, so that a crash of one is found like any other fault.
"""

from __future__ import annotations

import argparse
import base64
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a name in a damaged file is asked of nobody
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

import torch  # noqa: E402
from fuzz_kinds import KINDS, Case, Kind, files_of  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from mutations import MARKER  # noqa: E402

from dpalign.cli import quiet_libraries  # noqa: E402
from dpalign.errors import RECORDS_READ, DPAlignError  # noqa: E402

SECONDS, HANGS, MOST_MEMORY = 5, 90, 2**30
LONGEST = 2000  # characters of a sentence


class SlowError(BaseException):
    """Nothing that is fuzzed is to catch it."""


class FoundError(Exception):
    """A case that is a fault, for hypothesis to make smaller."""


def slow(number: int, frame: FrameType | None) -> None:
    raise SlowError


# One case -------------------------------------------------------------------------------------------------------------


def judged(kind: Kind, case: Case, folder: Path) -> tuple[str, str]:
    """`accepted`, `refused` or `fault`, and of a fault what it is."""
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    RECORDS_READ.clear()
    memory = resident()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        kind.meet(case, folder)
        outcome = "accepted", ""
    except DPAlignError as error:
        fault = fault_of(str(error), kind.of_records)
        outcome = ("fault", fault) if fault else ("refused", "")
    except SlowError:
        outcome = "fault", f"takes more than {SECONDS} s"
    except BaseException as error:
        outcome = "fault", where(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if resident() - memory > MOST_MEMORY:
        outcome = "fault", "takes more than 1 GB"
    left = files_of(folder)
    if not kind.writes and any(left.get(name) != content for name, content in case.files.items()):
        outcome = "fault", "an input was changed"
    return outcome


def fault_of(sentence: str, of_records: bool) -> str:
    """What is wrong with the sentence that refuses an input; empty if nothing is."""
    if not sentence.isprintable() or not sentence.strip():
        return f"is no printable sentence: {ascii(sentence)[:300]}"
    if of_records and MARKER in sentence:
        return f"quotes a record: {ascii(sentence)[:300]}"
    return f"is too long: {ascii(sentence)[:300]}" if len(sentence) > LONGEST else ""


def where(error: BaseException) -> str:
    """The kind of an exception and the line of dpalign that it comes from; of a failed check, what it checks."""
    if isinstance(error, AssertionError) and error.args:
        return f"{error.args[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"{os.sep}dpalign{os.sep}" in f.filename] or frames
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {ascii(str(error))[:200]}"


def same(fault: str) -> str:
    """By which faults are counted as one."""
    return fault.split(": ")[0]


def resident() -> int:
    """The largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# One batch ------------------------------------------------------------------------------------------------------------


def batch(name: str, number: int, size: int, folder: Path) -> dict[str, Any]:
    """So many cases of a kind, in this process. Hypothesis makes the first case of each fault smaller."""
    kind, counts, faults = KINDS[name], Counter[str](), dict[str, dict[str, Any]]()
    inputs, rounds, began = kind.inputs(), 0, time.process_time()
    searched: list[str] = []  # the fault that hypothesis makes smaller

    def one(case: Case) -> None:
        place = Path(tempfile.mkdtemp(dir=folder))
        faulthandler.dump_traceback_later(HANGS, exit=True)
        outcome, fault = judged(kind, case, place)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(place)
        counts[outcome] += 1
        name_of = same(fault)
        if not fault or (name_of != searched[0] if searched else name_of in faults):
            return
        searched.append(name_of)
        if name_of not in faults or weight(case) <= faults[name_of]["bytes"]:
            faults[name_of] = {"fault": fault, "bytes": weight(case), **shown(case)}
        raise FoundError(name_of)

    options = {
        "deadline": None,
        "database": None,
        "suppress_health_check": list(HealthCheck),
        "report_multiple_bugs": False,
    }
    while counts.total() < size:
        rounds += 1
        searched.clear()
        left = max(1, size - counts.total())
        run = settings(max_examples=left, phases=[Phase.generate, Phase.shrink], **options)(given(inputs)(one))
        try:
            seed(number * 1000 + rounds)(run)()
        except FoundError:
            pass
        except Exception as error:  # a fault that comes and goes: a time, say
            if not searched:
                raise
            faults[searched[0]]["comes and goes"] = type(error).__name__
    seconds = round(time.process_time() - began, 2)
    return {
        "kind": name,
        "seed": number,
        "cases": counts.total(),
        **dict(counts),
        "seconds": seconds,
        "faults": [*faults.values()],
    }


def weight(case: Case) -> int:
    return sum(map(len, case.files.values())) + sum(map(len, case.words))


def shown(case: Case) -> dict[str, Any]:
    """An input as JSON has it: its files, those that are not too long, by zlib in base64."""
    packed = {name: zlib.compress(content) for name, content in case.files.items()}
    files = {name: base64.b64encode(content).decode() for name, content in packed.items() if len(content) < 20_000}
    return {"words": [ascii(word) for word in case.words], "files": files}


def apart(name: str, number: int, size: int) -> dict[str, Any]:
    """The same in a process of its own, which a case may end."""
    with tempfile.TemporaryDirectory(
        prefix="dpalign-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as place:
        folder, result = Path(place) / "cases", Path(place) / "result"
        folder.mkdir()
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(Path(place) / "err", os.O_WRONLY | os.O_CREAT), 2)
                sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
                resource.setrlimit(resource.RLIMIT_DATA, (8 * MOST_MEMORY, resource.RLIM_INFINITY))
                signal.signal(signal.SIGPROF, slow)
                result.write_text(json.dumps(batch(name, number, size, folder)), encoding="utf-8")
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return dict(json.loads(result.read_text(encoding="utf-8")))
        said = (Path(place) / "err").read_text(encoding="utf-8", errors="replace")
        ended = [*folder.iterdir()]
        if not ended:
            raise SystemExit(f"batch {number} of {name} itself has failed: {said[-3000:]}")
        case = Case(files_of(ended[0]))
        fault = {
            "fault": f"ended the process with status {status}: {said[-500:]}",
            "bytes": weight(case),
            **shown(case),
        }
        return {"kind": name, "seed": number, "cases": 1, "fault": 1, "seconds": 0.0, "faults": [fault]}


# All ------------------------------------------------------------------------------------------------------------------


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = {}
    for name in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == name]
        kinds[name] = {key: sum(row.get(key, 0) for row in own) for key in ("cases", "accepted", "refused", "fault")}
        kinds[name]["cpu_seconds"] = round(sum(row["seconds"] for row in own), 1)
    faults = sorted({same(fault["fault"]) for row in rows for fault in row["faults"]})
    return {"cases": sum(kind["cases"] for kind in kinds.values()), "faults": faults, "kinds": kinds}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of all kinds together, each its share")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--batch", type=int, default=1000, help="cases of a process")
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz.jsonl"))
    parser.add_argument("--summary", type=Path, help="file for the last line")
    asked = parser.parse_args(arguments)
    quiet_libraries()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [json.loads(line) for line in asked.output.read_text(encoding="utf-8").splitlines()]
        if asked.output.exists()
        else []
    )
    shares = sum(KINDS[name].share for name in asked.kinds)
    for name in asked.kinds:
        wanted = round(KINDS[name].share / shares * asked.cases)
        while (done := sum(row["cases"] for row in rows if row["kind"] == name)) < wanted:
            number = sum(row["kind"] == name for row in rows)
            row = apart(name, number, min(asked.batch, wanted - done))
            rows.append(row)
            with asked.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for fault in row["faults"]:
                print(f"{name}: {fault['fault']}", flush=True)
    found = summed([row for row in rows if row["kind"] in asked.kinds])
    if asked.summary:
        asked.summary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
