"""Files that a run resumes from, and the lock on their folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from rim_peft.training.distributed import on_main
from rim_peft.tuner.files import check_folder_path, file_hash

MANIFEST = ".manifest.json"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_WORDS_OF_NO_ROOM = re.compile(
    # Native writers give no error number: safetensors and tokenizers, then torch.
    r"os error (28|122|27)\b|code: (28|122|27)\b|No space left|quota exceeded|File too large"
    r"|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos",
    re.IGNORECASE | re.DOTALL,
)


class WriteError(OSError):
    """A file could not be written; the message says which, why, and what to do."""


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` write a temporary file, then rename it to ``path``, so that a kill leaves the old or the new one.

    The next call overwrites a temporary file that a kill left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())  # otherwise the new name could survive a power cut without its contents
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    replace_file(path, write)


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write a manifest with names, sizes and hashes of a folder's files; must be the last write there.

    Args:
        folder: a folder whose files are complete.
        names: the files to list; by default all files, subfolders included, except cards and hidden files.
    """
    if names is None:
        paths = (path for path in folder.rglob("*") if path.is_file())
        noted = (path for path in paths if path.suffix != ".md" and not path.name.startswith("."))
        names = sorted(path.relative_to(folder).as_posix() for path in noted)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in names}
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a base and its tokenizer, with a manifest, to a new folder, which appears only once complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_manifest(partial)
    partial.rename(folder)


def find_damage(folder: Path, names: Iterable[str]) -> str | None:
    """Return which file of a folder is damaged, and how; None if all are intact.

    Args:
        folder: a folder with or without a manifest.
        names: files that must exist; without a manifest (a folder from an earlier version) they must be readable.
    """
    path = folder / MANIFEST
    if not path.exists():
        return next((damage for name in names if (damage := _find_unreadable(folder / name))), None)
    try:
        files: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["files"]
        if missing := [name for name in names if name not in files]:
            return f"{MANIFEST} does not list {missing[0]}"
        for name, kept in files.items():
            found = folder / name
            if not found.is_file():
                return f"{name} is missing"
            if found.stat().st_size != kept["size"]:
                return f"{name} has {found.stat().st_size} bytes, but was written with {kept['size']}"
            if file_hash(found) != kept["sha256"]:
                return f"{name} does not have the contents it was written with"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


@contextmanager
def explain_write_errors(folder: Path, *, resume: str = "resume=true") -> Iterator[None]:
    """Replace errors caused by a full disk or an unwritable folder with one that says what to do.

    Args:
        folder: output folder of the run.
        resume: how the run is resumed.

    Raises:
        WriteError: instead of the library's own error.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if (explained := _explain(error, folder, resume)) is None:
            raise
        raise WriteError(explained) from error


def _explain(error: BaseException, folder: Path, resume: str) -> str | None:
    """Return the message for a write error, None if the error is about something else."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in causes:
        number = cause.errno if isinstance(cause, OSError) else None
        named = cause.filename if isinstance(cause, OSError) else None
        place = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else folder
        if number in _NO_ROOM or _WORDS_OF_NO_ROOM.search(str(cause)):
            limit = " or over a limit" if number != errno.ENOSPC else ""
            return (
                f"output_dir: no room to write in {place} ({_free(place)}): the disk is full{limit}. Earlier files are "
                f"kept: make room, and resume the run in {folder} with {resume}."
            )
        if number in _NOT_WRITABLE and place.resolve().is_relative_to(folder.resolve()):
            return f"output_dir: {place} cannot be written ({os.strerror(number or 0)}). Give a writable folder."
    return None


def _free(place: Path) -> str:
    for folder in (place, *place.absolute().parents):
        if folder.is_dir():
            return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    return "gone"


def _find_unreadable(path: Path) -> str | None:
    """Return why a file cannot be read as the type its name implies, None if it can."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each of the libraries raises its own
        return f"{path.name} cannot be read ({type(error).__name__})"
    return None


logger = logging.getLogger(__name__)

LOCK, HOLDER = ".lock", ".holder.json"
"""The kernel releases the lock when its process ends in any way; the file beside it names the holder."""

_WAIT_SECONDS = 1.0  # in case `find_holder` has the lock for a moment
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # for example NFS without its lock service


class InUseError(OSError):
    """Another process uses the folder."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a folder, created if missing, for the duration of the context.

    With several processes in one training every process must enter, and the main one holds the lock. The holder may
    enter again. On a file system without locks nobody is kept out, and a warning is logged.

    Raises:
        InUseError: another process, or another thread of this one, holds it.
        WriteError: the folder cannot be created or written.
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
    """Return which process uses a folder, such as ``process 12 on HOST, since 2026-01-31 12:00:00``.

    None if none does, or if the folder is not writable, so that there is no way to know.
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
    """Check that no other process uses a folder, as far as :func:`find_holder` can tell.

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
            logger.warning("%s: its file system has no locks. Make sure that no other process uses it.", folder)
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
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock but has not written its name yet
        return "another process"
