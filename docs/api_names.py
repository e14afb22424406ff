"""The public names in the tables of ``api.md``: the site adds their docstrings, and a test checks that they exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any


def listed(text: str) -> Iterator[tuple[str, str]]:
    """Yield each name in the tables of ``api.md``, after the heading that it is under.

    Args:
        text: the page.
    """
    heading, header = "", ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| `"):
            header = line
        elif line.startswith("| `") and header.startswith("| name"):
            before = ""
            for name in re.findall(r"`([A-Za-z_.]+)`", line.split("|")[1]):
                before, _, last = name.rpartition(".") if "." in name else (before, "", name)
                yield heading, f"{before}.{last}".lstrip(".")


def places(heading: str, name: str) -> list[str]:
    """Return where a name may be: in the package, or in the modules that its heading names."""
    return [f"{place}.{name}" for place in ("rim_peft", *re.findall(r"`(rim_peft[a-z_.]*)`", heading))]


def find(full_name: str) -> tuple[str, Any] | None:
    """Return an object and the module that it is found in, or None.

    Args:
        full_name: the module's name and the object's, such as ``rim_peft.tasks.get_task``.
    """
    parts = full_name.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        try:
            found: Any = import_module(module)
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return None
            found = getattr(found, part)
        return module, found
    return None
