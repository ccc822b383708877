"""Pages in a real browser without a window: Debian's chromium. Nothing is fetched."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
SIZES = (420, 1280)  # a phone and a desk

# Each page in a frame of its own width; what reaches out of it at the right is named, unless it scrolls within itself.
LOOK = """<!doctype html><meta charset="utf-8"><pre id="found"></pre><script>
const asked = ASKED, found = [];
const scrolls = (e) => e && (/auto|scroll|hidden|clip/.test(e.ownerDocument.defaultView.getComputedStyle(e).overflowX) || scrolls(e.parentElement));
for (const [page, width] of asked) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.onload = () => {
    const page_of = frame.contentDocument, out = [];
    for (const e of page_of.body.querySelectorAll("*")) {
      const box = e.getBoundingClientRect();
      if (box.right > page_of.documentElement.clientWidth + 0.5 && box.width > 0 && !scrolls(e.parentElement)) out.push(`${e.tagName} ${e.className.baseVal ?? e.className}`);
    }
    found.push({page, width, wide: page_of.documentElement.scrollWidth, room: page_of.documentElement.clientWidth, out: out.slice(0, 5), text: page_of.body.innerText.length});
    document.getElementById("found").textContent = JSON.stringify(found);
  };
  frame.src = page;
  document.body.append(frame);
}
</script>"""


def look_at(pages: list[Path], folder: Path, widths: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """Each page at each width: `wide`, how wide its contents are; `room`, how wide the page is; `out`, elements that reach out of it.

    Args:
        folder: for files of this look.
    """
    assert CHROMIUM is not None
    asked = [[page.resolve().as_uri(), width] for page in pages for width in widths]
    looking = folder / "look.html"
    looking.write_text(LOOK.replace("ASKED", json.dumps(asked)), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=20000",
        f"--user-data-dir={folder / 'profile'}", "--dump-dom", looking.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (said,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    found = json.loads(html.unescape(said))
    assert len(found) == len(asked), done.stderr[-500:]
    return found


def too_wide(pages: list[Path], folder: Path, widths: tuple[int, ...] = SIZES) -> list[str]:
    """Pages that have to be scrolled sideways, or that show nothing."""
    return [
        f"{Path(f['page']).name} at {f['width']}: {f['wide']}, {f['out']}"
        for f in look_at(pages, folder, widths)
        if f["wide"] > f["room"] or f["out"] or not f["text"]
    ]
