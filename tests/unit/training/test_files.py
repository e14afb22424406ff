"""Files that are whole or absent, folders that know what they hold, and what a full disk says."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rim_peft.training.files import (
    MANIFEST,
    WriteError,
    explain_write_errors,
    find_damage,
    replace_file,
    write_manifest,
    write_text,
)


def test_a_text_replaces_the_old_one_at_once(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        partial.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))

    write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-3"
    (folder / "inner").mkdir(parents=True)
    save_file({"a": torch.arange(100)}, folder / "inner" / "weights.safetensors")
    torch.save({"step": 3, "state": torch.arange(100)}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    (folder / "README.md").write_text("a card")
    return folder


NAMES = ("inner/weights.safetensors", "optimizer.pt", "trainer_state.json")


def _flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [(Path.unlink, "is missing"), (_cut, "bytes, but was written with"), (_flip, "does not have the contents")],
)
def test_a_manifest_tells_what_is_damaged(
    name: str, damage: Callable[[Path], None], said: str, checkpoint: Path
) -> None:
    write_manifest(checkpoint)
    assert find_damage(checkpoint, NAMES) is None
    damage(checkpoint / name)
    assert str(find_damage(checkpoint, NAMES)).startswith(f"{name} {said}" if "bytes" not in said else f"{name} has ")
    assert said in str(find_damage(checkpoint, NAMES))


def test_cards_may_be_edited(checkpoint: Path) -> None:
    write_manifest(checkpoint)
    (checkpoint / "README.md").unlink()
    assert find_damage(checkpoint, NAMES) is None


_WRONG = json.dumps({"files": dict.fromkeys(NAMES, 3)})


@pytest.mark.parametrize("text", ["", "[]", "null", '{"files": 3}', _WRONG, '{"fi'])
def test_a_damaged_manifest_is_damage(text: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(text)
    assert str(find_damage(checkpoint, NAMES)).startswith(f"{MANIFEST} cannot be read")


def test_a_manifest_names_what_must_be_there(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text('{"files": {}}')
    assert find_damage(checkpoint, NAMES) == f"{MANIFEST} does not list {NAMES[0]}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [Path.unlink, _cut, lambda path: path.write_bytes(b"")])
def test_without_a_manifest_files_must_be_readable(name: str, damage: Callable[[Path], None], checkpoint: Path) -> None:
    """As a checkpoint of an earlier version is, which had none."""
    assert find_damage(checkpoint, NAMES) is None
    damage(checkpoint / name)
    assert str(find_damage(checkpoint, NAMES)).startswith(Path(name).name)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/runs/a/optimizer.pt"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/a/optimizer.pt"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 448 vs 342"),
        RuntimeError("PytorchStreamWriter failed writing file data/2: file write failed"),
        Exception('Error while serializing: I/O error: IoError(Os { code: 28, kind: StorageFull, message: "..." })'),
        Exception("No space left on device (os error 28)"),  # of tokenizers
    ],
    ids=lambda error: str(error)[:30],
)
def test_a_full_disk_says_so_and_what_goes_on(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(WriteError, match=r"output_dir: no room to write in .*disk is full.*with resume=true") as full,
        explain_write_errors(tmp_path),
    ):
        raise error
    assert str(tmp_path) in str(full.value)
    assert "inline_container" not in str(full.value)


def test_a_file_over_the_limit_says_so(tmp_path: Path) -> None:
    """For real: of torch, of safetensors and of Python, in a child whose files may have 1,000 bytes."""
    for write in (
        lambda: torch.save(torch.arange(1000), tmp_path / "a.pt"),
        lambda: save_file({"a": torch.arange(1000)}, tmp_path / "a.safetensors"),
        lambda: write_text(tmp_path / "a", "a" * 2000),
    ):
        child = os.fork()
        if child == 0:
            code = 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            try:
                with explain_write_errors(tmp_path):
                    write()
            except WriteError as error:
                code = 0 if "no room to write" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    refused = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a"))
    said = r"output_dir: .*a cannot be written \(Permission denied\)"
    with pytest.raises(WriteError, match=said), explain_write_errors(tmp_path):
        raise refused


def test_other_errors_stay(tmp_path: Path) -> None:
    for error in (ValueError("out of range"), PermissionError(errno.EACCES, "Permission denied", "/data/rows.jsonl")):
        with pytest.raises(type(error)) as found, explain_write_errors(tmp_path):
            raise error
        assert found.value is error
