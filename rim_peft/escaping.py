"""Escape untrusted text: one function for each kind of output."""

from __future__ import annotations

import html
import json
import re
from typing import Any

_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters, including ANSI's escape
    "\u202a-\u202e\u2066-\u2069"  # changes of text direction
    "\ud800-\udfff\ufffe\uffff]"  # surrogates and non-characters
)


def visible(text: str) -> str:
    r"""Escape control characters, changes of direction and lone surrogates.

    The result can be encoded and has no effect on a terminal or browser. Line breaks and tabs stay.

    >>> print(visible("a\x1b[31mb \u202ec \ud83d"))
    a\x1b[31mb \u202ec \ud83d
    """
    return _UNSEEN.sub(lambda found: found[0] if found[0] in "\n\t" else _written_out(found[0]), text)


def one_line(text: str) -> str:
    r"""Return visible text on one line, with single spaces.

    >>> one_line("a\n  b\x07")
    'a b\\x07'
    """
    return visible(" ".join(text.split()))


def json_text(value: Any, *, indent: int | None = None) -> str:
    r"""Return JSON that keeps non-ASCII letters, reads back unchanged, and can be encoded and printed.

    >>> print(json_text({"name": "café \ud83d\x9b"}))
    {"name": "café \ud83d\u009b"}
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _UNSEEN.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def markdown(text: str) -> str:
    r"""Escape text for Markdown, on one line; tables and headings are safe too.

    >>> print(markdown("a|b <i> *c* d_e _f_"))
    a\|b \<i\> \*c\* d_e \_f\_
    """
    text = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", one_line(text))
    text = re.sub(r"(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])", r"\\_", text)
    return re.sub(r"^([#+-]+|\d+(?=[.)]))(?=[.)]?\s)", _without_meaning, text)  # headings and lists


def code_span(text: str, *, in_table: bool = False) -> str:
    """Return text as an inline Markdown code span, whatever backticks it contains.

    >>> code_span("a|b"), code_span("a|b", in_table=True), code_span("a`b")
    ('`a|b`', '`a\\\\|b`', '`` a`b ``')
    """
    text = one_line(text)
    if in_table:  # a bar ends the cell even inside code
        text = text.replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    if not longest and text:
        return f"`{text}`"
    return f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"


def fence(text: str, language: str) -> str:
    """Return text as a fenced Markdown code block; the fence is longer than any run of backticks inside."""
    text = visible(text.replace("\r\n", "\n"))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def page(text: str) -> str:
    """Escape text for HTML elements and quoted attributes."""
    return html.escape(visible(text))


def _written_out(character: str) -> str:
    return f"\\x{ord(character):02x}" if character < "\x80" else f"\\u{ord(character):04x}"


def _without_meaning(found: re.Match[str]) -> str:
    return f"{found[0]}\\" if found[0].isdecimal() else f"\\{found[0]}"
