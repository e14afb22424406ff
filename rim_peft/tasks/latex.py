"""Answers in LaTeX: found in their box, unpacked, written in one way, compared as expressions."""

from __future__ import annotations

import re
import threading

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
