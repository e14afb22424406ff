r"""Answer rules: how an answer is read from a generated text, and when it is right. Pure functions, by name.

| rule | reads | right if |
|---|---|---|
| ``last-number-float`` | without commas, the last ``-?\d+\.?\d*`` | equal as floats |
| ``abs-1e-3`` | the same | differs by less than 0.001 |
| ``strict-string`` | without commas, the text after the first ``####``, else the whole text | equal as strings |
| ``yes-no`` | the last of the words yes, no, true and false | the same: yes = true, no = false |
| ``leading-letter`` | a letter A to G at the start of the text | equal |
| ``exact-digits`` | the text without white space and a final full stop | equal |
| ``boxed-string`` | the last box of LaTeX, else the whole text, normalised | equal |
| ``math-verify`` | the last box, else the whole text | ``math_verify`` finds them equal |

``exact-text`` is the rule of tasks that name none. Pitfalls: ``docs/tasks.md``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rim_peft.tasks.latex import are_equal_expressions, last_box, normalise_latex

_LAST_NUMBER = re.compile(r"-?\d+\.?\d*")
_YES_NO = re.compile(r"\b(?:(yes|true)|(no|false))\b", re.IGNORECASE)
_LEADING_LETTER = re.compile(r"\s*\(?([A-G])\b")


@dataclass(frozen=True)
class AnswerRule:
    """A rule: how to read an answer, and how to compare it.

    Attributes:
        read: returns the answer in a text, None if there is none; equal answers give equal strings, as far as the rule
            can tell.
        is_right: tells whether a read answer equals the gold answer; raises ``ValueError`` on a gold that the rule
            cannot read, so that no answer ever equals it.
    """

    read: Callable[[str], str | None]
    is_right: Callable[[str | None, str], bool]


def exact_text(text: str) -> str | None:
    """Return a text without surrounding white space and a final full stop."""
    return text.strip().removesuffix(".").rstrip() or None


def last_number(text: str) -> str | None:
    """Return a text's last number as CODI finds it, in a normal form.

    A number starts with a digit, or a minus sign before one: the last number of ``.5`` is 5, and that of ``10-5`` is
    -5.

    >>> [last_number(text) for text in ("18.", "18.0", "1,000", ".5", "10-5", "none")]
    ['18', '18', '1000', '5', '-5', None]

    Source: CODI, arXiv 2502.21074, ``test.py`` of its repository.
    """
    numbers = _LAST_NUMBER.findall(text.replace(",", ""))
    return _plain(numbers[-1]) if numbers else None


def strict_string(text: str) -> str | None:
    """Return the text after the first ``####``, else the whole text, without commas, as iCoT does.

    >>> strict_string("12+6 #### 1,018"), strict_string("18."), strict_string("#### 18 #### 20")
    ('1018', '18.', '18 #### 20')
    """
    text = text.replace(",", "")
    _, mark, after = text.partition("####")
    return (after if mark else text).strip() or None


def yes_or_no(text: str) -> str | None:
    """Return ``yes`` or ``no`` by the last of the words yes, true, no and false.

    >>> yes_or_no("Not true? No: TRUE."), yes_or_no("I know nothing")
    ('yes', None)
    """
    words = list(_YES_NO.finditer(text))
    return None if not words else "yes" if words[-1][1] else "no"


def leading_letter(text: str) -> str | None:
    """Return the letter A to G at the start of a text, as in ``B``, ``(B)`` or ``B. because``.

    >>> leading_letter(" (B) because"), leading_letter("The answer is B"), leading_letter("Because")
    ('B', None, None)
    """
    match = _LEADING_LETTER.match(text)
    return match[1] if match else None


def exact_digits(text: str) -> str | None:
    """Return a text without white space and a final full stop, so that a tokenizer's spaces do not matter.

    >>> exact_digits(" 5 5 6 0.")
    '5560'
    """
    return "".join(text.split()).removesuffix(".") or None


def boxed_string(text: str) -> str | None:
    r"""Return the content of the last box, or the whole text if it has none, normalised.

    >>> boxed_string(r"So $x = \boxed{\dfrac12}$."), boxed_string(" 1/2 ")
    ('\\frac{1}{2}', '\\frac{1}{2}')
    """
    return normalise_latex(boxed_text(text) or "") or None


def boxed_text(text: str) -> str | None:
    r"""Return the content of the last box, or the whole text if it has none, unchanged.

    >>> boxed_text(r"So $x = \boxed{\dfrac12}$."), boxed_text(" 1/2 ")
    ('\\dfrac12', '1/2')
    """
    box = last_box(text)
    return (text if box is None else box).strip() or None


def parse_gold_number(gold: str) -> float:
    """Return a gold answer as a number, or the number after its last ``####``.

    Raises:
        ValueError: it is not a finite number.
    """
    try:
        number = float(gold.rpartition("####")[2].replace(",", "").strip())
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"gold: must be a number or end in '#### number', got {gold!r}. Correct the row.")
    return number


def _is_float(answer: str | None, gold: str) -> bool:
    number = parse_gold_number(gold)
    return answer is not None and float(answer) == number


def _is_close(answer: str | None, gold: str) -> bool:
    number = parse_gold_number(gold)
    return answer is not None and abs(float(answer) - number) < 1e-3


def _is_string(answer: str | None, gold: str) -> bool:
    parse_gold_number(gold)
    return answer is not None and answer == gold.rpartition("####")[2].replace(",", "").strip()


def _same(read: Callable[[str], str | None], must_be: str) -> AnswerRule:
    """Return a rule that reads text and gold in the same way and requires equal results."""

    def is_right(answer: str | None, gold: str) -> bool:
        if (wanted := read(gold)) is None:
            raise ValueError(f"gold: must be {must_be}, got {gold!r}. Correct the row.")
        return answer == wanted

    return AnswerRule(read, is_right)


def _is_verified(answer: str | None, gold: str) -> bool:
    if (wanted := boxed_text(gold)) is None:
        raise ValueError(f"gold: must not be empty, got {gold!r}. Correct the row.")
    return answer is not None and are_equal_expressions(answer, wanted)


def _plain(number: str) -> str:
    """Return a number without redundant zeros, points and signs."""
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number)
    whole, _, fraction = digits.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    plain = f"{whole}.{fraction}" if fraction else whole
    return plain if plain == "0" else sign + plain


RULES: Mapping[str, AnswerRule] = {
    "last-number-float": AnswerRule(last_number, _is_float),
    "abs-1e-3": AnswerRule(last_number, _is_close),
    "strict-string": AnswerRule(strict_string, _is_string),
    "yes-no": _same(yes_or_no, "yes, no, true or false"),
    "leading-letter": _same(leading_letter, "a letter A to G"),
    "exact-digits": _same(exact_digits, "digits"),
    "boxed-string": _same(boxed_string, "an answer"),
    "math-verify": AnswerRule(boxed_text, _is_verified),
}
"""The shared rules, by name."""
