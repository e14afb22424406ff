"""A run's folder with files that are damaged: each is named with the remedy, by whatever reads the folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rim_peft.comparison.plan import PlannedRun, read_record
from rim_peft.comparison.sections import MethodOptions
from rim_peft.export.record import EXPORT_FILE
from rim_peft.recipe import load_recipe
from rim_peft.run import load_run, train, train_or_load
from tests.integration.test_hub import RECIPE, SMALL, STEPS
from tests.integration.test_recipes import write_rows
from tests.robustness.judging import Case, Verdict, judge


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run's folder, beside its rows."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "rows", "prosqa")
    (folder / "where").write_text(str(folder / "rows"))  # for copies of the run, whose rows stay
    train(load_recipe(RECIPE, [f"data.path={folder / 'rows'}", f"output_dir={folder / 'run'}", *SMALL, *STEPS]))
    return folder / "run"


def _answers(folder: Path) -> None:
    load_run(folder)


def _is_loaded(folder: Path) -> None:
    train_or_load(load_recipe(RECIPE, _keys(folder)))


def _goes_on(folder: Path) -> None:
    train(load_recipe(RECIPE, [*_keys(folder), "resume=true"]))


def _keys(folder: Path) -> list[str]:
    return [f"data.path={(folder.parent / 'where').read_text()}", f"output_dir={folder}", *SMALL, *STEPS]


EMPTY, CUT, LIST, OBJECT, BYTES = b"", b'{"a": [1, ', b"[1, 2]", b'{"a": 1}', b"\xff\xfe\x00"
DAMAGES = [
    *[
        ("recipe.yaml", content, read)
        for content in (EMPTY, b"- 1", b"a: [", b"a: 1")
        for read in (_goes_on, _is_loaded)
    ],
    *[("recipe.yaml", content, _answers) for content in (EMPTY, b"- 1", b"a: [", b"seed: x")],
    *[("run.json", content, _answers) for content in (EMPTY, CUT, LIST, BYTES)],
    *[("best.safetensors", content, _goes_on) for content in (EMPTY, CUT)],
]


@pytest.mark.parametrize(
    ("name", "content", "read"), DAMAGES, ids=lambda value: getattr(value, "__name__", None) or repr(value)
)
def test_a_damaged_file_is_named(
    name: str, content: bytes, read: Callable[[Path], None], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run"
    if read is not _answers and name != "recipe.yaml":  # as if stopped before the adapter was written
        (folder / "adapter_config.json").unlink()
    (folder / name).write_bytes(content)
    outcome = judge(Case(name, lambda: read(folder), names=(name,)))
    assert outcome.verdict is Verdict.REFUSED, outcome.detail


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_an_output_dir_that_is_a_file_is_named(place: str, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    keys = [f"data.path={finished.parent / 'rows'}", f"output_dir={tmp_path / place}", *SMALL, *STEPS]
    for more in ([], ["resume=true"]):
        with pytest.raises(ValueError, match=r"output_dir: must be a folder, \S+file is a file"):
            train(load_recipe(RECIPE, [*keys, *more]))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", [EMPTY, CUT, LIST, OBJECT, BYTES])
def test_a_damaged_record_of_a_comparison_is_named(content: bytes, tmp_path: Path) -> None:
    run = PlannedRun("rim", 0, MethodOptions(), tmp_path, {})
    run.folder.mkdir(parents=True)
    run.record.write_bytes(content)
    outcome = judge(Case("measured", lambda: str(read_record(run)), names=("measured.json",)))
    assert outcome.verdict is Verdict.REFUSED, outcome.detail


@pytest.mark.parametrize("content", [EMPTY, CUT, LIST, OBJECT, BYTES, b'{"format": "merged", "format_version": 1}'])
def test_a_damaged_record_of_an_export_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / EXPORT_FILE).write_bytes(content)
    outcome = judge(Case("export", lambda: str(load_run(tmp_path)), names=(EXPORT_FILE,)))
    assert outcome.verdict is Verdict.REFUSED, outcome.detail
