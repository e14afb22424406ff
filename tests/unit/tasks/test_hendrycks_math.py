"""MATH: rows written by hand in the published form."""

from __future__ import annotations

from typing import Any

import pytest

from rim_peft.data.examples import Example, RowError
from rim_peft.tasks import get_task

SOLUTION = (
    "The slope is $\\frac{6}{3} = 2.$ By symmetry, the other is $-2$. [asy] draw((0,0)--(1,1)); [/asy]\n\nTherefore, "
    "their product is \\[2 \\cdot (-2) = \\boxed{-4}.\\]"
)
STEPS = (
    "The slope is $\\frac{6}{3} = 2.$",
    "By symmetry, the other is $-2$.",
    "Therefore, their product is \\[2 \\cdot (-2) = -4.\\]",
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"problem": "Find it.", "solution": SOLUTION, "level": "Level 2", "type": "Algebra"},
            Example("Find it.", answer="-4", steps=STEPS),
        ),
        (
            {"problem": "p", "solution": "It is $\\boxed{\\frac12}$.", "answer": "\\frac{1}{2}", "subject": "Algebra"},
            Example("p", answer="\\frac12", steps=("It is $\\frac12$.",)),
        ),
        (
            {"problem": "p", "solution": "Add. We get 5.\n\n$\\boxed{5}$.", "type": "Algebra"},
            Example("p", answer="5", steps=("Add.", "We get 5.")),
        ),
        ({"problem": "p", "solution": "$\\boxed 5$"}, Example("p", answer="5")),
        (
            {"problem": "p", "solution": "No box here.", "answer": "7"},
            Example("p", answer="7", steps=("No box here.",)),
        ),
    ],
)
def test_reads_the_published_forms(row: dict[str, Any], expected: Example) -> None:
    assert get_task("math").read_row(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"solution": "s"}, "problem: the row has no such field; its fields: solution"),
        ({"problem": "p"}, "solution: the row has no such field; its fields: problem"),
        ({"problem": "p", "solution": "No box."}, r"solution: must hold \\boxed{} if there is no answer"),
        ({"problem": "p", "solution": "No box.", "answer": 5}, "answer: must be a text, got 5"),
    ],
)
def test_names_what_is_wrong_with_a_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        get_task("math").read_row(row)


def test_the_second_rule_is_reported_where_it_is_asked_for() -> None:
    pytest.importorskip("math_verify")
    plain, both = get_task("math"), get_task("math", math_verify=True)
    assert plain.judge(r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == {"boxed-string": False}
    assert both.judge(r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == {"boxed-string": False, "math-verify": True}
    assert not both.is_correct(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
    deciding = get_task("math", answer_rule="math-verify")
    assert deciding.answer_rules == both.answer_rules
    assert deciding.is_correct(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")


def test_equal_answers_are_read_alike() -> None:
    texts = (r"\boxed{\frac12}", "$1/2$", r"\boxed{0.5}")
    assert {get_task("math").read_answer(text) for text in texts} == {r"\frac{1}{2}"}
