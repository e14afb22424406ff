"""The options of a comparison's recipe as text, for ``--help`` and for the table of ``docs/comparison.md``.

``python -m rim_peft.comparison.options docs/comparison.md`` brings the table of that file up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rim_peft.comparison.sections import Comparison, MeasureOptions, MethodOptions, RowsOptions
from rim_peft.recipe.options import Option, as_table, describe_fields

_PARTS: dict[str, type] = {
    "": Comparison,
    "methods.NAME.": MethodOptions,
    "test. or selection.": RowsOptions,
    "measures.": MeasureOptions,
}
_SECTIONS = ("methods", "test", "selection", "measures")
_TABLE = re.compile(r"(?<=<!-- comparison -->\n).*?(?=<!-- end -->)", re.DOTALL)


def list_options() -> list[Option]:
    """List all options."""
    return [
        option
        for prefix, owner in _PARTS.items()
        for option in describe_fields(
            owner,
            fields(owner) if prefix else [field for field in Comparison.options() if field.name not in _SECTIONS],
            prefix=prefix,
        )
    ]


def update_table(text: str) -> str:
    """Return a Markdown text with the table between ``<!-- comparison -->`` and ``<!-- end -->`` written anew."""
    return _TABLE.sub(lambda _: f"{as_table(list_options())}\n", text)


def main(arguments: Sequence[str]) -> None:
    """Write the tables of the given files anew."""
    for name in arguments:
        path = Path(name)
        path.write_text(update_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
