"""Judged rows of a comparison: apart from the rows that train, whatever their chats have beside the messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rim_peft.comparison.rows import load_judged_rows
from rim_peft.comparison.sections import Comparison, MethodOptions, RowsOptions
from rim_peft.recipe import Recipe, load_recipe


def rows(*numbers: int, **beside: Any) -> str:
    chats = [[{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}] for n in numbers]
    return "".join(json.dumps({"messages": chat, **beside}) + "\n" for chat in chats)


def judge(folder: Path, **files: str) -> tuple[int, int]:
    for name, text in files.items():
        (folder / f"{name}.jsonl").write_text(text)
    values = {"output_dir": str(folder / "out"), "data": {"path": str(folder), "options": {"turns": "all"}}}
    (folder / "recipe.yaml").write_text(json.dumps({**values, "model": {"name_or_path": "base"}, "grounding": None}))
    recipe: Recipe = load_recipe(folder / "recipe.yaml")
    comparison = Comparison(
        output_dir=str(folder / "out"),
        recipe="recipe.yaml",
        test=RowsOptions("test"),
        selection=RowsOptions("validation"),
        methods={"rim": MethodOptions()},
    )
    judged = load_judged_rows(comparison, recipe, [recipe])
    return len(judged.test), len(judged.selection)


@pytest.mark.parametrize(
    "beside", [{}, {"chat_template_kwargs": {"enable_thinking": False}}, {"tools": [{"name": "x"}]}]
)
def test_a_trained_question_is_found_whatever_its_template_gets(beside: dict[str, Any], tmp_path: Path) -> None:
    parts = {"train": rows(1, 2, **beside), "validation": rows(3, **beside), "test": rows(4, 5, **beside)}
    assert judge(tmp_path, **parts) == (2, 1)
    with pytest.raises(ValueError, match="test: must share no question with the training rows, got 1 of 2"):
        judge(tmp_path, **{**parts, "test": rows(2, 5, **beside)})
    with pytest.raises(ValueError, match="test: must share no question with the training rows, got 1 of 2"):
        judge(tmp_path, **{**parts, "test": rows(2, 5, tools=[{"name": "another"}])})
    with pytest.raises(ValueError, match="selection: must share no question with the training rows, got 1 of 1"):
        judge(tmp_path, **{**parts, "validation": rows(1, **beside)})


def test_questions_that_differ_in_tools_are_judged_both(tmp_path: Path) -> None:
    test = rows(4) + rows(4, tools=[{"name": "x"}]) + rows(4)
    assert judge(tmp_path, train=rows(1), validation=rows(3), test=test) == (2, 1)
