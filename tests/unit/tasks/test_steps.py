"""How texts become steps, and where their answers are."""

from __future__ import annotations

import pytest

from rim_peft.data.examples import RowError
from rim_peft.tasks.steps import cut_steps, find_answer, take_thought


@pytest.mark.parametrize(
    ("how", "text", "steps"),
    [
        ("lines", " a \n\n\nb\r\n", ["a", "b"]),
        ("sentences", "So $x = 1.5. Y$ holds. Then go.", ["So $x = 1.5. Y$ holds.", "Then go."]),
        ("numbered", "Let us see:\n1. a\n2) b\n  more\n(3) c", ["a", "b\n  more", "c"]),
        ("numbered", "Step 1: a\n**Step 2:** b\n**3.** c", ["a", "b", "c"]),
        ("numbered", "1.5 is\n2.5", []),
        ("equations", "He has <<3*4=12>>12 and 2+2=4.", ["3*4=12"]),
        ("equations", "So $3 * 2 = $6, and 50% of 6 = 3; (3+4)*2 = 14.", ["$3 * 2 = $6", "(3+4)*2 = 14"]),
        ("equations", "1,000 - 1 = 999, 3 × 4 = 12. 2+2=1+3=4", ["1,000 - 1 = 999", "3 × 4 = 12", "2+2=1+3=4"]),
        ("equations", "x = 5 on 2024-01-02, a1+1=2", []),
        ("regex:\\n\\n", "a\nb\n\nc\n\n", ["a\nb", "c"]),
        ("regex:(?m)^- (.*)$", "- a\nnot\n- b", ["a", "b"]),
    ],
)
def test_texts_are_cut(how: str, text: str, steps: list[str]) -> None:
    assert cut_steps(text, how) == steps


def test_thoughts() -> None:
    assert take_thought("<think>a</think>b<think>c</think>d") == ("a\nc", "bd")
    assert take_thought(" no tags ") == (None, " no tags ")
    for text in ("<think>a", "<think>a</think>b<think>c"):
        with pytest.raises(RowError, match="<think> is never closed"):
            take_thought(text)


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("after:####", "a #### 1\nb\n#### 2 ", ("2", "a #### 1\nb")),
        ("last-number", "from 3 to 1,018.0", ("1018", "from 3 to 1,018.0")),
        ("boxed", r"first \boxed{1}, then \boxed{\frac{1}{2}}", (r"\frac{1}{2}", r"first 1, then \frac{1}{2}")),
    ],
)
def test_answers(how: str, text: str, expected: tuple[str, str]) -> None:
    assert find_answer(text, how) == expected
    for none in ("none", "####", r"\boxed{"):
        with pytest.raises(RowError, match="answer: must be in the text"):
            find_answer(none, how)
