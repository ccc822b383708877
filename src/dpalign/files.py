"""Writing files so that a crash or a full disk leaves the old one or the new one, never half of either."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DPAlignError


def private_folder(path: Path) -> Path:
    """Creates a folder that only its owner can open (mode 0700), below folders that exist or are made."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise DPAlignError(f"{path} cannot be created ({error.strerror}): choose a writable output folder.") from None
    return path


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically; durable when it returns."""
    try:
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DPAlignError(f"{path} cannot be written ({error.strerror}); what was there before is intact.") from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; infinity is the string "inf"."""
    write_text(path, dumps(value) + "\n")


def dumps(value: Any, indent: int | None = 2) -> str:
    """Strict JSON; infinite numbers become the strings "inf" and "-inf", NaN becomes null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that takes its place if the block succeeds."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield temporary
        for file in temporary.iterdir():
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DPAlignError(
            f"{path} cannot be written ({error.strerror or error}); what was there before is intact."
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if value != value:
            return None
        return value if abs(value) != float("inf") else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
