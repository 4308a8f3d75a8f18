"""Debian's Chromium with a driver, and what every page has to hold: accessible, nothing wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ARTIFACTS = FOLDER.parents[1] / "artifacts" / "dashboard"

#: What a page is looked at in.
LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}

#: WCAG 2.2 up to AA, and the good practices that axe-core knows.
_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def install_axe() -> str:
    """axe-core's source, installed from the lock file."""
    npm = shutil.which("npm")
    assert npm, "these tests need Node.js and npm"
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=FOLDER / "node", check=True, timeout=300)
    return (FOLDER / "node/node_modules/axe-core/axe.min.js").read_text()


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's own browser, without a display."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    assert found, "these tests need Debian's package chromium"
    # Root has no sandbox of Chromium's own; the pages are ours.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=args)
        yield browser
        browser.close()


class Looking:
    """A window on the dashboard that collects whatever its browser complains about."""

    def __init__(self, browser: Any, url: str, axe: str, look: str = "light") -> None:
        self.context = browser.new_context(base_url=url, reduced_motion="reduce", **LOOKS[look])
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.axe, self.look, self.problems = axe, look, list[str]()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._request)
        self._url = url

    def _console(self, message: Any) -> None:
        # An answer that refuses is no error of the page's.
        if message.type in ("error", "warning") and "status of 4" not in message.text:
            self.problems.append(message.text)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self._url, "data:")):
            self.problems.append(f"asked {request.url}")

    def sign_in(self, key: str) -> None:
        self.page.goto("/sign-in")
        self.page.get_by_label("API key", exact=True).fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url("**/environment**")

    def go(self, tab: str) -> None:
        """Click on a tab."""
        self.page.get_by_role("navigation", name="Sections").get_by_role("link", name=tab).click()
        self.page.wait_for_load_state()

    def check(self, name: str) -> None:
        """Keep a picture; nothing overflows, and axe-core finds nothing."""
        page = self.page
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=ARTIFACTS / f"{name}-{self.look}.png", full_page=True)
        width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], f"{name} is {width[0]} wide in a window of {width[1]}"
        page.evaluate(self.axe)
        found = page.evaluate(
            "rules => axe.run(document, {runOnly: {type: 'tag', values: rules}})", _RULES
        )
        wrong = [
            f"{v['id']}: {v['help']}: {[n['html'][:200] for n in v['nodes'][:3]]}"
            for v in found["violations"]
        ]
        assert not wrong, f"{name}: {wrong}"
        assert len(found["passes"]) > 10

    def close(self) -> None:
        self.context.close()
        assert not self.problems, self.problems
