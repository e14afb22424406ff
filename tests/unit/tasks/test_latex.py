r"""The last box, and the normalisation of MATH's authors."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from rim_peft.tasks import get_task
from rim_peft.tasks.latex import are_equal_expressions, find_boxes, last_box, normalise_latex, unbox


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{12}", "12"),
        (r"$\boxed{\frac{1}{2^{n+1}}}$.", r"\frac{1}{2^{n+1}}"),
        (r"\boxed{1}, then \fbox{2}", "2"),
        (r"\fbox{\boxed{3}}", r"\boxed{3}"),
        (r"is $\boxed 5$ or so", "5"),
        (r"is $\boxed5$", "5"),
        (r"is $\boxed {7}$", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} but \boxed{2", None),
        (r"\boxed{}", None),
        (r"\boxedness{5}", None),
        ("12", None),
        ("", None),
    ],
)
def test_the_last_box_counts_with_its_braces_matched(text: str, expected: str | None) -> None:
    assert last_box(text) == expected


def test_boxes_are_taken_off() -> None:
    assert unbox(r"So $\boxed{a_{1}}$ and $\fbox{b}$.") == "So $a_{1}$ and $b$."
    assert unbox("None.") == "None."
    assert find_boxes("x") == []


# Expected strings by hand, from the published description of MATH's normalisation.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\tfrac{1}{2}", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{2}}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\sqrt{2}", r"\sqrt{2}"),
        (r"\sqrt[3]{2}", r"\sqrt[3]{2}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$12", "12"),
        (r"12\%", "12"),
        (r"12\text{ cm}", "12"),
        (r"\text{Monday}", r"\text{Monday}"),
        ("x = 5", "5"),
        ("xyz=5", "xyz=5"),
        ("a=b=5", "a=b=5"),
        (".5", r"\frac{1}{2}"),
        (".25", "0.25"),
        ("{.25}", "{0.25}"),
        ("3/4", r"\frac{3}{4}"),
        ("a/b", "a/b"),
        (r"1\!000", "1000"),
        ("$12$.", "12"),
        ("1,000", "1,000"),
        (" ", ""),
        (".", ""),
    ],
)
def test_normalises(text: str, expected: str) -> None:
    assert normalise_latex(text) == expected
    assert normalise_latex(expected) == expected


def test_without_its_package_math_verify_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    message = r"answer_rule: 'math-verify' needs .* pip install 'rim-peft\[math\]'"
    with pytest.raises(ImportError, match=message):
        are_equal_expressions("1", "1")
    for options in ({"math_verify": True}, {"answer_rule": "math-verify"}):
        with pytest.raises(ImportError, match=message):
            get_task("math", **options)
    assert get_task("math").judge(r"\boxed{1}", "1") == {"boxed-string": True}
