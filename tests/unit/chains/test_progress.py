"""What an unfinished folder of chains resumes from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rim_peft.chains.progress import Journal, Noted, begin, check_begun
from rim_peft.chains.teachers import Draft


def noted(text: str) -> Noted:
    return Noted(Draft(text, 3, 5, is_cut=False), 0.25)


def test_drafts_come_back_with_any_text_and_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "drafts.jsonl"
    journal = Journal(path)
    drafts = {(0, 1): noted("a\nb\u2028\ud800é"), (7, 2): Noted(Draft("", problem="too long"), 0.0)}
    journal.append(drafts.items())
    journal.append([((0, 1), noted("another"))])
    assert Journal(path).noted == journal.noted == drafts
    assert len(path.read_bytes().splitlines()) == 2


def test_a_torn_line_is_dropped_wherever_it_was_torn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "drafts.jsonl"
    Journal(path).append([((0, 1), noted("first"))])
    first = path.read_bytes()
    Journal(path).append([((1, 1), noted("second"))])
    whole = path.read_bytes()
    for size in range(len(first), len(whole)):
        path.write_bytes(whole[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            journal = Journal(path)
        assert list(journal.noted) == [(0, 1)]
        assert path.read_bytes() == first
        assert ("1 incomplete or damaged lines were dropped" in caplog.text) == (size > len(first))
    journal.append([((1, 1), noted("second"))])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"\0\0\0\0\n", b"[]\n", b'{"row": 1}\n', b"[" * 100_000 + b"\n", b"\xff\n"])
def test_a_damaged_line_is_written_again(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "drafts.jsonl"
    Journal(path).append([((0, 1), noted("first"))])
    with path.open("ab") as file:
        file.write(damage)
    journal = Journal(path)
    journal.append([((1, 1), noted("second"))])
    assert list(Journal(path).noted) == [(0, 1), (1, 1)]


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    options: dict[str, Any] = {"teacher": "a", "seed": 0, "stop": ("\n",), "examples": []}
    begin(tmp_path, {**options, "seed": 7})  # may change until there are drafts
    begin(tmp_path, options)
    Journal(tmp_path / "drafts.jsonl").append([((0, 1), noted("first"))])
    begin(tmp_path, options)
    with pytest.raises(ValueError, match=r"^output_dir: .*seed was 0, is 1; top_p was None, is 0\.5\. Give the same"):
        begin(tmp_path, {**options, "seed": 1, "top_p": 0.5})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    assert check_begun(tmp_path / "new") is None
    (tmp_path / ".lock").touch()
    assert check_begun(tmp_path) is None
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"^output_dir: must be a new or empty folder.*holds thesis\.tex"):
        check_begun(tmp_path)
    (tmp_path / "options.json").write_text("{")
    with pytest.raises(ValueError, match=r"options\.json"):
        check_begun(tmp_path)
