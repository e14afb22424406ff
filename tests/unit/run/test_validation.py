"""Sample readouts of a run's validation rows, whatever the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rim_peft.data.examples import Example
from rim_peft.recipe import load_recipe
from rim_peft.run.validation import Validation
from tests.conftest import build_rim, build_tokenizer

EXAMPLES = [
    Example("1 + 1?", answer="2", steps=["1+1"]),
    Example(
        [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 1?"}], answer="3", steps=["2+1"]
    ),
    Example("3 + 1?", answer="4", steps=["3+1"]),
]


def _samples(tmp_path: Path, *, method: str, num_blocks: int, sample_rows: int) -> list[Any]:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output_dir: out\nmethod: {method}\nmodel: {{config: {{model_type: llama}}}}\n"
        "data: {task: rim_peft.tasks.logic:ProsQA, path: rows.jsonl}\n"
        f"evaluation: {{batch_size: 1, max_new_tokens: 2, sample_rows: {sample_rows}}}\n"
    )
    recipe = load_recipe(path)
    validation = Validation(recipe, EXAMPLES, recipe.task(), build_tokenizer())
    return validation.read_samples(build_rim(num_blocks=num_blocks))


def test_every_block_is_read_out_and_the_last_one_judged(tmp_path: Path) -> None:
    first, second = _samples(tmp_path, method="rim", num_blocks=2, sample_rows=2)
    assert list(first.readouts) == ["block 1", "block 2"]
    assert (first.question, first.answer) == ("1 + 1?", "2")
    assert first.is_right == (first.readouts["block 2"] == "2")
    assert second.question == "system: Count.\nuser: 2 + 1?"


def test_of_many_blocks_some_are_shown(tmp_path: Path) -> None:
    (sample,) = _samples(tmp_path, method="rim", num_blocks=32, sample_rows=1)
    assert list(sample.readouts) == [f"block {block}" for block in range(2, 33, 2)]


def test_a_base_that_cannot_read_out_blocks_still_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rim_peft.run.validation.can_decode", lambda model: False)
    (sample,) = _samples(tmp_path, method="rim", num_blocks=2, sample_rows=1)
    assert list(sample.readouts) == ["answered"]


@pytest.mark.parametrize("method", ["answer", "cot"])
def test_without_blocks_there_is_the_answer(method: str, tmp_path: Path) -> None:
    samples = _samples(tmp_path, method=method, num_blocks=0, sample_rows=9)
    assert [list(sample.readouts) for sample in samples] == [["answered"]] * 3


def test_the_number_of_rows_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.sample_rows: must be .* 64, got 65"):
        _samples(tmp_path, method="rim", num_blocks=2, sample_rows=65)
