"""The code blocks of README, CONTRIBUTING and docs: what kind each is, and whether the package understands it.

``python -m tests.documentation`` checks all of them and prints how many there are of each kind. What a block needs that
a test does not have is in a comment before it: ``<!-- needs: gpu, hub -->``. Python blocks without such a comment are
run (``tests/integration/test_docs.py``); commands and recipes are given to the real parsers, with and without it.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.documented_code import NEEDS, check_code, check_inline

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r" *(`{3,}|~{3,}) *([^`\s]*)[^`]*")
_NEEDS = re.compile(r"<!-- needs: ([a-z, ]*) -->")
_INLINE = re.compile(r"(?<!`)`(rim-peft [^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file, from the root of the repository.
        line: where the block begins.
        language: what the fence says; "text" if nothing.
        code: the lines inside.
        needs: what the comment before it says, of :data:`NEEDS`.
    """

    page: str
    line: int
    language: str
    code: str
    needs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """How far it is tested."""
        if self.language == "text":
            return "shown"
        if self.needs:
            return f"checked; needs {', '.join(self.needs)}"
        return "run" if self.language == "python" else "checked"


def read_page(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def read_blocks(page: str, text: str) -> list[Block]:
    """Return the fenced blocks of a page, without Sphinx's directives, which Sphinx checks.

    Raises:
        ValueError: a fence is not closed, or a comment stands before no block or names something unknown.
    """
    found: list[Block] = []
    inside: list[str] = []
    fence, language, start, needs = "", "", 0, ""
    num_comments = 0
    for number, line in enumerate(text.splitlines(), start=1):
        opening = _FENCE.fullmatch(line)
        if fence:
            if line.strip() == fence:
                found.append(Block(page, start, language or "text", "\n".join(inside), _split(needs, page, start)))
                fence, needs = "", ""
            else:
                inside.append(line)
        elif opening:
            fence, language, start, inside = opening[1], opening[2], number, []
        elif line.strip():
            comment = _NEEDS.fullmatch(line.strip())
            needs = comment[1] if comment else ""
            num_comments += comment is not None
    if fence:
        raise ValueError(f"{page}:{start}: the block must be closed by {fence}.")
    if num_comments != sum(bool(block.needs) for block in found):
        raise ValueError(f"{page}: each comment <!-- needs: ... --> must stand before a block. Move or remove one.")
    return [block for block in found if not block.language.startswith("{")]


def _split(needs: str, page: str, line: int) -> tuple[str, ...]:
    names = tuple(name.strip() for name in needs.split(",") if name.strip())
    for name in names:
        if name not in NEEDS:
            raise ValueError(f"{page}:{line}: needs must be some of {', '.join(NEEDS)}, got {name!r}.")
    return names


def problems(page: str, text: str) -> Iterator[str]:
    """Yield what is wrong with the blocks of a page and with the commands in its sentences."""
    try:
        blocks = read_blocks(page, text)
    except ValueError as error:
        yield str(error)
        return
    for block in blocks:
        try:
            check_code(block.language, block.code, block.needs)
        except (ValueError, OSError, SyntaxError) as error:
            yield f"{block.page}:{block.line}: {error}"
    for command in _INLINE.findall(re.sub(r"^ *(```|~~~).*?^ *\1", "", text, flags=re.MULTILINE | re.DOTALL)):
        try:
            check_inline(command)
        except ValueError as error:
            yield f"{page}: `{command}`: {error}"


def main() -> int:
    """Print the problems, and the number of blocks of each kind."""
    os.chdir(ROOT)
    found = [problem for page in PAGES for problem in problems(page, read_page(page))]
    print("\n".join(found), file=sys.stderr)
    blocks = [block for page in PAGES for block in read_blocks(page, read_page(page))]
    counts = Counter((block.language, block.kind) for block in blocks)
    for (language, kind), count in sorted(counts.items()):
        print(f"{language:8} {kind:35} {count:4}")
    print(f"{len(blocks)} blocks on {len(PAGES)} pages, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
