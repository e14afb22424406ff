"""The files that an unfinished folder of chains resumes from: its options, and every draft so far."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rim_peft.chains.teachers import Draft
from rim_peft.escaping import json_text
from rim_peft.training.files import write_text
from rim_peft.tuner.files import read_object
from rim_peft.values import shown

logger = logging.getLogger(__name__)

OPTIONS_FILE = "options.json"
DRAFTS_FILE = "drafts.jsonl"

Key = tuple[int, int]
"""A draft's row and try."""


def check_begun(folder: Path) -> dict[str, Any] | None:
    """Return the options that a folder was begun with, None for a new or empty one.

    Raises:
        ValueError: the folder holds something else, or its options are damaged.
    """
    path = folder / OPTIONS_FILE
    if path.is_file():
        return read_object(path, remedy="Give another folder.")
    others = (
        sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.is_dir() else []
    )
    if others:
        raise ValueError(
            f"output_dir: must be a new or empty folder, or one that rim-peft chains has begun, but {folder} holds "
            f"{others[0]}. Give another one."
        )
    return None


def begin(folder: Path, options: Mapping[str, Any]) -> None:
    """Note the options that a folder is begun with; once it has drafts, check that they are the same.

    Raises:
        ValueError: they differ; the message names each of them.
    """
    begun = check_begun(folder)
    now: dict[str, Any] = json.loads(json_text(dict(options)))
    drafts = folder / DRAFTS_FILE
    if begun is None or not drafts.exists() or drafts.stat().st_size == 0:
        write_text(folder / OPTIONS_FILE, json_text(now, indent=1) + "\n")
        return
    names = [name for name in {**begun, **now} if begun.get(name) != now.get(name)]
    if names:
        listed = "; ".join(f"{name} was {shown(begun.get(name))}, is {shown(now.get(name))}" for name in names)
        raise ValueError(
            f"output_dir: {folder} must be continued with the options it was begun with, but {listed}. Give the same "
            "options, or another folder."
        )


@dataclass(frozen=True)
class Noted:
    """A draft with the teacher's time for it, a batch's time divided by its drafts."""

    draft: Draft
    seconds: float


class Journal:
    """All drafts so far, each a line of a file that only grows.

    A line that a kill left incomplete is cut off; an unreadable one counts as not written. So such drafts are written
    again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.noted: dict[Key, Noted] = {}
        size, num_dropped = 0, 0
        with path.open("rb") if path.exists() else open(os.devnull, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    num_dropped += 1
                    break
                size += len(line)
                if (found := _read(line)) is None:
                    num_dropped += 1
                else:
                    self.noted.setdefault(*found)
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
        if num_dropped:
            logger.warning(
                "%s: %d incomplete or damaged lines were dropped; they are written again.", path, num_dropped
            )

    def append(self, drafts: Iterable[tuple[Key, Noted]]) -> None:
        """Write new drafts, and wait until they are on the disk."""
        new = {key: noted for key, noted in drafts if key not in self.noted}
        if not new:
            return
        with self._path.open("ab") as file:
            for (row, number), noted in new.items():
                fields = {"row": row, "try": number, **asdict(noted.draft), "seconds": round(noted.seconds, 4)}
                file.write(f"{json_text(fields)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.noted.update(new)


_TYPES: Mapping[str, Any] = {
    "row": int,
    "try": int,
    "text": str,
    "num_tokens": int,
    "num_prompt_tokens": int,
    "is_cut": bool,
    "problem": str | None,
    "seconds": int | float,
}


def _read(line: bytes) -> tuple[Key, Noted] | None:
    """Return a line's draft, None if it is damaged."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or set(found) != set(_TYPES):
        return None
    if not all(isinstance(found[name], kind) for name, kind in _TYPES.items()):
        return None
    draft = Draft(**{field.name: found[field.name] for field in fields(Draft)})
    return (found["row"], found["try"]), Noted(draft, float(found["seconds"]))
