"""An export killed before any of its writes leaves nothing that answers, and the same export again takes its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rim_peft.export import embedding_lora, merged, peft_lora
from rim_peft.export.checking import CheckResult
from rim_peft.run import export, load_run
from tests.integration import test_embedding_lora
from tests.integration.test_export import TEXTS, MakeAdapter, make_adapter

__all__ = ["make_adapter"]  # a fixture

QUESTIONS = [*TEXTS, *TEXTS[:2]]
CHECKED = CheckResult(len(QUESTIONS), len(QUESTIONS), 0, len(QUESTIONS), 0)


def export_watched(adapter: Path, out: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Export, and return what stood on the disk before each of its writes and moves, as a kill would leave it."""
    left: list[Path] = []

    def watch(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if out.exists() and "-killed-" not in out.name:
                left.append(Path(shutil.copytree(out, out.with_name(f"{out.name}-killed-{len(left)}"))))
            return original(*args, **kwargs)

        patch.setattr(owner, name, call)

    with monkeypatch.context() as patch:
        module: Any = {"merged": merged, "peft-lora": peft_lora, "embedding-lora": embedding_lora}[form]
        patch.setattr(module, "check", lambda *args, **options: CHECKED)  # which has tests of its own
        for owner, names in (
            (Path, ("replace", "rename", "write_text")),
            (
                module,
                [name for name in ("save_model", "save_tokenizer", "save_file", "check") if hasattr(module, name)],
            ),
        ):
            for name in names:
                watch(owner, name)
        export(str(adapter), out, form=form, questions=QUESTIONS, max_new_tokens=2)
    return left


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_killed_merged_export_is_known_as_such(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = make_adapter("adapter"), tmp_path / "out"
    left = export_watched(adapter, out, "merged", monkeypatch)
    assert len(left) > 10
    load_run(out)
    for killed in left:
        assert not (killed / "rim_export.json").exists()
        with pytest.raises(FileNotFoundError, match="Its export has not finished: run the same rim-peft export again"):
            load_run(killed)
    for killed in (left[len(left) // 2], left[-1]):
        export_watched(adapter, killed, "merged", monkeypatch)
        assert _files(killed) == _files(out)
        load_run(killed)


def test_a_killed_export_of_an_earlier_version_is_known_as_such(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    record = {
        "format": "merged",
        "format_version": 1,
        "memory": {"names": [], "ids": [], "num_blocks": 0, "block_size": 0},
    }
    more = dict.fromkeys(("places", "source", "base", "dequantized_from", "dtype", "head_is_tied"))
    (tmp_path / "rim_export.json").write_text(json.dumps({**record, **more}))
    with pytest.raises(ValueError, match="must be of a finished export, and is not"):
        load_run(tmp_path)


@pytest.mark.slow
def test_a_killed_peft_lora_export_is_made_again(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, out = make_adapter("first"), make_adapter("second"), tmp_path / "out"
    for number, adapter in enumerate((first, second)):
        left = export_watched(adapter, out, "peft-lora", monkeypatch)
        for killed in (left[0], left[-1]):
            export_watched(adapter, killed, "peft-lora", monkeypatch)
            adapters = json.loads((killed / "rim_export.json").read_text())["adapters"]
            assert list(adapters) == ["first", "second"][: number + 1]
            assert all("check" in entry for entry in adapters.values())
            assert sorted(path.name for path in killed.iterdir()) == ["adapters", "base", "rim_export.json"]
            base = AutoModelForCausalLM.from_pretrained(killed / "base")
            for name in adapters:
                PeftModel.from_pretrained(base, str(killed / "adapters" / name), adapter_name=name)
        for killed in left:
            shutil.rmtree(killed)


@pytest.mark.slow
def test_a_killed_export_for_the_unmodified_base_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, out = test_embedding_lora.make_adapter(tmp_path / "adapter"), tmp_path / "out"
    left = export_watched(adapter, out, "embedding-lora", monkeypatch)
    assert len(left) > 5
    assert not any((killed / "rim_export.json").exists() for killed in left)
    for killed in (left[len(left) // 2], left[-1]):
        export_watched(adapter, killed, "embedding-lora", monkeypatch)
        assert _files(killed) == _files(out)


def test_a_folder_of_someone_else_is_not_emptied(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".partial").mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: must be a new or empty folder"):
        export(str(make_adapter("adapter")), out, questions=QUESTIONS)
    assert _files(out) == [".partial", "mine.txt"]
