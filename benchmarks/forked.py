"""Several processes of one run, forked from this one: nothing is imported anew, and a launcher's environment is set."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpalign.cli import main


@dataclass(frozen=True)
class Ended:
    """How a process has ended: its status as `subprocess` gives it, and what it has written."""

    status: int
    out: str
    err: str


def together(folder: Path, size: int, *arguments: object, before: Callable[[int], None] = lambda rank: None) -> list[Ended]:
    """`dpalign ARGUMENTS` in `size` processes, as a launcher starts them; `before` is told the rank in each of them."""

    def command(rank: int) -> int:
        before(rank)
        return main([str(a) for a in arguments])

    return forked(folder, size, command)


def forked(folder: Path, size: int, body: Callable[[int], int]) -> list[Ended]:
    """`body(rank)`, whose result is the exit status, in `size` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(folder, rank, size, port, body) for rank in range(size)]
    ended = []
    for rank, child in enumerate(children):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out, err = ((folder / f"{name}-{rank}").read_text(encoding="utf-8") for name in ("out", "err"))
        ended.append(Ended(status, out, err))
    return ended


def _fork(folder: Path, rank: int, size: int, port: int, body: Callable[[int], int]) -> int:
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process of tests may have ignored
        signal.alarm(300)  # whatever waits for ever is ended
        status = body(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
