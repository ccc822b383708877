"""`dpalign` in a process of its own, which starts at once.

It is forked from one that has imported what dpalign imports (five seconds, and twice that on an older machine) and
nothing of dpalign. tests/test_pipeline.py and tests/test_wheel.py start it as a user does.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

IMPORTED = [
    "torch", "transformers", "transformers.modeling_utils", "transformers.generation", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2", "peft", "accelerate", "datasets", "safetensors.torch",
    "dp_accounting.pld.privacy_loss_distribution", "scipy.stats", "scipy.optimize", "scipy.sparse", "jsonargparse", "yaml", "jinja2", "rich.console",
    "rich.progress", "rich.table", "rich.live",
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)


class Started:
    """What tests ask of a `subprocess.Popen`."""

    def __init__(self, folder: Path, words: list[str], environment: dict[str, str]) -> None:
        self.said = Path(tempfile.mkdtemp(prefix="said-"))
        self.process = SERVER.Process(target=_command, args=(folder, words, environment, self.said))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error, when it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"no end within {timeout} seconds: {self._told('err')[-500:]}")
        told = self._told("out"), self._told("err")
        shutil.rmtree(self.said)
        return told

    def _told(self, name: str) -> str:
        file = self.said / name
        return file.read_text(encoding="utf-8") if file.exists() else ""  # killed before it began


def _command(folder: Path, words: list[str], environment: dict[str, str], said: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it also where the tests run in the background
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = ["", *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = ["dpalign", *words]
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream)
    status: object = 1
    try:
        assert "dpalign" not in sys.modules
        # Its releases are checked in it, and not in one more process for each (conftest.py does the same).
        from dpalign.models import plain_logits, verify

        verify.in_fresh_process = plain_logits.logits
        from dpalign.cli import main

        status = main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(bool(status)))
