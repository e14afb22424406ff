"""Sentences of a text with formulas."""

from __future__ import annotations

import re

_FORMULA = re.compile(
    r"\[asy\].*?\[/asy\]|\\begin\{(?P<name>\w+\*?)\}.*?\\end\{(?P=name)\}|(?<!\\)\$\$.*?\$\$|(?<!\\)\$.*?(?<!\\)\$"
    r"|(?<!\\)\\\[.*?\\\]|(?<!\\)\\\(.*?\\\)",
    re.DOTALL,
)
"""What is never split: formulas and drawings."""

_GAP = re.compile(r"\n\s*\n|\s+(?=[A-Z$\\(\"'0-9])")
"""Where a sentence may end: before an empty line, or before what may begin one."""

_END = re.compile(r"[.!?][\"')\]]*(?:\$\$?|\\\]|\\\))?$")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|e\.g|i\.e|etc|vs|cf|resp|Dr|Mr|Mrs|Ms|St|No|Fig|Eq)\.$")


def split_sentences(text: str) -> list[str]:
    r"""Split a text into its sentences, never inside a formula; a formula may end a sentence with its own full stop.

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
