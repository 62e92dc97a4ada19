"""Pages in Debian's Chromium without a window: what a script sees there, pictures of them, and prints.

A probe is JavaScript appended to a copy of the page. It operates the real controls and calls `say(value)`; all that it said,
and every error of the page, come back from the dumped document. Nothing can be fetched: all names resolve to nowhere.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
needs_browser = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no chromium here: apt-get install chromium")

PROBE = """<pre id="outcome" hidden></pre><script>
"use strict";
const said = [], errors = pageErrors;
const say = (value) => said.push(value);
addEventListener("load", () => {
  try { %s } catch (error) { errors.push(String(error)); }
  const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  document.querySelector("#outcome").textContent = JSON.stringify({ said, errors,
    fetched: fetched.filter((name) => !name.startsWith("data:")) });
});
</script>"""
LISTENER = '<script>const pageErrors = []; addEventListener("error", (event) => pageErrors.push(event.message), true);</script>'


@dataclass(frozen=True)
class Outcome:
    """What the probe said, errors of the page's scripts and of the console, and the addresses that it asked for."""

    said: list[Any]
    errors: list[str]
    fetched: list[str]


def run(profile: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Chromium on a local page with a new profile."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def probe(page: str, script: str, folder: Path, width: int = 1200) -> Outcome:
    """Run `script` in the loaded page at this width; the page lies in an iframe-free window of its own."""
    assert "<head>" in page and "</body>" in page
    page = page.replace("<head>", "<head>" + LISTENER, 1).replace("</body>", PROBE % script + "</body>", 1)
    path = folder / "probe.html"
    path.write_text(page, encoding="utf-8")
    flags = ("--virtual-time-budget=3000", "--dump-dom", f"--window-size={width},900")
    done = run(folder / "profile", path, *flags)
    found = re.search(r'<pre id="outcome" hidden="">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], f"the probe did not finish:\n{done.stderr[-2000:]}"
    outcome = json.loads(html.unescape(found[1]))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Outcome(outcome["said"], outcome["errors"] + console, outcome["fetched"])


def screenshot(page: Path, target: Path, width: int, height: int, dark: bool = False) -> None:
    """A PNG of the top of the page."""
    flags = [f"--screenshot={target}", f"--window-size={width},{height}", "--virtual-time-budget=2000"]
    run(target.parent / "profile", page, *flags, *(["--blink-settings=preferredColorScheme=0"] if dark else []))


def print_pdf(page: Path, target: Path) -> bytes:
    """The page as it prints."""
    flags = [f"--print-to-pdf={target}", "--no-pdf-header-footer", "--virtual-time-budget=2000"]
    run(target.parent / "profile", page, *flags)
    return target.read_bytes()
