"""Files that are whole or absent."""

from pathlib import Path

import pytest
import torch

from rim_peft.run.output_folder import write_files
from rim_peft.run.record import describe_hardware, describe_versions
from rim_peft.run.training import _peak_memory


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        (folder / "weights").write_text("w")
        (folder / "config").write_text("c")

    def fail(folder: Path) -> None:
        (folder / "config").write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_files(tmp_path, fail, last="config")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".partial-of-a-killed-run").mkdir()
    write_files(tmp_path, save, last="config")
    write_files(tmp_path, save, last="config")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config", "weights"]


def test_what_the_run_was_made_with() -> None:
    assert {"python", "rim-peft", "torch", "transformers", "peft", "trl"} <= set(describe_versions())
    assert describe_hardware()["cpu_cores"] >= 1


def test_the_peak_of_a_gpu_is_recorded_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _peak_memory() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**19)
    assert _peak_memory() == {"peak_gpu_mib": 1.5}
