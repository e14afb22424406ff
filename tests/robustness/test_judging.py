"""The judge itself: what it takes for a clear refusal, and what not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rim_peft.recipe import load_recipe
from tests.robustness import judging
from tests.robustness.judging import Case, Verdict, judge, unclear_text


def test_a_result_is_right_or_wrong_as_the_case_says() -> None:
    assert judge(Case("fine", lambda: None)).verdict is Verdict.RIGHT
    outcome = judge(Case("lost", lambda: "two rows are missing"))
    assert (outcome.verdict, outcome.detail) == (Verdict.WRONG, "two rows are missing")


def test_an_error_of_this_package_that_names_the_file_is_clear(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- a list\n")

    def run() -> None:
        load_recipe(path)

    assert judge(Case("a list", run, names=("recipe.yaml",))).verdict is Verdict.REFUSED
    assert judge(Case("a list", run, names=("other.yaml",))).verdict is Verdict.WRONG


def test_errors_of_others_are_not_clear() -> None:
    def parse() -> None:
        json.loads("{")

    assert "outside of this package" in judge(Case("json", parse)).detail
    assert "not an error for users" in judge(Case("type", lambda: len(None))).detail  # type: ignore[arg-type]


def test_a_case_that_takes_too_long_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "MAX_CPU_SECONDS", 0.05)

    def spin() -> None:
        while True:
            pass

    outcome = judge(Case("spins", spin))
    assert outcome.verdict is Verdict.WRONG
    assert "takes too long" in outcome.detail


@pytest.mark.parametrize(
    "text", ["", "x" * 2000, "rows.jsonl: Expecting value: line 1", "'NoneType' object has no attribute 'items'"]
)
def test_messages_that_are_empty_endless_or_of_other_libraries_are_not_clear(text: str) -> None:
    assert unclear_text(text, ()) is not None
