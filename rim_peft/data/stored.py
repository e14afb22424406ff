"""The folder of tokenised tables: what lies there, what is in use, and what goes when it is old or the folder large."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import datasets

try:
    import fcntl
except ImportError:  # no file can be seen to be in use then, and none is deleted
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

DAYS, GIGABYTES = "RIM_PEFT_CACHE_DAYS", "RIM_PEFT_CACHE_GB"
"""Environment variables: for how many days a table is kept unused, and how large the folder may get."""
_DEFAULTS = {DAYS: 30.0, GIGABYTES: 5.0}
_SECONDS_A_DAY = 24 * 60 * 60
_held: dict[Path, IO[bytes]] = {}
"""Files that this process uses, each open with a shared lock as long as it lives; the last ones where they are many."""
_MOST_HELD = 100


@dataclass(frozen=True)
class StoredTable:
    """A tokenised table: one file, or one for each process that wrote it.

    Attributes:
        files: its files.
        num_bytes: their size.
        used: when it was used last, in seconds since 1970.
    """

    files: tuple[Path, ...]
    num_bytes: int
    used: float


def cache_folder() -> Path:
    """Return where tables are kept: beside what ``datasets`` keeps."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "rim_peft"


def limits() -> tuple[float, float]:
    """Return for how many days a table is kept unused, and how many gigabytes are kept.

    Raises:
        ValueError: a variable of the environment is no number of at least 0.
    """
    found = []
    for name, usual in _DEFAULTS.items():
        text = os.environ.get(name, str(usual))
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not number >= 0:
            raise ValueError(f"{name}: must be a number of at least 0, got {text[:40]!r}. Leave it out for {usual:g}.")
        found.append(number)
    return found[0], found[1]


def list_tables() -> list[StoredTable]:
    """Return all tables, the one unused for the longest time first; files cut off by a kill are among them."""
    groups: dict[str, list[tuple[Path, os.stat_result]]] = {}
    for path in cache_folder().glob("*"):
        with contextlib.suppress(OSError):  # another process has deleted it
            groups.setdefault(path.stem.partition("_")[0], []).append((path, path.stat()))
    tables = [
        StoredTable(
            tuple(path for path, _ in group),
            sum(stat.st_size for _, stat in group),
            max(stat.st_mtime for _, stat in group),
        )
        for group in groups.values()
    ]
    return sorted(tables, key=lambda table: table.used)


def hold(files: Collection[Path]) -> None:
    """Note that a table is used now, and keep every process from deleting it until this one has ended."""
    for path in files:
        with contextlib.suppress(OSError):  # a folder that others own is read all the same
            os.utime(path)
            if fcntl is not None and path not in _held:
                file = path.open("rb")
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                _held[path] = file
        while len(_held) > _MOST_HELD:
            _held.pop(next(iter(_held))).close()


def prune() -> int:
    """Delete tables that were unused for too long, then the oldest ones while there is too much; return how many.

    A table in use stays, whichever process uses it.
    """
    days, gigabytes = limits()
    tables = list_tables()
    left = sum(table.num_bytes for table in tables)
    too_old = time.time() - days * _SECONDS_A_DAY
    deleted = 0
    for table in tables:
        if (table.used < too_old or left > gigabytes * 1e9) and _delete(table):
            left -= table.num_bytes
            deleted += 1
    if deleted:
        logger.info("%d tokenised tables were deleted from %s, unused for long or too many.", deleted, cache_folder())
    return deleted


def clear() -> tuple[int, int]:
    """Delete all tables that are not in use; return how many were deleted, and how many are left."""
    tables = list_tables()
    deleted = sum(_delete(table) for table in tables)
    return deleted, len(tables) - deleted


def _delete(table: StoredTable) -> bool:
    """Delete a table unless a process uses it."""
    with contextlib.ExitStack() as stack:
        if not all(stack.enter_context(_alone(path)) for path in table.files):
            return False
        for path in table.files:
            path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Yield whether no process uses a file, and keep others from beginning to."""
    if fcntl is None or path in _held:
        yield False
        return
    try:
        file = path.open("rb")
    except OSError:  # gone, or another user's
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_alone = True
        except OSError:
            is_alone = False
        yield is_alone
