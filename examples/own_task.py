"""Define a task of your own as one class, named in a recipe as `data.task: examples.own_task:ColumnAddition`.

The module is searched for on Python's path, and in the working directory last.

Its rows are generated here; for rows from files, define `read_row` instead of `rows` (see rim_peft/tasks/math.py). Its
answers are compared as text; `answer_rules` would select another rule (docs/tasks.md).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rim_peft.tasks.task import GeneratedTask

SEEDS = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True)
class ColumnAddition(GeneratedTask):
    """Add two numbers digit by digit from the right, with the carry written at each step.

    >>> row = ColumnAddition(num_digits=2).make_row(47, 85)
    >>> row["question"], row["steps"], row["answer"]
    ('47 + 85', ['7 + 5 + 0 = 12', '4 + 8 + 1 = 13'], '132')
    """

    name: ClassVar[str] = "column-addition"

    num_digits: int = 3
    num_rows: int = 1000

    def make_row(self, a: int, b: int) -> dict[str, Any]:
        """Return the row of one addition."""
        steps, carry = [], 0
        for place in range(self.num_digits):
            left, right = a // 10**place % 10, b // 10**place % 10
            steps.append(f"{left} + {right} + {carry} = {left + right + carry}")
            carry = (left + right + carry) // 10
        return {"question": f"{a} + {b}", "steps": steps, "answer": str(a + b)}

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield rows with sums of one split: sums ending in 8 are validation rows, in 9 test rows."""
        if split not in SEEDS:
            raise ValueError(f"split: must be one of {', '.join(SEEDS)}, got {split!r}.")
        wanted = {"validation": {8}, "test": {9}}.get(split, set(range(8)))
        rng, left = random.Random(SEEDS[split]), self.num_rows
        while left:
            a, b = (rng.randrange(10**self.num_digits) for _ in range(2))
            if (a + b) % 10 in wanted:
                left -= 1
                yield self.make_row(a, b)
