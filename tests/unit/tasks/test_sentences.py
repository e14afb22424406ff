from __future__ import annotations

import pytest

from rim_peft.tasks.steps import split_sentences


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
