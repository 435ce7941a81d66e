"""A page as headless Chromium sees it, once its scripts have run."""

import functools
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=4000",
)

WATCH = """
const refused = [];
addEventListener("securitypolicyviolation", (event) => refused.push(event.blockedURI));
addEventListener("error", (event) => refused.push(event.message));
"""
PROBE = """
addEventListener("load", async () => {
  const value = await (async () => { %s })();
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = JSON.stringify(value);
  document.body.append(probe);
});
"""


@functools.cache
def program() -> str | None:
    """Path of Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def dump(page: Path, folder: Path, fragment: str = "") -> str:
    """The page's elements as HTML; skips without Chromium. Its profile goes below ``folder``."""
    if program() is None:
        pytest.skip(f"needs Chromium (apt-get install chromium): found none of {', '.join(NAMES)}")
    address = page.as_uri() + (f"#{fragment}" if fragment else "")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [program(), *OPTIONS, profile, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(dumped: str) -> list[dict[str, str]]:
    """The rows of the page's table, from top to bottom: text by column title."""
    inside = dumped.split('<table id="rows">')[1].split("</table>")[0]
    head, *rows = (
        [
            html.unescape(re.sub("<[^>]*>", "", cell)).replace("\xa0", " ")
            for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr\b[^>]*>(.*?)</tr>", inside, re.DOTALL)
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


def evaluate(page: Path, folder: Path, script: str) -> Any:
    """What an async function's body returns, run after the page's own scripts, in a copy of it.

    There ``refused`` lists what failed: requests against the page's policy, and errors.
    """
    text = page.read_text("utf-8").replace("<head>", f"<head><script>{WATCH}</script>", 1)
    before, after = text.rsplit("</body>", 1)
    copy = folder / "probe.html"
    copy.write_text(f"{before}<script>{PROBE % script}</script></body>{after}", "utf-8")
    found = re.findall(r'<pre id="probe">(.*?)</pre>', dump(copy, folder), re.DOTALL)
    assert found, "the script failed"
    return json.loads(html.unescape(found[-1]))
