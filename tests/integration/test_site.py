"""The site in a browser, if ``make docs`` has built it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser import PHONE, WIDE, faults, needs_browser
from tests.screenshots import SITE

pytestmark = [*needs_browser, pytest.mark.skipif(not SITE.exists(), reason="the site is not built: make docs")]

LOOKS = [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")]
INDEX = Path(__file__).parents[2] / "docs" / "index.md"


def _open(browser: Any, page: str, size: tuple[int, int], scheme: str = "light") -> Any:
    opened = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    opened.goto((SITE / f"{page}.html").as_uri())
    return opened


def _guides() -> list[str]:
    text = INDEX.read_text(encoding="utf-8")
    lists = re.findall(r":caption: (?:Start|Guides)\n:hidden:\n\n(.*?)```", text, re.DOTALL)
    return ["index", *" ".join(lists).split()]


@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_the_front_page_fits_and_shows_a_mind_at_work(browser: Any, size: tuple[int, int], scheme: str) -> None:
    page = _open(browser, "index", size, scheme)
    picture = page.locator("img[src$='mind.svg']")
    assert picture.evaluate("image => image.naturalWidth") > 0
    assert picture.bounding_box()["y"] < 1.2 * size[1]
    assert page.get_by_text("RiM's readout after each block").first.is_visible()
    page.close()


@pytest.mark.parametrize("name", ["index", "serving", "results"])
@pytest.mark.parametrize(("size", "scheme"), LOOKS)
def test_a_page_has_no_faults_for_axe(browser: Any, name: str, size: tuple[int, int], scheme: str) -> None:
    page = _open(browser, name, size, scheme)
    assert faults(page) == []
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_no_page_is_wider_than_the_window(browser: Any, size: tuple[int, int]) -> None:
    names = [path.relative_to(SITE).with_suffix("").as_posix() for path in sorted(SITE.rglob("*.html"))]
    assert len(names) > 40
    for name in names:
        page = _open(browser, name, size)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        page.close()


def test_a_guide_fits_three_screens(browser: Any) -> None:
    guides = _guides()
    assert len(guides) > 20
    for name in guides:
        page = _open(browser, name, WIDE)
        screens = page.evaluate("document.documentElement.scrollHeight") / WIDE[1]
        assert screens < 3.2, f"{name}: {screens:.1f} screens. Cut it, or split it."  # fonts differ between machines
        page.close()
