"""Files that a run resumes from, and the lock on their folder."""

from __future__ import annotations

import errno
import hashlib
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
from rim_peft.tuner.files import check_folder_path

MANIFEST = ".manifest.json"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_WORDS_OF_NO_ROOM = re.compile(
    # Writers that are not Python's give no error number: safetensors and tokenizers, then torch.
    r"os error (28|122|27)\b|code: (28|122|27)\b|No space left|quota exceeded|File too large"
    r"|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos",
    re.IGNORECASE | re.DOTALL,
)


class WriteError(OSError):
    """A file could not be written; says which, why, and what to do."""


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` write a file beside ``path`` and put it there, so that a kill leaves the old or the new one.

    What a kill leaves beside it is overwritten the next time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())  # or the new name could survive a power cut, and what it names not
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file at once."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    replace_file(path, write)


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Note names, sizes and hashes of a folder's files; the last thing that is written there.

    Args:
        folder: whose files are complete.
        names: the files to note; if not given, all of them but cards and hidden ones, folders within included.
    """
    if names is None:
        paths = (path for path in folder.rglob("*") if path.is_file())
        noted = (path for path in paths if path.suffix != ".md" and not path.name.startswith("."))
        names = sorted(path.relative_to(folder).as_posix() for path in noted)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": _hash(folder / name)} for name in names}
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a base and its tokenizer, with a manifest, to a new folder, which appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_manifest(partial)
    partial.rename(folder)


def find_damage(folder: Path, names: Iterable[str]) -> str | None:
    """Return which file of a folder is not as it was written, and in what way; None if all are.

    Args:
        folder: a folder with or without a manifest.
        names: files that must be there; readable, where there is no manifest, as in a folder of an earlier version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return next((damage for name in names if (damage := _find_unreadable(folder / name))), None)
    try:
        files: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["files"]
        if missing := [name for name in names if name not in files]:
            return f"{MANIFEST} does not name {missing[0]}"
        for name, kept in files.items():
            found = folder / name
            if not found.is_file():
                return f"{name} is missing"
            if found.stat().st_size != kept["size"]:
                return f"{name} has {found.stat().st_size} bytes, and was written with {kept['size']}"
            if _hash(found) != kept["sha256"]:
                return f"{name} has other contents than were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Say of an error that a disk is full, or that a folder cannot be written, and what to do.

    Args:
        folder: output folder of the run.

    Raises:
        WriteError: in place of whatever a library has made of it.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if (explained := _explain(error, folder)) is None:
            raise
        raise WriteError(explained) from error


def _explain(error: BaseException, folder: Path) -> str | None:
    """Return what an error says of a disk, None if it is about something else."""
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
                f"output_dir: no room to write in {place} ({_free(place)}): the disk is full{limit}. What was written "
                f"before is kept: make room, and resume=true goes on with the run in {folder}."
            )
        if number in _NOT_WRITABLE and place.resolve().is_relative_to(folder.resolve()):
            return f"output_dir: {place} cannot be written ({os.strerror(number or 0)}). Give a folder that can."
    return None


def _free(place: Path) -> str:
    for folder in (place, *place.absolute().parents):
        if folder.is_dir():
            return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free"
    return "gone"


def _find_unreadable(path: Path) -> str | None:
    """Return what keeps a file from being read as what its name says it is, None if nothing does."""
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
    except Exception as error:  # of whichever library reads it, each of which has its own
        return f"{path.name} cannot be read ({type(error).__name__})"
    return None


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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
