"""A browser window without a screen: a page in a frame of some width, and what a script finds out about it.

Chromium's own window cannot be narrower than 500 pixels, a phone is; hence the frame.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.conftest import browser

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
HEIGHT = 900
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe><pre id="out"></pre>
<script>
const errors = [];
frame.onload = () => {{
  const window = frame.contentWindow, document = frame.contentDocument;
  let found;
  try {{ found = (({script}))(window, document); }} catch (error) {{ found = {{"error": String(error)}}; }}
  out.textContent = JSON.stringify(found);
}};
</script>"""


def ask(page: Path, width: int, script: str, folder: Path) -> Any:
    """Show `page` in a frame `width` pixels wide and return what `script`, a function of (window, document), returns."""
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width, height=HEIGHT, script=script), encoding="utf-8")
    dom = _run("--virtual-time-budget=5000", "--dump-dom", frame.as_uri(), folder=folder)
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]))
    if isinstance(found, dict) and "error" in found:
        raise AssertionError(found["error"])
    return found


def photograph(page: Path, width: int, height: int, folder: Path) -> Path:
    """Return a picture of the page, PNG."""
    picture = folder / f"picture-{width}.png"
    _run(f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri(), folder=folder)
    return picture


def _run(*arguments: str, folder: Path) -> str:
    command = [str(browser()), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
