"""One process at a time works in a folder; others are told which one does."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rim_peft.training.files import explain_write_errors, write_text
from rim_peft.training.processes import on_main
from rim_peft.tuner.files import check_folder_path

logger = logging.getLogger(__name__)

LOCK, HOLDER = ".lock", ".holder.json"
"""The kernel lets go of the lock when its process ends, however it ends; who holds it stands in a file beside it."""

_WAIT_SECONDS = 1.0  # for one who only looks
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # as of NFS without its lock service


class InUseError(OSError):
    """Another process works in the folder."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there, for as long as the context lasts.

    Of several processes of one training the main one holds it, and every one must enter. Who holds it already may
    enter again. Where the file system has no locks, nobody is kept out, and the log says so.

    Raises:
        InUseError: another process, or another thread of this one, holds it.
        WriteError: it cannot be made or written.
    """
    held: list[FileLock | None] = []
    on_main(lambda: held.append(_acquire(folder)))
    try:
        yield
    finally:
        for lock in filter(None, held):
            if lock.lock_counter == 1:
                (folder / HOLDER).unlink(missing_ok=True)
            lock.release()


def find_holder(folder: Path) -> str | None:
    """Return which process works in a folder, such as ``process 12 on HOST, since 2026-01-31 12:00:00``.

    None if none does, or if that cannot be found out because the folder cannot be written.
    """
    if not (folder / LOCK).exists():
        return None
    try:
        with _lock(folder).acquire(timeout=0):
            return None
    except Timeout:
        return _describe_holder(folder)
    except OSError:
        return None


def check_free(folder: Path) -> None:
    """Check that no other process works in a folder, as far as that can be found out.

    Raises:
        InUseError: one does.
    """
    if (holder := find_holder(folder)) is not None:
        raise _in_use(folder, holder)


def _in_use(folder: Path, holder: str) -> InUseError:
    return InUseError(
        f"output_dir: {folder} is in use by {holder}. Wait for it, or give another folder. If no such process is left, "
        f"delete {folder / LOCK}."
    )


def _acquire(folder: Path) -> FileLock | None:
    check_folder_path("output_dir", folder)
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            lock.acquire(timeout=_WAIT_SECONDS, poll_interval=0.1)
        except Timeout:
            raise _in_use(folder, _describe_holder(folder)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s: its file system has no locks. Let no other process work in it.", folder)
            return None
        if lock.lock_counter == 1:
            own = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            write_text(folder / HOLDER, json.dumps(own) + "\n")
    return lock


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.resolve() / LOCK, is_singleton=True)


def _describe_holder(folder: Path) -> str:
    try:
        kept = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {int(kept['pid'])} on {kept['host']}, since {kept['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and has not said who it is yet
        return "another process"
