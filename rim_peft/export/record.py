"""The record and the model card of an export."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_peft.escaping import json_text
from rim_peft.export.tokens import MemoryTokens
from rim_peft.training.files import write_text
from rim_peft.tuner.files import check_digests, read_object
from rim_peft.values import shown
from rim_peft.version import __version__

EXPORT_FILE = "rim_export.json"
FORMAT_VERSION = 1
_AGAIN = "Copy the export again, or export the adapter again."

_CHECKSUM = "sha256"
"""Key of the checksum over all other keys; records of older versions have none."""


@dataclass(frozen=True)
class ExportRecord:
    """The content of a merged export's ``rim_export.json``.

    Attributes:
        memory: the memory tokens.
        places: what the tokenizer appends blocks to.
        source: name of the adapter.
        base: the base, as the adapter names it.
        dequantized_from: how the base was quantised in training; None if it was not.
        dtype: type of the weights.
        head_is_tied: whether memory rows are scored, so that only generation settings suppress them.
    """

    memory: MemoryTokens
    places: dict[str, bool]
    source: str
    base: str | None
    dequantized_from: str | None
    dtype: str
    head_is_tied: bool

    def write(self, folder: Path, **more: Any) -> None:
        """Write the file, with additional keys such as the result of the check."""
        memory = {"memory": self.memory.to_dict(), "block_text": self.memory.block_text}
        write_json(folder / EXPORT_FILE, {**new_record("merged"), **vars(self), **memory, **more})


def new_record(form: str) -> dict[str, Any]:
    """Return the keys that every record starts with."""
    return {"format": form, "format_version": FORMAT_VERSION, "rim_peft": __version__}


def read_record(folder: Path) -> ExportRecord:
    """Read a merged export's ``rim_export.json``.

    Raises:
        ValueError: the folder is an export of another format, or from a later version of this package.
    """
    path = folder / EXPORT_FILE
    record = read_export(path)
    if record["format"] != "merged":
        raise ValueError(
            f"{path}: format: must be 'merged' for an export that this package can load, got "
            f"{shown(record.get('format'))}. Load the adapter that it was made from."
        )
    if "check" not in record:  # which earlier versions added last
        raise ValueError(f"{path}: must be of a finished export, and is not. Export the adapter again.")
    check_digests(path, record.get("files"))
    names = [name for name in ExportRecord.__dataclass_fields__ if name != "memory"]
    try:
        return ExportRecord(memory=MemoryTokens(**record["memory"]), **{name: record[name] for name in names})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: must be the record of an export, but keys are missing or unexpected ({error}). {_AGAIN}"
        ) from error


def read_export(path: Path) -> dict[str, Any]:
    """Read a record of either format.

    Raises:
        ValueError: it is damaged, or a later version of this package wrote it.
    """
    record = read_object(path, keys=("format", "format_version"), remedy=_AGAIN)
    version = record["format_version"]
    if not isinstance(version, int):
        raise ValueError(f"{path}: format_version: must be an integer, got {shown(version)}. {_AGAIN}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: must have format version {FORMAT_VERSION} or lower, got {version}: a later "
            "rim-peft wrote it. Update rim-peft."
        )
    if record.get(_CHECKSUM, _checksum(record)) != _checksum(record):
        raise ValueError(f"{path}: must be unchanged, but its checksum does not match. {_AGAIN}")
    return record


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its checksum, atomically."""
    write_text(path, json_text({**record, _CHECKSUM: _checksum(record)}, indent=2) + "\n")


def _checksum(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a record's content."""
    said = {name: value for name, value in record.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
