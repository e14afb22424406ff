"""Rows in local files and folders: which files make a split, and how each kind of file is opened."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, DatasetBuilder, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.io.parquet import ParquetDatasetReader
from datasets.packaged_modules.arrow.arrow import Arrow

from rim_peft.data.hashes import source_hash
from rim_peft.data.lines import COMPRESSIONS
from rim_peft.data.lines import Rows as Lines
from rim_peft.values import some_of

Rows: TypeAlias = Dataset | IterableDataset

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""Names that each split has in files and on the Hub."""

LINE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
"""Kinds of files that may also be compressed."""

SUFFIXES = (*LINE_SUFFIXES, ".parquet", ".arrow")

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?$")
_LFS_POINTER = b"version https://git-lfs"


def local_splits(
    path: Path, *, prefix: str, streaming: bool, names: Mapping[str, str], lines_per_row: int
) -> dict[str, Callable[[], Rows]]:
    """Find the splits of a file or folder; the arguments are those of :func:`rim_peft.data.sources.find_splits`."""
    if (path / "dataset_dict.json").is_file():
        return {own_name(part.name, names): partial(_open_saved, part, streaming) for part in _saved_parts(path)}
    is_saved = (path / "state.json").is_file()
    if path.is_dir() and not is_saved:
        files = _folder_files(path, prefix, names)
        return {split: partial(_open, paths, streaming, lines_per_row) for split, paths in files.items()}
    if not is_saved and kind_of(path) is None:
        listed = f"{', '.join(SUFFIXES)} (the first {len(LINE_SUFFIXES)} also with .gz or .zst)"
        raise ValueError(f"path: must end in one of {listed}, got {path}. Rename or convert the file.")
    split = _split_of(path, prefix, names) or names.get("train", "train")
    if is_saved:
        return {split: partial(_open_saved, path, streaming)}
    return {split: partial(_open, [path], streaming, lines_per_row)}


def split_name(name: str) -> str:
    """Return the standard name of a split, or the name itself if it is unknown.

    >>> split_name("dev"), split_name("train_socratic")
    ('validation', 'train_socratic')
    """
    return next((split for split, names in SPLIT_NAMES.items() if name in names), name)


def own_name(name: str, names: Mapping[str, str]) -> str:
    """Return a split's name under a source's own ``names``, else its standard name."""
    usual = split_name(name)
    return names.get(name, names.get(usual, usual))


def kind_of(path: Path) -> str | None:
    """Return the suffix that says how a file is read, without that of its compression; None if it cannot be read.

    >>> kind_of(Path("train.csv.gz")), kind_of(Path("train.parquet")), kind_of(Path("train.parquet.gz"))
    ('.csv', '.parquet', None)
    """
    if path.suffix in COMPRESSIONS:
        return suffix if (suffix := Path(path.stem).suffix) in LINE_SUFFIXES else None
    return path.suffix if path.suffix in SUFFIXES else None


def _split_of(path: Path, prefix: str, names: Mapping[str, str]) -> str | None:
    """Return the split that a file is named after, as in ``prosqa_valid.json`` or ``test-00000-of-00001.parquet``."""
    stem = _SHARD.sub("", _stem(path)).lower().removeprefix(f"{prefix.lower()}_")
    return own_name(stem, names) if split_name(stem) in SPLIT_NAMES else None


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix in COMPRESSIONS else path.stem


def _folder_files(folder: Path, prefix: str, names: Mapping[str, str]) -> dict[str, list[Path]]:
    """Return a folder's files by split; a clone of a Hub repository has them in its folder ``data``."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.iterdir()) if place.is_dir() and not found else ():
            split = _split_of(file, prefix, names)
            if split and file.is_file() and kind_of(file) is not None:
                found.setdefault(split, []).append(file)
    if not found:
        raise FileNotFoundError(
            f"path: the folder {folder} must hold files named after splits, such as train.jsonl, valid.json or "
            f"test.parquet. It holds {_listing(folder)}. Rename a file, or give its path."
        )
    for split, files in found.items():
        are_shards = all(_SHARD.search(_stem(file)) for file in files) and len({kind_of(file) for file in files}) == 1
        if len(files) > 1 and not are_shards:
            listed = ", ".join(file.name for file in files)
            raise ValueError(f"path: {folder} holds several files for the split {split!r}: {listed}. Keep one of them.")
    return found


def absent(path: Path) -> str:
    """Return the error for a path that does not exist."""
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    return (
        f"path: no file or folder {path}. The folder {folder} holds {_listing(folder)}. Give a file, a folder with "
        "files named after splits (train.jsonl, valid.json, test.parquet), or a Hub id as owner/name."
    )


def _listing(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if not entry.name.startswith("."))
    return some_of(names, 12) or "nothing"


def _saved_parts(folder: Path) -> list[Path]:
    """Return the folder of each split of a ``DatasetDict`` that ``save_to_disk`` wrote."""
    return [entry for entry in sorted(folder.iterdir()) if (entry / "state.json").is_file()]


def _open_saved(folder: Path, streaming: bool) -> Rows:
    try:
        rows = Dataset.load_from_disk(str(folder)).with_format(None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path: {folder} cannot be read as written by save_to_disk: {error}.") from error
    return rows.to_iterable_dataset() if streaming else rows


def _open(files: Sequence[Path], streaming: bool, lines_per_row: int) -> Rows:
    """Open files of one kind as one split, with the readers behind ``load_dataset``, which would contact the Hub."""
    # The readers take a path as a pattern: that of `rows[1].jsonl` would find `rows1.jsonl`.
    paths = [glob.escape(str(file.absolute())) for file in files]
    names = ", ".join(str(file) for file in files)
    suffix = str(kind_of(files[0]))
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"path: {names} must hold rows, got an empty file.")
    for file in files:
        _check_fetched(file)
    try:
        if suffix == ".parquet":
            return ParquetDatasetReader(paths, streaming=streaming).read()
        hash = source_hash(Lines.__module__)
        if suffix == ".arrow":
            return _build(Arrow(data_files={"train": paths}, hash=hash), streaming)
        lines = Lines(data_files={"train": paths}, hash=hash, suffix=suffix, lines_per_row=lines_per_row)
        return _build(lines, streaming)
    except (DatasetGenerationError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"path: {names} cannot be read as {suffix[1:]}: {error.__cause__ or error}.") from error


def _build(builder: DatasetBuilder, streaming: bool) -> Rows:
    if streaming:
        return builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    rows: Any = builder.as_dataset(split="train")
    return rows


def _check_fetched(file: Path) -> None:
    """Refuse the pointer that a clone without Git LFS has instead of a file."""
    with file.open("rb") as raw:
        if raw.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"path: {file} must hold rows, got a Git LFS pointer. Fetch the file: git lfs pull.")
