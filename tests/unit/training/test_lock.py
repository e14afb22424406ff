"""One process at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest

from rim_peft.training import files as lock
from rim_peft.training.files import HOLDER, InUseError, find_holder, hold
from tests.conftest import held_by_a_child


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.1)


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    assert find_holder(tmp_path) is None
    with held_by_a_child(tmp_path) as child:
        assert str(find_holder(tmp_path)).startswith(f"process {child} on ")
        said = rf"output_dir: .* is in use by process {child} on .*, since .*delete"
        with pytest.raises(InUseError, match=said), hold(tmp_path):
            pass
    # It was killed, and what it left there is no one's.
    assert (tmp_path / HOLDER).exists()
    assert find_holder(tmp_path) is None
    with hold(tmp_path):
        assert str(find_holder_elsewhere(tmp_path)).startswith(f"process {os.getpid()} on ")
    assert find_holder(tmp_path) is None
    assert not (tmp_path / HOLDER).exists()


def find_holder_elsewhere(folder: Path) -> str:
    """As another thread sees it, which is no holder."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(find_holder(folder)))
    thread.start()
    thread.join()
    return str(found[0])


def test_who_holds_it_may_enter_again(tmp_path: Path) -> None:
    with hold(tmp_path):
        with hold(tmp_path):
            pass
        assert find_holder_elsewhere(tmp_path) != "None"
    assert find_holder(tmp_path) is None


def test_children_do_not_keep_it(tmp_path: Path) -> None:
    """A data loader's process may live a little longer than the one that was killed."""
    with hold(tmp_path):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with hold(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ValueError, match=r"output_dir: must be a folder, .*file is a file"), hold(path):
        pass
    with hold(tmp_path / "new" / "folder"):
        pass
    assert (tmp_path / "new" / "folder").is_dir()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path), hold(tmp_path):
        assert find_holder(tmp_path) is None
    assert f"{tmp_path}: its file system has no locks" in caplog.text
    monkeypatch.undo()
    with hold(tmp_path):
        assert find_holder_elsewhere(tmp_path) != "None"
