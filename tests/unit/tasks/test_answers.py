"""The answer rules on the texts on which such rules disagree."""

from __future__ import annotations

import pytest

from rim_peft.tasks.answers import RULES, exact_text

# What a text's answer is, and whether it is right where the gold answer is 18: by the last number, by the string.
NUMBERS = [
    ("18", "18", True, "18", True),
    (" 18\n", "18", True, "18", True),
    ("18.", "18", True, "18.", False),
    ("18.0", "18", True, "18.0", False),
    ("018", "18", True, "018", False),
    ("18.50", "18.5", False, "18.50", False),
    (".5", "5", False, ".5", False),
    ("-5", "-5", False, "-5", False),
    ("1,000", "1000", False, "1000", False),
    ("1,8", "18", True, "18", True),
    ("10-5", "-5", False, "10-5", False),
    ("10 - 18", "18", True, "10 - 18", False),
    ("36-18", "-18", False, "36-18", False),
    ("1/18", "18", True, "1/18", False),
    ("18%", "18", True, "18%", False),
    ("$18", "18", True, "$18", False),
    ("18 of 20", "20", False, "18 of 20", False),
    ("12+6 #### 18", "18", True, "18", True),
    ("#### 18 #### 20", "20", False, "18 #### 20", False),
    ("#### 20 #### 18", "18", True, "20 #### 18", False),
    ("####", None, False, None, False),
    ("eighteen", None, False, "eighteen", False),
    ("", None, False, None, False),
    ("-0.0", "0", False, "-0.0", False),
    ("1.8e1", "1", False, "1.8e1", False),
    ("9" * 400, "9" * 400, False, "9" * 400, False),
]


@pytest.mark.parametrize(("text", "number", "is_right_number", "string", "is_right_string"), NUMBERS)
def test_the_two_rules_of_numbers(
    text: str, number: str | None, is_right_number: bool, string: str | None, is_right_string: bool
) -> None:
    by_number, by_string = RULES["last-number-float"], RULES["strict-string"]
    assert by_number.read(text) == number
    assert by_number.is_right(number, "18") is is_right_number
    assert by_string.read(text) == string
    assert by_string.is_right(string, "18") is is_right_string


# CODI's own cases: the gold answer is a float of the text behind the last '####', the prediction the last number.
@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("1,000", "1000", True),
        ("1000", "#### 1,000", True),
        ("10-5", "-5", True),
        ("10-5", "5", False),
        ("1/2", "2", True),
        ("1/2", "0.5", False),
        ("0.50", "0.5", True),
        (".5", ".5", False),
        (".5", "5", True),
        ("18", "48/2 = 24 #### 18", True),
        ("18", "#### 20 #### 18", True),
    ],
)
def test_numbers_are_compared_as_floats(text: str, gold: str, expected: bool) -> None:
    rule = RULES["last-number-float"]
    assert rule.is_right(rule.read(text), gold) is expected


@pytest.mark.parametrize(
    ("text", "gold", "exact", "close"),
    [
        ("2.5", "2.5", True, True),
        ("2.4991", "2.5", False, True),
        ("2.5009", "2.5", False, True),
        ("2.4989", "2.5", False, False),
        ("0.125", "0.126", False, False),
        ("0", "0.0000020107", False, True),
        ("-3", "-3.0", True, True),
        ("", "2.5", False, False),
        ("9" * 400, "2.5", False, False),
    ],
)
def test_a_thousandth_is_close_enough_where_the_rule_says_so(text: str, gold: str, exact: bool, close: bool) -> None:
    for name, expected in (("last-number-float", exact), ("abs-1e-3", close)):
        assert RULES[name].is_right(RULES[name].read(text), gold) is expected


@pytest.mark.parametrize("gold", ["many", "", "inf", "nan", "#### none"])
@pytest.mark.parametrize("rule", ["last-number-float", "abs-1e-3", "strict-string"])
def test_a_gold_answer_that_is_no_number_is_an_error_not_a_match(gold: str, rule: str) -> None:
    with pytest.raises(ValueError, match="gold: must be a number or end in '#### number', got"):
        RULES[rule].is_right(RULES[rule].read("no number"), gold)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("TRUE", "yes"),
        ("False", "no"),
        ("The answer is yes, not no", "no"),
        ("No, it is true", "yes"),
        ("yes or no", "no"),
        ("nothing is known, untrue eyes", None),
        ("yesterday", None),
        ("it's a no-brainer", "no"),
        ("", None),
        ("1", None),
    ],
)
def test_yes_and_no_are_words_and_the_last_counts(text: str, expected: str | None) -> None:
    rule = RULES["yes-no"]
    assert rule.read(text) == expected
    assert rule.is_right(rule.read(text), "yes") is (expected == "yes")
    assert rule.is_right(rule.read(text), "false") is (expected == "no")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" B. because", "B"),
        ("(B)", "B"),
        ("B)", "B"),
        ("\nB\nC", "B"),
        ("The answer is B", None),
        ("Because of C", None),
        ("b", None),
        ("G", "G"),
        ("H", None),
        ("I think B", None),
        ("", None),
        ("A man", "A"),  # the trap: an article is a letter
        ("BC", None),
        ("[B]", None),
    ],
)
def test_a_letter_counts_at_the_beginning_alone(text: str, expected: str | None) -> None:
    rule = RULES["leading-letter"]
    assert rule.read(text) == expected
    assert rule.is_right(rule.read(text), "B") is (expected == "B")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5 5 6 0", True), ("5560", True), (" 5 56 0. ", True), ("5 5 6", False), ("0 5 5 6 0", False), ("", False)],
)
def test_digits_are_compared_whatever_the_spaces(text: str, expected: bool) -> None:
    rule = RULES["exact-digits"]
    assert rule.is_right(rule.read(text), "5 5 6 0") is expected


@pytest.mark.parametrize(
    ("text", "gold", "string", "verified"),
    [
        (r"So $\boxed{\frac12}$", r"\frac{1}{2}", True, True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True, True),
        (r"\boxed{1/2}", r"\dfrac{1}{2}", True, True),
        (r"\boxed{2/4}", r"\frac{1}{2}", False, True),
        (r"\boxed{0.25}", r"\frac{1}{4}", False, True),
        (r"\fbox{12}", "12", True, True),
        (r"$\boxed 5$", "5", True, True),
        ("12", "12", True, True),
        ("12.", "12", True, True),
        (r"$x=12$", "12", True, True),
        (r"\boxed{1} or \boxed{2}", "2", True, True),
        (r"\boxed{1} or \boxed{2}", "1", False, False),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", False, True),
        (r"\boxed{(1,2)}", "(2,1)", False, False),
        ("1,000", "1000", False, True),
        (r"\boxed{\begin{pmatrix} 2/4 \\ 3 \end{pmatrix}}", r"\begin{pmatrix}1/2\\3\end{pmatrix}", False, True),
        ("the answer is 12", "12", False, True),  # math_verify looks for expressions in a text
        ("the answer is 13", "12", False, False),
        ("", "12", False, False),
    ],
)
def test_boxes_are_compared_as_strings_or_as_expressions(text: str, gold: str, string: bool, verified: bool) -> None:
    for name, expected in (("boxed-string", string), ("math-verify", verified)):
        if name == "math-verify":
            pytest.importorskip("math_verify")
        assert RULES[name].is_right(RULES[name].read(text), gold) is expected


@pytest.mark.parametrize(
    ("rule", "gold", "message"),
    [
        ("yes-no", "maybe", "gold: must be yes, no, true or false, got 'maybe'"),
        ("leading-letter", "H", "gold: must be a letter A to G, got 'H'"),
        ("exact-digits", " ", "gold: must be digits, got ' '"),
        ("boxed-string", "$ $", r"gold: must be an answer, got '\$ \$'"),
        ("math-verify", "", "gold: must not be empty"),
    ],
)
def test_a_gold_that_a_rule_cannot_read_is_an_error(rule: str, gold: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RULES[rule].is_right(None, gold)


def test_exact_texts_lose_their_ends_alone() -> None:
    assert [exact_text(text) for text in (" Tom is. ", "Tom is..", ".", "")] == ["Tom is", "Tom is.", None, None]
