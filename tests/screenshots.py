"""Pictures of all pages, to look at: ``python -m tests.screenshots FOLDER [ADAPTER]``; none is kept in the repository.

An inspection's page, the app, a comparison's report and the site (if ``make docs`` has built it), each 1280 and 360
pixels wide, light and dark. Page and app show ADAPTER; by default the embedded demo, trained for a few steps. Needs
what ``make browser`` installs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rim_peft.app import Playground, serve
from rim_peft.comparison.plots import draw_plots
from rim_peft.comparison.report import render_page as render_report
from rim_peft.demo import showcase
from rim_peft.inspection import Options, inspect_questions, render_page
from rim_peft.run import Run, load_run
from tests.browser import PHONE, WIDE, open_browser
from tests.integration.test_demo import SHORT

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "compare-demo" / "results.json"
SITE = ROOT / "build" / "docs"
QUESTIONS = (
    "Jon shakes Dan's brew. Dan salts Ada's brew. Ada salts Moe's brew. Moe shakes Pam's brew. Pam's brew is blue. "
    "What colour is Jon's brew?",
    "Finn burns Pam's brew. Pam shakes Ben's brew. Ben cools Gus's brew. Gus shakes Liv's brew. Liv's brew is gold. "
    "What colour is Finn's brew?",
)


def main(folder: Path, adapter: str | None) -> None:
    """Take all pictures, and print their names."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, open_browser() as browser:
        work = Path(name)
        run = _load(adapter, work)
        for page, address in (
            ("page", _write_page(run, work)),
            ("report", _write_report(work)),
            *(
                (f"site-{page}", (SITE / f"{page}.html").as_uri())
                for page in ("index", "comparison", "api")
                if SITE.exists()
            ),
        ):
            _shoot(browser, folder, page, address)
        with _app(run) as address:
            _shoot(browser, folder, "app", address, ask=QUESTIONS[0])
    if not SITE.exists():
        print("site: not built; run make docs first")


def _load(adapter: str | None, work: Path) -> Run:
    if adapter is None:
        showcase.train_demo(work / "demo", seed=0, overrides=SHORT, command=[])
    return load_run(work / "demo" if adapter is None else adapter)


def _write_page(run: Run, work: Path) -> str:
    inspection = inspect_questions(run, QUESTIONS, name="demo", options=Options(chain_tokens=32))
    (work / "page.html").write_text(render_page(inspection), encoding="utf-8")
    return (work / "page.html").as_uri()


def _write_report(work: Path) -> str:
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = render_report(document, draw_plots(document, work / "plots"))
    (work / "results.html").write_text(page, encoding="utf-8")
    return (work / "results.html").as_uri()


@contextmanager
def _app(run: Run) -> Iterator[str]:
    served = serve(Playground(run, name="demo", questions=QUESTIONS, options=Options(chain_tokens=32)))
    try:
        yield served.local_url
    finally:
        served.close()


def _shoot(browser: Any, folder: Path, name: str, address: str, *, ask: str | None = None) -> None:
    for size in (WIDE, PHONE):
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
            page.set_default_timeout(60_000)
            page.goto(address)
            if ask is not None:
                page.get_by_label("Question", exact=True).fill(ask)
                page.get_by_role("button", name="Ask").click()
                page.get_by_text("What each block holds").wait_for()
            file = folder / f"{name}-{size[0]}-{scheme}.png"
            page.screenshot(path=file, full_page=True)
            print(file)
            page.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("adapter", nargs="?", metavar="ADAPTER", help="output folder of a training")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.adapter)
