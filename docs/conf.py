"""Sphinx's configuration. ``make docs`` builds the site; every warning is an error."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from api_names import find, listed, places  # noqa: E402

from rim_peft.version import __version__  # noqa: E402

project = "rim-peft"
author = "the rim-peft developers"
project_copyright = author
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"rim-peft {release}"
html_copy_source = False
highlight_language = "none"  # blocks without a language are drawings and output
smartquotes_action = "D"  # dashes alone: quotes are those of code
toc_object_entries_show_parents = "hide"
myst_heading_anchors = 4  # links to headings, as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_inherit_docstrings = False  # overridden methods of TRL and PEFT are documented there
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in a class docstring are not repeated as members

LONGEST_SIGNATURE = 300
"""Characters of a signature that is shown; configs inherit over a hundred options from TRL, or dozens from PEFT."""

LOADED = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']+|url\(["']?(?:https?:)?//[^)]+"""
)
"""What a browser fetches from another host when it shows a page."""

UNNAMED = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="Site">',
    '<aside class="toc-drawer">': '<aside class="toc-drawer" aria-label="On this page">',
    "<pre>": '<pre tabindex="0">',  # it may scroll, which a keyboard must reach
    '<div class="table-wrapper ': '<div tabindex="0" class="table-wrapper ',
    '<th class="head"><p></p></th>': '<td class="head"></td>',  # a heading of nothing
}
"""What Sphinx and Furo leave unnamed for those who listen to a page or have no mouse."""


def setup(app: Any) -> None:
    """Connect what is done beyond the configuration."""
    app.connect("source-read", add_docstrings)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", keep_sentence, priority=400)  # before Napoleon
    app.connect("autodoc-process-docstring", add_options)
    app.connect("build-finished", name_parts)
    app.connect("build-finished", refuse_other_hosts)


def add_docstrings(app: Any, page: str, source: list[str]) -> None:
    """Add, below each table of ``api.md``, the docstrings of the names in it: that page alone says what is public."""
    if page != "api":
        return
    names: dict[str, list[str]] = {}
    for heading, name in listed(source[0]):
        names.setdefault(heading, []).append(directive(heading, name))
    sections = re.split(r"^(?=## )", source[0], flags=re.MULTILINE)
    for number, section in enumerate(sections):
        heading = section.partition("\n")[0].removeprefix("## ")
        if heading in names:
            sections[number] = f"{section.rstrip()}\n\n```{{eval-rst}}\n{''.join(names[heading])}```\n\n"
    source[0] = "".join(sections)


def directive(heading: str, name: str) -> str:
    """Return the directive that shows a public name's docstring.

    Raises:
        ValueError: there is nothing of this name.
    """
    for full_name in places(heading, name):
        found = find(full_name)
        if found is None or inspect.ismodule(found[1]):  # a function may be named like a package
            continue
        if inspect.isclass(found[1]):
            return f".. autoclass:: {full_name}\n   :members:\n   :show-inheritance:\n\n"
        return f".. autofunction:: {full_name}\n\n" if callable(found[1]) else ""
    raise ValueError(
        f"docs/api.md: {name} must be in a module that its heading names, got {heading}. Correct the table."
    )


def shorten_signature(
    app: Any, kind: str, name: str, found: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """Replace a long signature, which would be a page of inherited options."""
    return ("(...)", returned) if signature is not None and len(signature) > LONGEST_SIGNATURE else None


def keep_sentence(app: Any, kind: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Keep a property's sentence whole: Napoleon takes what is before a colon for a type."""
    if kind in ("property", "attribute") and lines:
        lines[0] = lines[0].replace(": ", " – ")


def add_options(app: Any, kind: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Add a config's own options to its docstring, with the help that recipes and the command line show."""
    config: Any = found
    if kind != "class" or not is_dataclass(found):
        return
    classes = [parent for parent in inspect.getmro(config) if parent.__module__.startswith("rim_peft.")]
    own = {option for parent in classes for option in vars(parent).get("__annotations__", ())}
    for field in fields(config):
        if field.name in own and "help" in field.metadata:
            text = re.sub(r"([\\*`|_])", r"\\\1", field.metadata["help"])
            default = getattr(field.default, "value", field.default)  # of an enumeration: as recipes write it
            shown = "" if default is MISSING else f" (default ``{default!r}``)"
            lines.append(f":param {field.name}: {text}{shown}")
    lines.append("")


def name_parts(app: Any, error: Exception | None) -> None:
    """Name the parts that the theme leaves unnamed, in every page."""
    for path in sorted(Path(app.outdir).rglob("*.html")) if error is None else ():
        text = path.read_text(encoding="utf-8")
        named = re.sub("|".join(map(re.escape, UNNAMED)), lambda found: UNNAMED[found[0]], text)
        if named != text:
            path.write_text(named, encoding="utf-8")


def refuse_other_hosts(app: Any, error: Exception | None) -> None:
    """Check that no page loads anything from another host.

    Raises:
        ValueError: a page or style sheet does; the message names the file and the address.
    """
    if error is not None:
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css") and (loaded := LOADED.search(path.read_text(encoding="utf-8"))):
            raise ValueError(f"{path}: must load nothing from other hosts, got {loaded[0]}. Remove or copy it.")
