"""Writing files so that a crash or a full disk leaves the old one or the new one, never half of either.

What a killed process leaves behind is called `.NAME.dpalign-XXXXXXXX`. A living one holds a lock on it, so that
`sweep_temporaries` takes away what nobody writes any more and nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DPAlignError
from .printable import fit_json

TEMPORARY = re.compile(r"\.(.+)\.dpalign-[a-z0-9_]{8}")  # the letters of `tempfile`
ASIDE = ".dpalign-aside"  # where a folder waits on a file system that cannot exchange two names


def is_missing(name: str) -> bool:
    """Whether a model's name is a path that is not there, and no name of the hub, NAME or ORGANISATION/NAME, either."""
    is_path = name.count("/") > 1 or name[:1] in ("", ".", "/", "~") or name.endswith("/")
    return is_path and not (name and Path(name).exists())


def check_is_there(name: str, what: str = "model") -> None:
    """Refuses a path that is not there, before a hub is asked for it; what may be a name of the hub is tried there.

    Raises:
        DPAlignError: `is_missing`.
    """
    if is_missing(name):
        raise DPAlignError(f"{what} {name!r} is neither a folder here nor the name of a model on the hub.")


@contextmanager
def owner_only() -> Iterator[None]:
    """What is made in the block is its owner's alone (files 0600, folders 0700), whatever the umask is."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def private_folder(path: Path) -> Path:
    """Creates a folder that only its owner can open (mode 0700), below folders that exist or are made so."""
    try:
        with owner_only():
            path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise DPAlignError(f"{path} cannot be created ({error.strerror}): choose a writable output folder.") from None
    return path


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically by one that its owner alone can read; durable when it returns."""
    try:
        with _temporary_file(path) as (file, temporary):
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise DPAlignError(f"{path} cannot be written ({error.strerror}); what was there before is intact.") from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; infinity is the string "inf"."""
    write_text(path, dumps(value) + "\n")


def dumps(value: Any, indent: int | None = 2) -> str:
    """Strict JSON; infinite numbers become the strings "inf" and "-inf", NaN becomes null. Control characters and the
    like are escaped, so that it may go to a terminal, and a line of it is one line for everybody."""
    return fit_json(json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False))


def read_own(path: Path) -> dict[str, Any]:
    """The object of a JSON file that dpalign has left for itself.

    Raises:
        DPAlignError: it is there no more, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise damaged(path)
    return value


def damaged(path: Path) -> DPAlignError:
    """What is said of a file of ours that somebody else has changed."""
    return DPAlignError(
        f"{path} is damaged: restore it from a copy, or begin in another output folder; what was spent stays spent."
    )


def append_line(path: Path, value: Any) -> None:
    """Adds one line of JSON to a log, after `mend_lines`."""
    try:
        mend_lines(path)
        with open(path, "ab", buffering=0) as file:
            file.write((dumps(value, indent=None) + "\n").encode())
    except OSError as error:
        raise DPAlignError(f"{path} cannot be written ({error.strerror}).") from None


def mend_lines(path: Path) -> None:
    """Takes away the half line that a killed process has left at the end of a log."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log of JSON lines. A line that is none was left by a killed process, and says nothing."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that takes its place if the block succeeds: at every moment `path` is the
    whole old folder or the whole new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        with _temporary_folder(path) as temporary:
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                _sync(entry)
            if not path.exists():
                os.rename(temporary, path)
            elif not _exchange(temporary, path):
                aside = path.with_name(f".{path.name}{ASIDE}")
                os.rename(path, aside)
                os.rename(temporary, path)
                shutil.rmtree(aside, ignore_errors=True)
            _sync(path.parent)
    except OSError as error:
        raise DPAlignError(
            f"{path} cannot be written ({error.strerror or error}); what was there before is intact."
        ) from None


def recover_folder(path: Path) -> None:
    """Puts a folder back that was moved aside by a process that died before the new one took its place."""
    aside = path.with_name(f".{path.name}{ASIDE}")
    if aside.is_dir():
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, path)


def sweep_temporaries(folder: Path, *, below: bool = False) -> None:
    """Removes what killed processes were writing in a folder, or also `below` it.

    What a living process writes stays, and so does everything that is not called as ours is.
    """
    for entry in [*(folder.rglob(".*") if below else folder.glob(".*"))]:
        if TEMPORARY.fullmatch(entry.name) and not entry.is_symlink():
            _remove_if_dead(entry)
        elif entry.name.startswith(".") and entry.name.endswith(ASIDE) and entry.is_dir():
            recover_folder(entry.with_name(entry.name[1 : -len(ASIDE)]))


# Temporaries ---------------------------------------------------------------------------------------------------------


@contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[Any, Path]]:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.dpalign-", dir=path.parent)
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.dpalign-", dir=path.parent))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_if_dead(entry: Path) -> None:
    try:
        handle = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    except OSError:
        pass  # somebody is writing it
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    """Makes a file's contents, or a folder's names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two names in one step; False where system or file system cannot."""
    names, flag, system = (os.fsencode(a), os.fsencode(b)), 2, ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(system, "renamex_np"):
        failed = system.renamex_np(*names, ctypes.c_uint(flag))  # RENAME_SWAP
    elif hasattr(system, "renameat2"):
        here = -100  # AT_FDCWD
        failed = system.renameat2(here, names[0], here, names[1], ctypes.c_uint(flag))  # RENAME_EXCHANGE
    else:
        return False
    if not failed:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


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
