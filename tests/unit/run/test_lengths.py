"""Lengths, batches and steps before a training, by hand and against the Trainer's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from rim_peft import GroundingConfig, RefinementConfig, RiMConfig
from rim_peft.data.objective import Objective
from rim_peft.run.costs import count_batches, count_steps, find_largest_batch, find_unreadable, lay_out, stated_row
from rim_peft.training import BaselineConfig, BaselineTrainer, GroundingTrainer, RefinementTrainer
from tests.conftest import build_rim, build_tokenizer

ROWS = [
    {"question": "ab", "steps": ["c", "de"], "answer": "f"},
    {"question": "abcd", "steps": ["c"], "answer": "fg"},
    {"question": "a", "steps": None, "answer": "f"},
]


def options(**values: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_tokens_per_batch": None,
        "per_device_train_batch_size": 2,
        "dataloader_drop_last": False,
        "pack_length": None,
        "seed": 0,
        "max_steps": -1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
    }
    return SimpleNamespace(**{**defaults, **values})


def objective_of(kind: Any, config: Any, **values: Any) -> tuple[Objective, Any]:
    args = config("unused", use_cpu=True, report_to="none", **values)
    return kind.objective_of(args, RiMConfig(num_blocks=3, first_memory_id=300), build_tokenizer()), args


def test_rows_are_as_long_as_the_trainer_lays_them_out() -> None:
    grounding = lay_out(
        *objective_of(GroundingTrainer, GroundingConfig), Dataset.from_list(ROWS), build_tokenizer(), max_positions=None
    )
    # A prompt has a newline, a block four tokens, each text EOS. Readouts: step 2, answer, answer; the answer thrice.
    assert grounding.lengths == [3 + 3 * 4 + 3 + 2 + 2, 5 + 3 * 4 + 3 * 3]
    assert [index for index, _ in grounding.bad] == [2]
    assert "steps: there are none" in grounding.bad[0][1]
    refinement = lay_out(
        *objective_of(RefinementTrainer, RefinementConfig),
        Dataset.from_list(ROWS),
        build_tokenizer(),
        max_positions=None,
    )
    assert refinement.lengths == [3 + 3 * (4 + 2), 5 + 3 * (4 + 3), 2 + 3 * (4 + 2)]
    assert refinement.bad == ()


def test_rows_beyond_the_bases_positions_are_bad() -> None:
    found = lay_out(
        *objective_of(RefinementTrainer, RefinementConfig), Dataset.from_list(ROWS), build_tokenizer(), max_positions=19
    )
    assert [index for index, _ in found.bad] == [1]
    assert "the model has 19" in found.bad[0][1]


@pytest.mark.parametrize(
    ("kind", "config", "values"),
    [
        (GroundingTrainer, GroundingConfig, {}),
        (GroundingTrainer, GroundingConfig, {"trailing_blocks": False}),
        (RefinementTrainer, RefinementConfig, {}),
        (RefinementTrainer, RefinementConfig, {"block_range": [1, 5]}),
        (BaselineTrainer, BaselineConfig, {}),
        (BaselineTrainer, BaselineConfig, {"written_steps": True}),
    ],
)
@pytest.mark.parametrize("length", [36, 50, 200])
def test_a_stated_row_is_as_long_as_stated(kind: Any, config: Any, values: Any, length: int) -> None:
    objective, _ = objective_of(kind, config, **values)
    row = stated_row(objective, length, num_blocks=3)
    assert len(row["prompt_ids"]) >= 1
    assert objective.num_tokens(row) == length


def test_a_row_that_its_blocks_exceed_has_a_prompt_of_one_token() -> None:
    row = stated_row(objective_of(RefinementTrainer, RefinementConfig)[0], 5, num_blocks=3)
    assert (len(row["prompt_ids"]), len(row["answer_ids"])) == (1, 1)


def test_batches_and_steps_are_counted_as_the_trainer_does() -> None:
    assert count_batches(options(), [1] * 5) == 3
    assert count_batches(options(dataloader_drop_last=True), [1] * 5) == 2
    assert count_steps(options(), 3) == 3
    assert count_steps(options(gradient_accumulation_steps=2), 3) == 2  # the last one of a single batch
    assert count_steps(options(num_train_epochs=2.5), 3) == 8
    assert count_steps(options(max_steps=7), None) == 7
    assert count_steps(options(), None) is None


def test_steps_are_those_of_a_real_training() -> None:
    rows = Dataset.from_list([{"question": f"{n}?", "steps": ["a", "b"], "answer": "c"} for n in range(7)])
    args = RefinementConfig(
        "unused", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2,
    )  # fmt: skip
    trainer = RefinementTrainer(build_rim(), args, rows, processing_class=build_tokenizer())
    trainer.train()
    assert count_steps(args, count_batches(args, [1] * 7)) == trainer.state.max_steps == 4


def test_the_largest_batch() -> None:
    lengths = [3, 9, 4, 8, 2]
    assert find_largest_batch(options(), lengths) == [1, 3]
    by_tokens = options(max_tokens_per_batch=18)
    found = find_largest_batch(by_tokens, lengths)
    assert 1 in found  # wherever the longest row is, the others are padded to it
    assert sum(lengths[index] for index in found) <= 18
    with pytest.raises(ValueError, match="max_tokens_per_batch: must be at least twice the longest row's 9"):
        count_batches(options(max_tokens_per_batch=17), lengths)


def test_rows_that_no_tokenizer_could_make_good() -> None:
    rows = [*ROWS, {"question": "a", "answer": ""}, {"answer": "b"}]
    assert [index for index, _ in find_unreadable(rows, needs_steps=True)] == [2, 3, 4]
    assert [index for index, _ in find_unreadable(rows, needs_steps=False)] == [3, 4]
