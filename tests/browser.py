"""A browser for tests and screenshots: Playwright with the system's Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDE, PHONE = (1280, 900), (360, 740)

needs_browser = [
    pytest.mark.browser,
    # `make browser` fetches them, in continuous integration too: they are half a gigabyte that nothing else needs.
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="Playwright is not installed"),
    # Its package holds axe-core's script; the rest of it is not used.
    pytest.mark.skipif(find_spec("axe_playwright_python") is None, reason="axe-playwright-python is not installed"),
]


@contextmanager
def open_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Page:
    """A page of a file, with what it said on the console and asked the network for."""

    def __init__(self, browser: Any, file: Path, size: tuple[int, int], scheme: str = "light", **options: Any) -> None:
        self.noise: list[str] = []
        viewport = {"width": size[0], "height": size[1]}
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme, **options)
        self.page.on("console", lambda message: self.noise.append(message.text))
        self.page.on("pageerror", lambda error: self.noise.append(str(error)))
        self.page.on("dialog", lambda dialog: self.noise.append("a dialog"))
        self.page.on("request", lambda request: self._note(request.url, file))
        self.page.goto(file.as_uri())

    def _note(self, address: str, file: Path) -> None:
        if address != file.as_uri() and not address.startswith("data:"):
            self.noise.append(address)

    def assert_fits(self) -> None:
        """It is quiet, as wide as the window, in its colours, and without faults for axe-core."""
        assert self.noise == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        self.page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        background = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        is_dark = self.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        assert background == ("rgb(21, 20, 19)" if is_dark else "rgb(251, 250, 247)")  # so the style sheet was applied
        assert faults(self.page) == []


def assert_policy_holds(browser: Any, file: Path, title: str) -> None:
    """A page's policy stops a script, a style and a handler, as if escaping had failed."""
    evil = "<script>document.title = 'run'</script><p id='p' style='color: red' onclick='document.title = 1'>x</p>"
    broken = file.with_name("broken.html")
    broken.write_text(file.read_text(encoding="utf-8").replace("</main>", f"{evil}</main>"), encoding="utf-8")
    shown = Page(browser, broken, WIDE)
    shown.page.locator("#p").click()
    assert shown.page.title() == title
    assert shown.page.locator("#p").evaluate("element => getComputedStyle(element).color") != "rgb(255, 0, 0)"
    assert any("Content Security Policy" in line for line in shown.noise)
    shown.page.close()


def faults(page: Any, *, left_out: str | None = None) -> list[str]:
    """What axe-core finds wrong with a page, one line a rule.

    Args:
        left_out: selector of what is not looked at.
    """
    script = resources.files("axe_playwright_python") / "axe.min.js"
    page.evaluate(script.read_text(encoding="utf-8"))
    found = page.evaluate("left => axe.run(left ? {exclude: left} : document)", left_out)
    return [f"{rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in found["violations"]]
