"""A Space on the Hub that shows an adapter: three small files."""

from __future__ import annotations

import re

from huggingface_hub import CommitOperationAdd, HfApi

from rim_peft.recipe.syntax import write_yaml
from rim_peft.run.sharing import writing_to_hub
from rim_peft.tuner.card import CARD_FILE, TAGS
from rim_peft.values import shown
from rim_peft.version import __version__

GRADIO, PYTHON = "6.31.0", "3.12"
"""Versions that a Space installs: the Gradio that the page was tried with."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_APP = '''"""Shows the adapter {adapter}: chat, readouts of its memory blocks, swapped blocks."""

from rim_peft.app import launch

launch({arguments})
'''

_README = """---
{front_matter}---

# {title}

A page to play with [{adapter}](https://huggingface.co/{adapter}), an adapter that answers after memory blocks: one
forward pass instead of a written chain of thought. Made with `rim-peft push --space`.
"""


def space_files(adapter: str, *, revision: str | None = None, title: str = "") -> dict[str, bytes]:
    """Return the files of a Space by name: ``app.py``, ``requirements.txt`` and ``README.md`` with its metadata.

    Args:
        adapter: the adapter's id on the Hub.
        revision: branch, tag or commit of it; the newest one if None.
        title: of the Space; the adapter's name by default.

    Raises:
        ValueError: the id is not ``owner/name``.
    """
    check_id("adapter", adapter)
    title = title or adapter.partition("/")[2]
    # https://huggingface.co/docs/hub/spaces-config-reference
    metadata = {
        "title": title,
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": "app.py",
        "models": [adapter],
        "tags": list(TAGS),
    }
    arguments = repr(adapter) if revision is None else f"{adapter!r}, revision={revision!r}"
    return {
        "app.py": _APP.format(adapter=adapter, arguments=arguments).encode(),
        "requirements.txt": f"rim-peft[app]=={__version__}\n".encode(),
        CARD_FILE: _README.format(front_matter=write_yaml(metadata), title=title, adapter=adapter).encode(),
    }


def push_space(space: str, adapter: str, *, revision: str | None = None, private: bool | None = None) -> str:
    """Create a Space that shows an adapter, or replace its three files, and return the commit's URL.

    Args:
        space: the Space's id, ``owner/name``; created if missing.
        adapter: the adapter's id on the Hub.
        revision: branch, tag or commit of the adapter.
        private: whether a new Space is private.

    Raises:
        ValueError: an id is not ``owner/name``.
        PermissionError: the Hub does not let you write there.
    """
    check_id("space", space)
    files = space_files(adapter, revision=revision, title=space.partition("/")[2])
    api = HfApi()
    with writing_to_hub(space):
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        commit = api.create_commit(
            space,
            operations=[CommitOperationAdd(name, content) for name, content in sorted(files.items())],
            commit_message=f"Show {adapter}",
            repo_type="space",
        )
    return str(commit.commit_url)


def check_id(name: str, value: str) -> None:
    """Refuse an id on the Hub that does not name its owner.

    Raises:
        ValueError: it is not ``owner/name``.
    """
    if not _ID.fullmatch(value):
        raise ValueError(f"{name}: must be owner/name on the Hub, got {shown(value)}. Give both.")
