"""Which tokenised tables stay: those in use always, others unless they are old or too many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset

from rim_peft.cli.main import main
from rim_peft.data import cache as stored
from tests.conftest import build_tokenizer
from tests.objectives import prepare_rows

DAY = 24 * 60 * 60


@pytest.fixture
def folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache's folder, and no file that this process holds."""
    monkeypatch.setattr(stored, "_held", {})
    (cache / "rim_peft").mkdir(parents=True)
    return cache / "rim_peft"


def put(folder: Path, name: str, *, days: float, size: int = 10) -> Path:
    """Write a file that was used some days ago."""
    path = folder / name
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_unused_for_long_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, days in (("a.arrow", 31), ("b_00000_of_00002.arrow", 40), ("b_00001_of_00002.arrow", 29), ("tmpc", 31)):
        put(folder, name, days=days)
    assert stored.prune() == 2
    assert names(folder) == ["b_00000_of_00002.arrow", "b_00001_of_00002.arrow"]
    monkeypatch.setenv("RIM_PEFT_CACHE_DAYS", "7")
    assert stored.prune() == 1
    assert names(folder) == []


def test_the_oldest_go_while_there_is_too_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, days in (("a.arrow", 3), ("b.arrow", 2), ("c.arrow", 1)):
        put(folder, name, days=days, size=1000)
    monkeypatch.setenv("RIM_PEFT_CACHE_GB", "2e-6")
    assert stored.prune() == 1
    assert names(folder) == ["b.arrow", "c.arrow"]


def test_what_any_process_uses_stays(folder: Path) -> None:
    own, others, free = (put(folder, f"{name}.arrow", days=1) for name in "abc")
    stored.hold([own])
    script = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH); "  # as `hold` does
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(others)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert stored.clear() == (1, 2)
        assert names(folder) == [own.name, others.name]
        assert not free.exists()
        process.communicate("")
    assert stored.clear() == (1, 1)
    assert names(folder) == [own.name]


def test_a_table_that_is_used_again_counts_as_new_and_is_held(folder: Path) -> None:
    rows = Dataset.from_list([{"question": "1 + 1", "steps": ["2"], "answer": "2"}])
    for _ in range(2):
        prepare_rows(rows, build_tokenizer(), needs_steps=True, num_blocks=0, block_length=4)
        (file,) = folder.iterdir()
        assert file.stat().st_mtime > time.time() - 60
        os.utime(file, (0, 0))
    assert stored.prune() == 0
    assert file.exists()


@pytest.mark.parametrize("value", ["many", "-1", "nan"])
def test_a_limit_must_be_a_number(value: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIM_PEFT_CACHE_GB", value)
    with pytest.raises(ValueError, match=f"RIM_PEFT_CACHE_GB: must be a number of at least 0, got '{value}'"):
        stored.prune()


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a.arrow", days=3, size=2_000_000)
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert f"{folder}: 1 tables, 2.0 MB" in shown
    assert "longest unused: 3 days" in shown
    assert main(["cache", "--clear", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_deleted"], document["num_tables"], document["days"]) == (1, 0, 30.0)
