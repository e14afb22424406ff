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
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_FRACTION = re.compile(r"\\frac(?:\{(?P<top>[^{}]*)\}|\s*(?P<digit>[^\s{\\]))\s*(?:(?P<brace>\{)|(?P<below>[^\s{\\]))")
_ASSIGNMENT = re.compile(r"[^=]{1,2}=([^=]+)")

_REPLACED = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
)


def find_boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Return all ``\boxed{...}``, ``\fbox{...}`` and ``\boxed 5`` as (start, end, content), with matched braces.

    A box that is never closed has no content and extends to the end of the text.

    >>> find_boxes(r"$\boxed{\frac{1}{2}}$ or $\boxed 5$")
    [(1, 20, '\\frac{1}{2}'), (26, 34, '5')]
    """
    boxes: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        if boxes and match.start() < boxes[-1][1]:  # inside another box
            continue
        start = match.end()
        while start < len(text) and text[start] == " ":
            start += 1
        if text[start : start + 1] == "{":
            end = _closing_brace(text, start)
            boxes.append((match.start(), end + 1, text[start + 1 : end]) if end else (match.start(), len(text), ""))
        else:
            end = min((place for mark in "$\n" if (place := text.find(mark, start)) >= 0), default=len(text))
            boxes.append((match.start(), end, text[start:end].strip()))
    return boxes


def last_box(text: str) -> str | None:
    r"""Return the content of a text's last box; None if there is none or it is never closed.

    >>> last_box(r"$\boxed{1}$, no, $\boxed{2}$"), last_box("12"), last_box(r"\boxed{1} \boxed{")
    ('2', None, None)
    """
    boxes = find_boxes(text)
    return boxes[-1][2] or None if boxes else None


def unbox(text: str) -> str:
    r"""Replace each box in a text by its content.

    >>> unbox(r"So $x = \boxed{12}$.")
    'So $x = 12$.'
    """
    parts, place = [], 0
    for start, end, content in find_boxes(text):
        parts += [text[place:start], content]
        place = end
    return "".join(parts) + text[place:]


def normalise_latex(text: str) -> str:
    r"""Normalise an answer as MATH's authors do to compare answers as strings.

    Removes spaces, ``\left``, ``\right``, degrees, dollar and per cent signs, a final unit in ``\text{ ...}``, and a
    name of at most two characters before ``=``. Adds the braces of fractions and roots. ``.5`` becomes ``0.5``; ``0.5``
    and ``a/b`` of integers become fractions.

    >>> [normalise_latex(text) for text in (r"\tfrac 34", "x = 5", r"12\text{ cm}", r"\sqrt3", "50\\%", "0.5")]
    ['\\frac{3}{4}', '5', '12', '\\sqrt{3}', '50', '\\frac{1}{2}']

    Source: Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874; written
    from the description of its normalisation.
    """
    text = text.replace("\\$", "").lstrip("$ \n\t").rstrip("$. \n\t")
    for old, new in _REPLACED:
        text = text.replace(old, new)
    before, unit, after = text.partition("\\text{ ")
    text = before if unit and before and "\\text{ " not in after else text
    text = text.replace("\\%", "")
    text = re.sub(r"(^|[\s{])\.(?=\d)", r"\g<1>0.", text).strip()
    if assignment := _ASSIGNMENT.fullmatch(text):
        text = assignment[1]
    text = re.sub(r"\\sqrt\s*([^\s{\\\[])", r"\\sqrt{\1}", text)
    text = _FRACTION.sub(_brace_fraction, text)
    text = "".join(text.split())
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"(-?\d+)/(-?\d+)", r"\\frac{\1}{\2}", text) if re.fullmatch(r"-?\d+/-?\d+", text) else text


def check_math_verify() -> None:
    """Check that ``math_verify`` is installed.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "answer_rule: 'math-verify' needs the package math-verify, which is not installed. "
            "Install it: pip install 'rim-peft[math]'."
        ) from error


def are_equal_expressions(answer: str, gold: str) -> bool:
    """Tell whether ``math_verify`` finds two LaTeX expressions equal; an unparsable text equals nothing.

    Raises:
        ImportError: ``math_verify`` is not installed.
    """
    check_math_verify()
    from math_verify import parse, verify

    # Its timeout uses an alarm signal, which only the main thread can set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    left, right = (parse(f"${text.strip('$. ')}$", parsing_timeout=seconds) for text in (gold, answer))
    return bool(verify(left, right, timeout_seconds=seconds))


def _brace_fraction(match: re.Match[str]) -> str:
    top = match["digit"] if match["top"] is None else match["top"]
    return f"\\frac{{{top}}}" + ("{" if match["brace"] else f"{{{match['below']}}}")


def _closing_brace(text: str, start: int) -> int | None:
    """Return the index of the brace that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        is_escaped = place > 0 and text[place - 1] == "\\"
        if not is_escaped and text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place
    return None


_FORMULA = re.compile(
    r"\[asy\].*?\[/asy\]|\\begin\{(?P<name>\w+\*?)\}.*?\\end\{(?P=name)\}|(?<!\\)\$\$.*?\$\$|(?<!\\)\$.*?(?<!\\)\$"
    r"|(?<!\\)\\\[.*?\\\]|(?<!\\)\\\(.*?\\\)",
    re.DOTALL,
)
"""Formulas and drawings, which are never split."""

_GAP = re.compile(r"\n\s*\n|\s+(?=[A-Z$\\(\"'0-9])")
"""Where a sentence may end: at an empty line, or before a character that may start a sentence."""

_END = re.compile(r"[.!?][\"')\]]*(?:\$\$?|\\\]|\\\))?$")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|e\.g|i\.e|etc|vs|cf|resp|Dr|Mr|Mrs|Ms|St|No|Fig|Eq)\.$")


def split_sentences(text: str) -> list[str]:
    r"""Split a text into sentences, never inside a formula; a full stop inside a formula may end a sentence.

    >>> split_sentences("So $x = 1.5. Y$ holds. Then $y=2.$ Mr. Fox has \\$3.50. Done!")
    ['So $x = 1.5. Y$ holds.', 'Then $y=2.$', 'Mr. Fox has \\$3.50.', 'Done!']
    """
    formulas = [match.span() for match in _FORMULA.finditer(text)]
    sentences, start = [], 0
    for gap in _GAP.finditer(text):
        if any(first < gap.end() and gap.start() < last for first, last in formulas):
            continue
        before = text[start : gap.start()]
        is_end = "\n\n" in re.sub(r"[^\S\n]", "", gap[0]) or _END.search(before)
        if is_end and not _ABBREVIATION.search(before):
            sentences.append(before)
            start = gap.end()
    return [sentence for part in [*sentences, text[start:]] if (sentence := " ".join(part.split()))]
