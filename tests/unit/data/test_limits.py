import itertools
import random
from typing import Any

import pyarrow as pa
import pytest

from rim_peft.data.examples import RowError
from rim_peft.data.objective import Objective
from rim_peft.data.preparation import Limits
from tests.objectives import make_objective

ROW = {"question": "q", "steps": ["s"], "answer": "a"}


def objective(needs_steps: bool, num_blocks: int) -> Objective:
    return make_objective(needs_steps=needs_steps, num_blocks=num_blocks, block_length=3)


def make_rows(count: int) -> list[Any]:
    """Rows of random lengths; their token ids do not matter."""
    rng = random.Random(0)
    return [
        {
            "prompt_ids": [7] * rng.randint(1, 9),
            "step_ids": [[7] * rng.randint(1, 9) for _ in range(rng.randint(0, 4))],
            "answer_ids": [7] * rng.randint(1, 5),
        }
        for _ in range(count)
    ]


def make_table(rows: list[Any]) -> pa.Table:
    """A table in two chunks, of which the second begins in the middle of its memory."""
    ids = pa.list_(pa.int32())
    whole = pa.Table.from_pylist(
        rows, schema=pa.schema({"prompt_ids": ids, "step_ids": pa.list_(ids), "answer_ids": ids})
    )
    return pa.concat_tables([whole.slice(0, len(rows) // 3), whole.slice(len(rows) // 3)])


@pytest.mark.parametrize("needs_steps", [True, False])
@pytest.mark.parametrize("limit", ["max_length", "max_positions"])
def test_no_row_that_fails_is_overlooked(needs_steps: bool, limit: str) -> None:
    rows = make_rows(300)
    table = make_table(rows)
    num_fails = 0
    for num_blocks, value in itertools.product((1, 2, 5), range(10, 80, 3)):
        limits = Limits(objective(needs_steps, num_blocks), **{"max_length": None, "max_positions": None, limit: value})
        suspects = limits.may_fail(table)
        source = [{**ROW, "steps": row["step_ids"] and ["s"]} for row in rows]
        fails = [limits.explain(*pair) is not None for pair in zip(source, rows, strict=True)]
        assert [index for index in range(300) if fails[index] and not suspects[index]] == []
        num_fails += sum(fails)
    assert num_fails > 300


def test_few_others_are_looked_at() -> None:
    # Stage 2's length is 4 + 2 * (3 + 1) = 12, known exactly. In stage 1, three steps of 2: 4 + 3 * 3 + 2 + 2 + 1 = 18
    # tokens, at the most 4 + 3 * (3 + 1) + 6 = 22.
    table = make_table([{"prompt_ids": [7] * 4, "step_ids": [[7, 7]] * 3, "answer_ids": [7]}] * 3)
    assert not Limits(objective(False, 2), 12, None).may_fail(table).any()
    assert Limits(objective(False, 2), 11, None).may_fail(table).all()
    assert not Limits(objective(True, 2), 22, None).may_fail(table).any()
    assert not Limits(objective(True, 2), None, None).may_fail(table).any()


def test_a_rows_own_fault_comes_first_then_missing_steps_then_its_tokens() -> None:
    first, second = [Limits(objective(needs_steps, 1), 5, None) for needs_steps in (True, False)]
    fault = RowError("holds EOS")
    assert first.explain({**ROW, "answer": "", "steps": None}, RowError("answer: is empty")) == (
        "answer: is empty (question: 'q')"
    )
    assert first.explain({**ROW, "steps": None}, fault) == (
        "steps: there are none, and this training needs at least one (question: 'q')"
    )
    assert second.explain({**ROW, "steps": None}, fault) == "holds EOS (question: 'q')"
    assert second.explain({**ROW, "question": None}, RowError("question: is none")) == "question: is none"
