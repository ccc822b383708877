"""`dpalign export`: a release elsewhere, merged into full weights, or on the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from ..files import replace_folder
from ..reporting.terminal import Terminal
from ..settings.models import ModelConfig
from .arguments import Parser, Switch

DESCRIPTION = """Copies the release of a run (adapter, tokenizer, card, privacy.json) to a folder, or with --merge
writes full float32 weights that load without peft. With --push_to_hub it is sent to the Hub, as a private repository
unless you say otherwise; your login there is huggingface_hub's (`hf auth login` or $HF_TOKEN). Nothing private is
copied or sent.

With --check it reads a folder that is about to leave, and ends with an error if anything in it is not on the list of
what may: a file, a field, metadata, a link, a path of this machine, its name or yours, a statement that says
NOT PRIVATE."""


def run(arguments: list[str], as_json: bool) -> dict[str, Any]:
    """Returns where the export lies."""
    parser = Parser(prog="dpalign export", description=DESCRIPTION)
    parser.add_argument("run", help="a run's folder, or its release folder; with --check any folder")
    parser.add_argument("--check", action="store_true", help="whether the folder may leave; nothing is written")
    parser.add_argument("--to", help="the folder to write: a new one, or an empty one")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the base model's weights")
    hub = parser.add_argument_group("on the Hub")
    hub.add_argument("--push_to_hub", metavar="USER/NAME", help="the repository to send it to; made if there is none")
    hub.add_argument("--private", action=Switch, default=True, help="nobody else may see it (the default)")
    hub.add_argument("--base_model", metavar="USER/NAME", help="the base's name there, where it is a folder here")
    hub.add_argument("--license", help="the Hub's name of a licence, such as apache-2.0")
    given = parser.parse_args(arguments)
    if given.check:
        return _checked(given, as_json)
    if given.to is None and given.push_to_hub is None:
        raise DPAlignError("say where the release goes: --to FOLDER, or --push_to_hub USER/NAME.")
    if given.push_to_hub is None and (given.base_model or given.license or not given.private):
        raise DPAlignError("--base_model, --license and --no_private are for --push_to_hub: give it too.")
    release = Path(given.run)
    release = release / "release" if (release / "release").is_dir() else release
    if not (release / "privacy.json").is_file():
        raise DPAlignError(f"{given.run} holds no release with a privacy statement: run its stages to the end first.")
    made: dict[str, Any] = {"merged": given.merge}
    if given.to is not None:
        _check(release, Path(given.to))
    if given.push_to_hub is not None:
        made["pushed"] = _push(release, given)
    if given.to is not None:
        with replace_folder(Path(given.to)) as temporary:
            _write(release, temporary, given.merge)
        made["exported"] = given.to
    if not as_json:
        said = {"exported": "exported to", "pushed": "on the Hub:"}
        for key in said.keys() & made.keys():
            Terminal().say(f"{said[key]} {made[key]}")
    return made


def _checked(given: Any, as_json: bool) -> dict[str, Any]:
    """Says that a folder may leave.

    Raises:
        DPAlignError: it must not, with all that was found.
    """
    from ..boundary import found_in, names_in  # imports torch

    if given.to is not None or given.push_to_hub is not None or given.merge:
        raise DPAlignError("--check only reads: leave --to, --merge and --push_to_hub out.")
    folder = Path(given.run)
    if found := found_in(folder):
        raise DPAlignError(f"{folder} must not leave: {'; '.join(found)}.")
    files = names_in(folder)
    if not as_json:
        Terminal().say(f"{folder} may leave: {len(files)} files, all on the list; nothing in them names this machine.")
    return {"checked": str(folder), "files": files}


def _write(release: Path, folder: Path, merge: bool) -> None:
    """The export, for sharing whatever the umask is."""
    if merge:
        from ..models import Policy  # imports torch
        from ..models.prompt_format import PROMPTS_FILE
        from ..models.verify import check_merged

        exact = ModelConfig(name_or_path=str(release), dtype="float32")  # a narrower base loses some of the adapter
        policy = Policy.load(exact)
        policy.model.merge_and_unload().save_pretrained(folder)
        check_merged(Policy.load(exact), folder)
        policy.tokenizer.save_pretrained(folder)
        for name in ("privacy.json", "README.md", PROMPTS_FILE):
            if (release / name).exists():  # version 0.1.0 left no prompts.json
                shutil.copy(release / name, folder / name)
    else:
        shutil.copytree(release, folder, dirs_exist_ok=True)
    for entry in [folder, *folder.rglob("*")]:
        entry.chmod(0o755 if entry.is_dir() else 0o644)


def _push(release: Path, given: Any) -> str:
    """Sends a copy of the release; returns its name on the Hub."""
    from ..hub import Repository, share  # imports huggingface_hub

    repository = Repository(given.push_to_hub, given.private, given.base_model, given.license)
    return share(release, repository, lambda folder: _write(release, folder, given.merge), merged=given.merge)


def _check(release: Path, target: Path) -> None:
    """Refuses to write over anything: the release itself, what holds it, or a folder of somebody's."""
    here, there = release.resolve(), target.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise DPAlignError(f"--to {target} is the release {release} itself, holds it or lies in it: give a new folder.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise DPAlignError(f"--to {target} exists and is no folder: give a new one.")
    if target.is_dir() and any(target.iterdir()):
        raise DPAlignError(f"--to {target} is a folder that is not empty: give a new one, or remove it first.")
