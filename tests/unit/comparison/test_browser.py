"""The report in a browser: its look, the script that sorts tables, and contrast by axe-core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rim_peft.comparison.plots import draw_plots
from rim_peft.comparison.report import render_page
from tests.browser import PHONE, WIDE, Page, assert_policy_holds, needs_browser
from tests.unit.comparison.results_document import compare_document

pytestmark = needs_browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    document = compare_document()
    document["representations"] = None  # thousands of points take their time
    plots = draw_plots(document, folder / "plots")
    (folder / "results.html").write_text(render_page(document, plots, questions="questions.html"), encoding="utf-8")
    return folder / "results.html"


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_it_fits_is_quiet_and_has_contrast(browser: Any, report: Path, size: tuple[int, int], scheme: str) -> None:
    shown = Page(browser, report, size, scheme)
    shown.assert_fits()
    shown.page.close()


def test_the_result_is_on_the_first_screen_its_plot_beside_its_table(browser: Any, report: Path) -> None:
    shown = Page(browser, report, WIDE)
    first = shown.page.locator("section").first
    image, table = first.locator("img").bounding_box(), first.locator("table").bounding_box()
    assert shown.page.evaluate("document.querySelector('img').naturalWidth") > 0  # the policy lets it be drawn
    assert image["x"] + image["width"] < table["x"]
    assert table["y"] < WIDE[1] / 2
    assert shown.noise == []
    shown.page.close()


def _column(page: Any, place: int) -> list[str]:
    cells = page.locator(f"section:first-child tbody tr > :nth-child({place})")
    return [text.strip() for text in cells.all_inner_texts()]


def test_a_heading_sorts_by_mouse_and_keyboard(browser: Any, report: Path) -> None:
    shown = Page(browser, report, WIDE)
    page = shown.page
    before = _column(page, 1)
    accuracy = page.locator("section:first-child th", has_text="accuracy")
    accuracy.get_by_role("button").click()
    values = [float(text.split()[0]) for text in _column(page, 2)]
    assert values == sorted(values, reverse=True)
    assert accuracy.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")
    assert [float(text.split()[0]) for text in _column(page, 2)] == values[::-1]
    times = page.locator("section:first-child th", has_text="time")
    times.get_by_role("button").focus()
    page.keyboard.press("Space")
    assert accuracy.get_attribute("aria-sort") is None
    assert _column(page, 4) == ["5.50×", "1.22×", "1.00×", "–", "–", "–", "–"]  # what has no figure comes last
    page.keyboard.press("Space")
    assert _column(page, 4) == ["1.00×", "1.22×", "5.50×", "–", "–", "–", "–"]
    page.keyboard.press("Space")
    assert _column(page, 1) == before
    method = page.locator("section:first-child th", has_text="method")
    method.get_by_role("button").click()
    assert _column(page, 1) == sorted(before, key=str.lower)
    assert shown.noise == []
    page.close()


def test_tables_are_readable_without_a_script(browser: Any, report: Path) -> None:
    shown = Page(browser, report, PHONE, java_script_enabled=False)
    assert shown.page.locator("button").count() == 0
    assert shown.page.locator("th", has_text="accuracy (exact-text)").first.is_visible()
    shown.page.close()


def test_the_keyboard_reaches_links_headings_and_scrolled_tables(browser: Any, report: Path) -> None:
    shown = Page(browser, report, WIDE)
    reached = []
    for _ in range(9):
        shown.page.keyboard.press("Tab")
        reached.append(shown.page.evaluate("document.activeElement.tagName"))
    assert reached == ["A", "DIV", "DIV", "BUTTON", "BUTTON", "BUTTON", "BUTTON", "A", "A"]
    assert shown.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    shown.page.close()


def test_the_policy_stops_another_script(browser: Any, report: Path) -> None:
    assert_policy_holds(browser, report, "Comparison: demo")
