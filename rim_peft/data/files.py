"""Where rows come from: local JSON, JSONL, Parquet and text files, folders of them, and the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.io.parquet import ParquetDatasetReader

from rim_peft.data.caching import source_hash
from rim_peft.data.hub import asking_hub
from rim_peft.data.lines import Rows as Lines

Rows: TypeAlias = Dataset | IterableDataset

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Each split's names in files and on the Hub."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


_NO_NAMES: Mapping[str, str] = {}


def find_splits(
    path: str,
    *,
    prefix: str = "",
    streaming: bool = False,
    names: Mapping[str, str] = _NO_NAMES,
    lines_per_row: int = 1,
) -> dict[str, Callable[[], Rows]]:
    """Find the splits of a source; each is opened by a call.

    Rows of JSON files come as a column ``json`` with a row's text, so that a row that breaks the others' form is still
    only one bad row; rows of text files as a column ``text`` with a line, or with several, which a newline joins; each
    with its place, and with what is wrong where it could not be read (:mod:`rim_peft.data.lines`). The others have
    their own columns.

    Args:
        path: a file, a folder with files named after splits, or a Hub id as ``owner/name`` or ``owner/name:config``.
        prefix: word that may stand before the split in file names, as in ``prosqa_train.json``.
        streaming: read rows when they are asked for.
        names: what a file's or the Hub's split is called here, where it is not :func:`split_name`'s name for it; by
            its own name or by that one.
        lines_per_row: how many lines of a text file make a row, empty ones included.

    Returns:
        What opens a split, by its name: ``train``, ``validation``, ``test``, or the name that the source uses. A file
        that is not named after a split counts as ``train``. Capitals in file names do not matter.

    Raises:
        FileNotFoundError: nothing is there; says what was looked for and what there is.
        ValueError: a file cannot be read as what its suffix says.
        ConnectionError: the Hub cannot be reached.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        found = _folder_files(local, prefix, names)
        return {split: partial(_open, files, streaming, lines_per_row) for split, files in found.items()}
    if local.is_file():
        _check_suffix(local)
        split = _split_of(local, prefix, names) or names.get("train", "train")
        return {split: partial(_open, [local], streaming, lines_per_row)}
    hub = _HUB_ID.fullmatch(path)
    if hub is None or path.startswith(".") or local.suffix in SUFFIXES:
        raise FileNotFoundError(_absent(local))
    found_there = _open_hub(path, hub["id"], hub["config"], streaming)
    return {_own_name(name, names): partial(_same, rows) for name, rows in found_there.items()}


def split_name(name: str) -> str:
    """Return a split's own name for any of its names.

    >>> split_name("dev"), split_name("train_socratic")
    ('validation', 'train_socratic')
    """
    return next((split for split, names in SPLIT_NAMES.items() if name in names), name)


def _own_name(name: str, names: Mapping[str, str]) -> str:
    usual = split_name(name)
    return names.get(name, names.get(usual, usual))


def _split_of(file: Path, prefix: str, names: Mapping[str, str]) -> str | None:
    """Return the split that a file is named after, as ``prosqa_valid.json`` or ``test-00000-of-00001.parquet``."""
    stem = _SHARD.sub("", file.stem).lower().removeprefix(f"{prefix.lower()}_")
    return _own_name(stem, names) if split_name(stem) in SPLIT_NAMES else None


def _folder_files(folder: Path, prefix: str, names: Mapping[str, str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        split = _split_of(file, prefix, names)
        if split and file.is_file() and file.suffix in SUFFIXES:
            found.setdefault(split, []).append(file)
    if not found:
        raise FileNotFoundError(
            f"path: the folder {folder} must hold files named after splits, such as train.jsonl, valid.json or "
            f"test.parquet. It holds {_listing(folder)}. Rename a file, or give its path."
        )
    for split, files in found.items():
        if len(files) > 1 and not all(_SHARD.search(file.stem) for file in files):
            listed = ", ".join(file.name for file in files)
            raise ValueError(f"path: {folder} holds several files for the split {split!r}: {listed}. Keep one of them.")
    return found


def _check_suffix(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise ValueError(f"path: must end in one of {', '.join(SUFFIXES)}, got {file}. Rename or convert the file.")


def _absent(path: Path) -> str:
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    return (
        f"path: no file or folder {path}. The folder {folder} holds {_listing(folder)}. Give a file, a folder with "
        "files named after splits (train.jsonl, valid.json, test.parquet), or a Hub id as owner/name."
    )


def _listing(folder: Path, most: int = 12) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if not entry.name.startswith("."))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"


def _open(files: Sequence[Path], streaming: bool, lines_per_row: int) -> Rows:
    """Open files of one kind as one split, by the readers behind ``load_dataset``, which itself would call the Hub."""
    paths = [str(file.absolute()) for file in files]
    names = ", ".join(str(file) for file in files)
    suffix = files[0].suffix
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"path: {names} must hold rows, got an empty file.")
    try:
        if suffix == ".parquet":
            return ParquetDatasetReader(paths, streaming=streaming).read()
        read = Lines(
            data_files={"train": paths},
            hash=source_hash(Lines.__module__),
            suffix=suffix,
            lines_per_row=lines_per_row,
        )
        if streaming:
            return read.as_streaming_dataset(split="train")
        read.download_and_prepare()
        return read.as_dataset(split="train")
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"path: {names} cannot be read as {suffix[1:]}: {error.__cause__ or error}.") from error


def _open_hub(path: str, hub_id: str, config: str | None, streaming: bool) -> Mapping[str, Rows]:
    try:
        with asking_hub(hub_id):
            splits = load_dataset(hub_id, config, streaming=streaming)
    except (OSError, ValueError, DatasetGenerationError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else FileNotFoundError
        raise kind(
            f"path: {path} is no local file or folder, and cannot be read from the Hub: {error}. Give a local folder "
            "with files named after splits (train.jsonl, valid.json, test.parquet), or a Hub id as owner/name or "
            "owner/name:config."
        ) from error
    return {str(name): rows for name, rows in splits.items()}


def _same(rows: Rows) -> Rows:
    return rows
