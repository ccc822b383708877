"""`dpalign export`: a release elsewhere, or merged into full weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from ..files import replace_folder
from ..models import ModelConfig, Policy
from .arguments import Parser

DESCRIPTION = """Copies the release of a run (adapter, tokenizer, card, privacy.json) to a folder, or with --merge
writes full float32 weights that load without peft. Nothing private is copied."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns where the export lies."""
    parser = Parser(prog="dpalign export", description=DESCRIPTION)
    parser.add_argument("run", help="a run's folder, or its release folder")
    parser.add_argument("--to", required=True, help="the folder to write; replaced as a whole")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the base model's weights")
    given = parser.parse_args(arguments)
    release = Path(given.run)
    release = release / "release" if (release / "release").is_dir() else release
    if not (release / "privacy.json").is_file():
        raise DPAlignError(f"{given.run} holds no release with a privacy statement: run its stages to the end first.")
    target = Path(given.to)
    if target.exists() and not (target / "privacy.json").exists():
        raise DPAlignError(f"{target} exists and is not an earlier export: give another folder.")
    with replace_folder(target) as temporary:
        if given.merge:
            policy = Policy.load(ModelConfig(name_or_path=str(release)))
            policy.model.merge_and_unload().save_pretrained(temporary)
            policy.tokenizer.save_pretrained(temporary)
            for name in ("privacy.json", "README.md"):
                shutil.copy(release / name, temporary / name)
        else:
            shutil.copytree(release, temporary, dirs_exist_ok=True)
        temporary.chmod(0o755)
    if not as_json:
        print(f"exported to {target}")
    return {"exported": str(target), "merged": given.merge}
