r"""How a text becomes reasoning steps, and where its answer is.

>>> cut_steps("1. Add: 2+3=5\n2. Double: 5*2=10", "numbered"), cut_steps("Add: 2+3=5, so 5*2 = 10.", "equations")
(['Add: 2+3=5', 'Double: 5*2=10'], ['2+3=5', '5*2 = 10'])
"""

from __future__ import annotations

import re

from rim_peft.data.examples import RowError
from rim_peft.tasks.answers import last_number
from rim_peft.tasks.latex import last_box, unbox

MARKED_EQUATION = re.compile(r"<<(.*?)>>")
"""An equation as GSM8K marks it."""

CUTS = ("lines", "sentences", "equations", "numbered")
"""Named ways to cut a text into steps."""

PATTERN = "regex:"
"""Prefix of a regular expression that cuts a text into steps."""

MARKER = "after:"
"""Prefix of a text after which the answer follows."""

READINGS = ("boxed", "last-number")
"""Named places of an answer in a text."""

_NUMERAL = r"\d+(?:[ ,]\d{3}(?!\d))*(?:\.\d+)?(?: \d+/\d+)?"  # 1,000 and 1 000, and mixed: 1 1/2
_OPERAND = rf"[-(]{{0,4}}[$£€]?{_NUMERAL}[%)]{{0,4}}"
_EXPRESSION = re.compile(rf"(?:(?<![\w.])|(?=\()){_OPERAND}(?P<operation>[ \t]*[-+*/×÷·^x][ \t]*{_OPERAND})*")
_NUMBER = re.compile(r"^[ \t]*(?:\*\*)?(?:[Ss]tep[ \t]+)?\(?\d+[.):](?:\*\*)?(?:[ \t]+|$)", re.MULTILINE)


def take_thought(text: str) -> tuple[str | None, str]:
    r"""Return what is inside a text's ``<think>`` tags, None without tags, and what is outside.

    The first tag may be missing, as in texts whose prompt ends with it. Empty tags, which models write that may also
    think, hold ``""``.

    >>> take_thought("<think>\n1+1=2\n</think>\n\n2"), take_thought("1+1=2</think>2"), take_thought("2")
    (('1+1=2', '2'), ('1+1=2', '2'), (None, '2'))

    Raises:
        RowError: a tag is never closed.
    """
    if "</think>" in text and "<think>" not in text.partition("</think>")[0]:
        text = f"<think>{text}"
    inside: list[str] = []
    outside, opened, rest = text.partition("<think>")
    while opened:
        thought, closed, rest = rest.partition("</think>")
        if not closed:
            raise RowError(f"<think> is never closed, in ...{text[-60:]!r}; the text seems to be cut")
        inside.append(thought.strip())
        between, opened, rest = rest.partition("<think>")
        outside += between
    return ("\n".join(filter(None, inside)), outside.strip()) if inside else (None, text)


def check_cut(how: str) -> None:
    """Check the value of ``split_steps``.

    Raises:
        ValueError: it is no named way, and no regular expression with at most one group.
    """
    if how in CUTS:
        return
    rule = f"split_steps: must be one of {', '.join(CUTS)} or {PATTERN}PATTERN, got {how!r}"
    if not how.startswith(PATTERN):
        raise ValueError(f"{rule}.")
    try:
        pattern = re.compile(how.removeprefix(PATTERN))
    except re.error as error:
        raise ValueError(f"{rule}: {error}. Correct the regular expression.") from None
    if pattern.groups > 1:
        raise ValueError(f"{rule} with {pattern.groups} groups. Keep one; write the others as (?:...).")


def cut_steps(text: str, how: str) -> list[str]:
    r"""Cut a text into steps, without empty ones.

    Args:
        text: the whole chain of thought.
        how: one of :data:`CUTS`; or ``regex:`` and a pattern, of which the group is a step, or, if it has none, which
            separates steps.

    Raises:
        RowError: a regular expression matches nothing, or an equation is not one between numbers.

    >>> cut_steps("a\n\nb", "regex:\n\n"), cut_steps("<s>a</s> b <s>c</s>", "regex:<s>(.*?)</s>")
    (['a', 'b'], ['a', 'c'])
    """
    if how == "sentences":
        return split_sentences(text)
    if how == "lines":
        parts = text.split("\n")
    elif how == "equations":
        parts = MARKED_EQUATION.findall(text) or _find_equations(text)
    elif how == "numbered":
        parts = _NUMBER.split(text)[1:]
    else:
        pattern = re.compile(how.removeprefix(PATTERN))
        if pattern.search(text) is None:
            raise RowError(f"{NO_MATCH} in {text[:60]!r}")
        parts = pattern.findall(text) if pattern.groups else pattern.split(text)
    return [part.strip() for part in parts if part.strip()]


def _find_equations(text: str) -> list[str]:
    """Return the equations between numbers in a text that marks none; any other would leave a gap in the chain."""
    chains: list[list[re.Match[str]]] = []  # expressions joined by equals signs
    for part in _EXPRESSION.finditer(text):
        if chains and text[chains[-1][-1].end() : part.start()].strip(" \t") == "=":
            chains[-1].append(part)
        else:
            chains.append([part])
    spans = [(chain[0].start(), chain[-1].end()) for chain in chains if len(chain) > 1 and chain[0]["operation"]]
    spans = [(start, end) for start, end in spans if text.count("(", start, end) == text.count(")", start, end)]
    place = 0
    for start, end in [*spans, (len(text), len(text))]:
        if (sign := text.find("=", place, start)) >= 0:
            around = text[max(0, sign - 30) : sign + 30]
            raise RowError(
                f"steps: must be equations between numbers or marked as <<..>> ('equations'), got {around!r}"
            )
        place = end
    return [text[start:end] for start, end in spans]


NO_MATCH = "split_steps: the regular expression matches nothing"
"""Start of the reason of a row without a match."""


def check_reading(how: str) -> None:
    """Check the value of ``answer_from``.

    Raises:
        ValueError: it is no named place and no marker.
    """
    is_marker = how.startswith(MARKER) and how.removeprefix(MARKER).strip() != ""
    if how not in READINGS and not is_marker:
        raise ValueError(f"answer_from: must be one of {', '.join(READINGS)} or {MARKER}TEXT, got {how!r}.")


def find_answer(text: str, how: str) -> tuple[str, str]:
    r"""Return the answer in a text, and the text as a chain of thought: without the marker and what follows, or boxes.

    >>> find_answer("2*9 = <<2*9=18>>18\n#### 18", "after:####"), find_answer(r"So \boxed{18}.", "boxed")
    (('18', '2*9 = <<2*9=18>>18'), ('18', 'So 18.'))

    Args:
        how: ``boxed`` (the last box), ``last-number``, or ``after:`` and a text (what follows its last occurrence).

    Raises:
        RowError: there is none.
    """
    answer: str | None
    chain = text
    if how == "boxed":
        answer, chain = last_box(text), unbox(text)
    elif how == "last-number":
        answer = last_number(text)
    else:
        before, mark, after = text.rpartition(how.removeprefix(MARKER))
        answer, chain = (after if mark else None), before
    if answer is None or not answer.strip():
        raise RowError(f"answer: must be in the text ({how}), got ...{text[-60:]!r}")
    return answer.strip(), chain.strip()


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
