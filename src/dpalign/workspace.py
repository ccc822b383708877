"""The folder of a run: its lock, its name in the ledger, and what its models were made of when it began."""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import DPAlignError
from .files import damaged, mend_lines, owner_only, private_folder, read_own, sweep_temporaries, write_json
from .plan import Past
from .privacy.ledger import Intent, Ledger
from .privacy.statement import state_privacy, unnamed_attempt
from .provenance import Origin, check_provenance
from .recipe import Recipe

LOG = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


@dataclass(frozen=True)
class Workspace:
    """What a run holds while it goes on. folder: public by construction but for `private`; both are its owner's alone.

    log: the noised metrics, one JSON a line. evaluations: what was measured on public records while stages trained.
    """

    folder: Path
    ledger: Ledger
    identity: str

    @property
    def private(self) -> Path:
        return self.folder / "private"

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def evaluations(self) -> Path:
        return self.folder / EVALUATIONS

    @staticmethod
    @contextmanager
    def open(recipe: Recipe) -> Iterator[Workspace]:
        """The folder of a recipe, made if there is none, for this process alone.

        Raises:
            DPAlignError: another process runs in it, or it was begun with another ledger.
        """
        folder = Path(recipe.output_dir)
        if recipe.ledger == ":memory:":
            raise DPAlignError("a ledger in memory forgets what was spent: give --ledger a file.")
        with owner_only():
            private = private_folder(folder / "private")
            with _locked(private), closing(Ledger(recipe.ledger, AttemptNames(private).begin)) as ledger:
                _tidy(folder)
                yield Workspace(folder, ledger, _identity(folder, ledger))

    def origins(self, recipe: Recipe) -> dict[str, Origin]:
        """Of the recipe's models and rewards, and of those that the run used before the recipe dropped them.

        Raises:
            DPAlignError: a model of unknown past, or another one than when the run began.
        """
        return same_origins(self.private, check_provenance(recipe), self.ledger.intents(run=self.identity))

    def past(self, recipe: Recipe, origins: Mapping[str, Origin], delta: float) -> Past:
        """These, and what the run has drawn in stages that the recipe no longer has."""
        stated = state_privacy(self.identity, self.ledger, delta, [], [], set(), self.name_of).stages
        return Past(origins, tuple(s for s in stated if s.stage not in recipe.drawing))

    def name_of(self, intent: Intent) -> str:
        """The random name of the attempt that drew."""
        return AttemptNames(self.private).name_of(intent)

    def remember(self, origins: Mapping[str, Origin]) -> None:
        """From here on the run rests on them."""
        value = _read_run(self.private)
        value["origins"] = {entry: asdict(origin) for entry, origin in sorted(origins.items())}
        write_json(self.private / "run.json", value)

    def dtype_of(self, entry: str, asked: str, choose: Callable[[], str]) -> str:
        """Of the frozen weights of a recipe's model; written down, and the same whenever and wherever the run goes on.

        Args:
            entry: the model's name in the recipe. asked: what the recipe says. choose: what `auto` is here.

        Raises:
            DPAlignError: another one is asked for than the run has trained with.
        """
        value = _read_run(self.private)
        dtypes = value.setdefault("dtypes", {})
        known, dtype = dtypes.get(entry), asked
        has_begun = rests_on_models(self.private, self.ledger.intents(run=self.identity))
        if asked == "auto" and known is None and has_begun:
            dtype = "float32"  # begun by a version that had no `auto`: what was not named was that
        elif asked == "auto":
            dtype = choose() if known is None else known
        elif known not in (None, asked) and has_begun:
            raise DPAlignError(
                f"{entry}.dtype is {asked}, and the run in {self.folder} was begun in {known}: leave it out, or start "
                "a run under another output folder."
            )
        dtypes[entry] = dtype
        write_json(self.private / "run.json", value)
        return dtype


def rests_on_models(private: Path, drawn: list[Intent]) -> bool:
    """Whether a run has drawn, or has saved anything that it learned."""
    return bool(drawn) or any(private.glob("*/step-*"))


class AttemptNames:
    """A random name for every attempt of the run in this folder, durable before the attempt's first draw.

    What two attempts drew is never taken for the same, also where folder and ledger were copied and both copies went
    on. Runs that an older version began have no names for what it drew: there the run and stage stand for them.
    """

    def __init__(self, private: Path) -> None:
        self.private = private
        self._begun: set[tuple[str, int]] = set()

    def begin(self, stage: str, attempt: int) -> None:
        """A new name, but for an attempt that this object has begun."""
        if (stage, attempt) in self._begun:
            return
        value = _read_run(self.private)
        names = value.setdefault("later_attempts" if "attempts" not in value else "attempts", {})
        names.setdefault(stage, {})[str(attempt)] = secrets.token_hex(8)
        write_json(self.private / "run.json", value)
        self._begun.add((stage, attempt))

    def name_of(self, intent: Intent) -> str:
        """Of the attempt that drew; "" if another copy of the folder began it."""
        value = _read_run(self.private)
        unknown = "" if "attempts" in value else unnamed_attempt(intent)
        names = value.get("attempts", value.get("later_attempts", {}))
        return str(names.get(intent.stage, {}).get(str(intent.attempt), unknown))


def _tidy(folder: Path) -> None:
    """Takes away what a killed process left half written."""
    sweep_temporaries(folder)
    sweep_temporaries(folder / "private", below=True)
    mend_lines(folder / LOG)
    mend_lines(folder / EVALUATIONS)


def _identity(folder: Path, ledger: Ledger) -> str:
    """The run's name in the ledger: readable, and new whenever the folder is made anew."""
    file = folder / "private" / "run.json"
    if not file.exists():
        write_json(file, {"run": f"{folder.name}-{secrets.token_hex(4)}", "ledger": ledger.identity, "attempts": {}})
    value = _read_run(folder / "private")
    if value["ledger"] != ledger.identity:
        raise DPAlignError(
            f"{folder} was begun with another ledger than {ledger.path}: give that one with --ledger, or choose "
            "another output folder."
        )
    return str(value["run"])


def _read_run(private: Path) -> dict[str, Any]:
    """What a run has written down of itself: `run`, `ledger`, the names of attempts, `origins` and `dtypes`.

    Raises:
        DPAlignError: it is damaged.
    """
    value = read_own(private / "run.json")
    sections = [value.get(name, {}) for name in ("attempts", "later_attempts", "origins")]
    sections += [stage for section in sections if isinstance(section, dict) for stage in section.values()]
    dtypes = value.get("dtypes", {})
    sections.append(dtypes)
    texts = [value.get("run"), value.get("ledger"), *(dtypes.values() if isinstance(dtypes, dict) else ())]
    if not all(isinstance(section, dict) for section in sections) or not all(isinstance(text, str) for text in texts):
        raise damaged(private / "run.json")
    return value


def same_origins(private: Path, origins: Mapping[str, Origin], drawn: list[Intent]) -> dict[str, Origin]:
    """The recipe's models, and those that the run used before the recipe dropped them: both stay in its statement.

    Raises:
        DPAlignError: a model is another one than when the run began.
    """
    value = _read_run(private)
    if not rests_on_models(private, drawn):
        return dict(origins)
    try:
        known = {name: Origin.from_json(origin) for name, origin in value.get("origins", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, DPAlignError):
        raise damaged(private / "run.json") from None
    for entry, origin in origins.items():
        if entry in known and origin.fingerprint != known[entry].fingerprint:
            old, new = known[entry].name, origin.name
            what = f"{entry} was {old!r} and is now {new!r}" if old != new else f"{entry} {old!r} itself has changed"
            raise DPAlignError(
                f"the models of the run in {private.parent} have changed since it began ({what}): its statement would "
                "miss what the old one was made of; restore it, or start a run under another output folder."
            )
    return known | dict(origins)


@contextmanager
def _locked(private: Path) -> Iterator[None]:
    with open(private / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DPAlignError(
                f"another process is running in {private.parent}: wait for it, or choose another folder."
            ) from None
        yield
