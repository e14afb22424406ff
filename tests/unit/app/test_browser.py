"""The page in a browser, by Gradio."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from rim_peft.app import Playground, serve
from rim_peft.inspection import Options
from rim_peft.run import Run
from tests.browser import PHONE, WIDE, faults, needs_browser, open_browser
from tests.conftest import build_rim, build_tokenizer

EVIL = "<img src=x onerror=document.title=1> ${document.title=2} {{value}} **b**"

pytestmark = needs_browser


def test_a_chat_with_its_panels_shows_texts_as_texts() -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed")
    from playwright.sync_api import expect

    run = Run(build_rim(), build_tokenizer())
    served = serve(Playground(run, name=EVIL, questions=[EVIL, "x" * len(EVIL)], options=Options(chain_tokens=4)))
    hosts, noise = set(), []
    try:
        with open_browser() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(60_000)
            page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
            page.on("console", lambda message: noise.append(message.text))
            page.on("pageerror", lambda error: noise.append(str(error)))
            page.goto(served.local_url)
            page.locator(".gallery-item").nth(1).click()
            box = page.get_by_label("Question", exact=True)
            expect(box).to_have_value("x" * len(EVIL), timeout=60_000)
            page.get_by_role("button", name="Ask").click()
            page.get_by_text("What each block holds").wait_for()
            assert page.locator(".rim tr").count() == 2
            page.get_by_role("button", name="Let the base write").click()
            page.get_by_text("each timed once").wait_for()
            page.get_by_label("Another question").fill(EVIL)
            page.get_by_role("button", name="Swap the blocks").click()
            page.locator(".rim", has_text="The other question").get_by_text(EVIL).wait_for()
            box.fill(EVIL)
            box.press("Enter")
            page.get_by_label("user's message").nth(1).get_by_text(EVIL).wait_for()
            expect(page.locator(".rim tr")).to_have_count(2, timeout=60_000)  # the event has ended
            assert page.locator("img[src=x]").count() == 0
            assert page.title() == f"rim-peft: {EVIL}"
            for scheme in ("dark", "light"):
                page.emulate_media(color_scheme=scheme)
                for width, height in (WIDE, PHONE):
                    page.set_viewport_size({"width": width, "height": height})
                    page.wait_for_timeout(500)  # colours change gradually
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                    # Gradio's list of messages scrolls, but takes no focus.
                    assert faults(page, left_out=".bubble-wrap") == []
            # On a phone the readouts come right below the question.
            assert (
                page.get_by_text("What each block holds").bounding_box()["y"]
                < page.locator("input[type=range]").bounding_box()["y"]
            )
            page.get_by_role("button", name="Clear", exact=True).last.click()
            expect(page.get_by_label("user's message")).to_have_count(0)
            # The policy, as if escaping had failed.
            blocked = "fetch('http://localhost:1/').then(() => 'sent', error => 'blocked')"
            assert page.evaluate(blocked) == "blocked"
            assert any("Content Security Policy" in line for line in noise)
    finally:
        served.close()
    assert hosts <= {"127.0.0.1", None, ""}
    assert [line for line in noise if "Content Security Policy" not in line and "localhost:1" not in line] == []
