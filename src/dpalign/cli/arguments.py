"""Arguments of the commands that take no recipe; imports nothing heavy, so that `plan` answers at once."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..errors import DPAlignError

PREPEND_BOS = "put BOS in front of prompts (default: as the release was trained)"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise DPAlignError(f"{message} (see {self.prog} --help).")
