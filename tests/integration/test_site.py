"""The site's front page in a browser, if ``make docs`` has built it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser import PHONE, WIDE, faults, needs_browser
from tests.screenshots import SITE

pytestmark = [*needs_browser, pytest.mark.skipif(not SITE.exists(), reason="the site is not built: make docs")]


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_the_front_page_fits_and_shows_a_mind_at_work(browser: Any, size: tuple[int, int], scheme: str) -> None:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.goto((SITE / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture = page.locator("img[src$='mind.svg']")
    assert picture.evaluate("image => image.naturalWidth") > 0
    assert picture.bounding_box()["y"] < 1.2 * size[1]
    assert page.get_by_text("RiM's readout after each block").first.is_visible()
    assert faults(page) == []
    page.close()
