"""How texts become steps, and where their answers are."""

from __future__ import annotations

import time

import pytest

from rim_peft.data.examples import RowError
from rim_peft.tasks.steps import cut_steps, find_answer, split_sentences, take_thought


@pytest.mark.parametrize(
    ("how", "text", "steps"),
    [
        ("lines", " a \n\n\nb\r\n", ["a", "b"]),
        ("sentences", "So $x = 1.5. Y$ holds. Then go.", ["So $x = 1.5. Y$ holds.", "Then go."]),
        ("numbered", "Let us see:\n1. a\n2) b\n  more\n(3) c", ["a", "b\n  more", "c"]),
        ("numbered", "Step 1: a\n**Step 2:** b\n**3.** c", ["a", "b", "c"]),
        ("numbered", "1.5 is\n2.5", []),
        ("equations", "He has <<3*4=12>>12 and 2+2=4.", ["3*4=12"]),
        ("equations", "So $3 * 2 = $6, and 50% more; (3+4)*2 = 14.", ["$3 * 2 = $6", "(3+4)*2 = 14"]),
        (
            "equations",
            "2 + 1 1/2 = 3 1/2 feet, bags(1/3)*27=9, 8 x 2 = 16",
            ["2 + 1 1/2 = 3 1/2", "(1/3)*27=9", "8 x 2 = 16"],
        ),
        ("equations", "400 000 x 3/100 = $12 000", ["400 000 x 3/100 = $12 000"]),
        ("equations", "1,000 - 1 = 999, 3 × 4 = 12. 2+2=1+3=4", ["1,000 - 1 = 999", "3 × 4 = 12", "2+2=1+3=4"]),
        ("equations", "- 2+3=5\n- 5*2=10\n", ["2+3=5", "5*2=10"]),
        ("equations", "5 nuts on 2024-01-02", []),
        ("regex:\\n\\n", "a\nb\n\nc\n\n", ["a\nb", "c"]),
        ("regex:(?m)^- (.*)$", "- a\nnot\n- b", ["a", "b"]),
    ],
)
def test_texts_are_cut(how: str, text: str, steps: list[str]) -> None:
    assert cut_steps(text, how) == steps


@pytest.mark.parametrize("text", ["1+1=2, so x = 2", "2*(x+1)=4", "a1+1=2", "1+1=2 and (1+2=3"])
def test_an_equation_that_is_not_between_numbers_would_be_a_gap(text: str) -> None:
    with pytest.raises(RowError, match=r"steps: must be equations between numbers or marked as <<\.\.>> .*, got '.*="):
        cut_steps(text, "equations")
    assert cut_steps(f"{text} <<1+1=2>>", "equations") == ["1+1=2"]


@pytest.mark.parametrize(
    "text", ["1+" * 50_000, "(" * 50_000, "1+1=2 " * 20_000, "1 000" * 20_000, "\n" * 50_000 + "1"]
)
def test_no_text_takes_long(text: str) -> None:
    start = time.process_time()
    for how in ("equations", "numbered"):
        cut_steps(text, how)
    assert time.process_time() - start < 2


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? four.", ["One.", "Two!", "Three? four."]),
        ("So $f(x. Y) = 1$. Then $y$ is 2.", ["So $f(x. Y) = 1$.", "Then $y$ is 2."]),
        ("Hence $x = 5.$ Now $y = 6.$", ["Hence $x = 5.$", "Now $y = 6.$"]),
        ("We get\n\\[x = 5. Y = 6.\\]\nThus 7.", ["We get \\[x = 5. Y = 6.\\]", "Thus 7."]),
        ("It costs \\$5. Tom pays \\$6. So be it.", ["It costs \\$5.", "Tom pays \\$6.", "So be it."]),
        ("First part\n\nSecond part", ["First part", "Second part"]),
        ("A line\nthat goes on. $x$ is next.", ["A line that goes on.", "$x$ is next."]),
        ("By Eq. 3 and Mr. Fox, i.e. Tom. Done.", ["By Eq. 3 and Mr. Fox, i.e. Tom.", "Done."]),
        ("It is 2.5 of 3.", ["It is 2.5 of 3."]),
        (
            "\\begin{align*}\na. B\\\\\n\nc. D.\n\\end{align*}\nSo 3.",
            ["\\begin{align*} a. B\\\\ c. D. \\end{align*} So 3."],
        ),
        (" \n ", []),
    ],
)
def test_splits_between_sentences_and_never_in_formulas(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected
