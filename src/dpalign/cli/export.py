"""`dpalign export`: a release elsewhere, or merged into full weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from ..files import replace_folder
from ..reporting.terminal import Terminal
from ..settings.models import ModelConfig
from .arguments import Parser

DESCRIPTION = """Copies the release of a run (adapter, tokenizer, card, privacy.json) to a folder, or with --merge
writes full float32 weights that load without peft. Nothing private is copied."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns where the export lies."""
    parser = Parser(prog="dpalign export", description=DESCRIPTION)
    parser.add_argument("run", help="a run's folder, or its release folder")
    parser.add_argument("--to", required=True, help="the folder to write: a new one, or an empty one")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the base model's weights")
    given = parser.parse_args(arguments)
    release = Path(given.run)
    release = release / "release" if (release / "release").is_dir() else release
    if not (release / "privacy.json").is_file():
        raise DPAlignError(f"{given.run} holds no release with a privacy statement: run its stages to the end first.")
    target = Path(given.to)
    _check(release, target)
    from ..models import Policy  # imports torch
    from ..models.verify import check_merged

    with replace_folder(target) as temporary:
        if given.merge:
            policy = Policy.load(ModelConfig(name_or_path=str(release)))
            policy.model.merge_and_unload().save_pretrained(temporary)
            check_merged(Policy.load(ModelConfig(name_or_path=str(release))), temporary)
            policy.tokenizer.save_pretrained(temporary)
            for name in ("privacy.json", "README.md"):
                shutil.copy(release / name, temporary / name)
        else:
            shutil.copytree(release, temporary, dirs_exist_ok=True)
        for entry in [temporary, *temporary.rglob("*")]:  # for sharing, whatever the umask is
            entry.chmod(0o755 if entry.is_dir() else 0o644)
    if not as_json:
        Terminal().say(f"exported to {target}")
    return {"exported": str(target), "merged": given.merge}


def _check(release: Path, target: Path) -> None:
    """Refuses to write over anything: the release itself, what holds it, or a folder of somebody's."""
    here, there = release.resolve(), target.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise DPAlignError(f"--to {target} is the release {release} itself, holds it or lies in it: give a new folder.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise DPAlignError(f"--to {target} exists and is no folder: give a new one.")
    if target.is_dir() and any(target.iterdir()):
        raise DPAlignError(f"--to {target} is a folder that is not empty: give a new one, or remove it first.")
