"""The options of a recipe as text, for ``--help`` and for the tables in ``docs/recipes.md``.

``python -m rim_peft.recipe.options docs/recipes.md`` updates the tables in that file.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from rim_peft.methods import STAGES
from rim_peft.recipe.checks import OWN_SECTIONS, section_class
from rim_peft.recipe.reading import own_fields
from rim_peft.recipe.sections import Recipe
from rim_peft.recipe.syntax import describe

SECTIONS = ("", *OWN_SECTIONS, "adapter", *STAGES)
"""The top level ("") and the sections."""

_TABLE = re.compile(r"(?<=<!-- options: )(\w*) ?-->\n.*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Option:
    """One key: its full name, allowed values, default as YAML, and help."""

    key: str
    values: str
    default: str
    help: str


def list_options(section: str) -> list[Option]:
    """List the options of a section, or of the top level ("")."""
    owner = section_class(section) if section else Recipe
    inside = own_fields(section) if section else [field for field in fields(Recipe) if field.name not in SECTIONS]
    return describe_fields(owner, inside, prefix=f"{section}." if section else "")


def describe_fields(owner: type, inside: Sequence[Field[Any]], *, prefix: str) -> list[Option]:
    """Describe fields of a dataclass as keys with a prefix."""
    hints = get_type_hints(owner)
    return [
        Option(f"{prefix}{field.name}", _values(field, hints[field.name]), _default(field), help_of(field))
        for field in inside
    ]


def options_text() -> str:
    """Format all options of a recipe for a terminal."""
    return as_text([option for section in SECTIONS for option in list_options(section)])


def as_text(options: Sequence[Option]) -> str:
    """Format options for a terminal."""
    lines = []
    for option in options:
        lines.append(f"  {option.key} ({option.default})")
        lines.extend(textwrap.wrap(option.help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def options_table(section: str) -> str:
    """Format a section's options as a Markdown table."""
    return as_table(list_options(section))


def as_table(options: Sequence[Option]) -> str:
    """Format options as a Markdown table."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for option in options:
        cells = (f"`{option.key}`", option.values, f"`{option.default}`", option.help)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def update_tables(text: str) -> str:
    """Return a Markdown text with the table after each ``<!-- options: SECTION -->`` updated."""
    return _TABLE.sub(lambda match: f"{match[1]} -->\n{options_table(match[1].replace('top', ''))}\n", text)


def _values(field: Field[Any], hint: Any) -> str:
    choices = field.metadata.get("choices")
    return describe(Literal[tuple(choices)] if choices else hint)


def _default(field: Field[Any]) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "must be given"
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return json.dumps(value)


def help_of(field: Field[Any]) -> str:
    """Return the help of a key, which for some of ``data`` is in the class of the stages; empty if it has none."""
    same = (stage for stage in fields(section_class(STAGES[0])) if stage.name == field.name)
    found = next((one.metadata["help"] for one in (field, *same) if "help" in one.metadata), "")
    return " ".join(found.split())


def rewrite(paths: Sequence[str], update: Callable[[str], str]) -> None:
    """Update the text of each file."""
    for path in map(Path, paths):
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    rewrite(sys.argv[1:], update_tables)
