"""Multi-digit multiplication, generated: digits separated by spaces, the ones first, as in iCoT's data.

    3 2 * 4 1        23 times 14
    2 9 0            step 1: 23 times the ones of 14, with room for its carry
    0 3 2 0          step 2: 23 times the tens
    2 2 3 0          answer

Each step but the first and the last also has the running sum in parentheses, as in ``0 0 6 4 9 0 ( 5 5 1 1 1 1 )``. The
steps joined by `` + `` equal iCoT's chain of thought, character by character. All numbers have leading zeros (here at
the right end) up to the largest length that they can have.

Source: Deng et al., "From Explicit CoT to Implicit CoT: Learning to Internalize CoT Step by Step", arXiv 2405.14838.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rim_peft.data.sources import question_hash
from rim_peft.tasks.stories import DrawnTask
from rim_peft.values import Range, check_ranges


@dataclass(frozen=True)
class Multiplication(DrawnTask):
    """The task's options.

    >>> Multiplication(num_digits=2, num_rows=100, num_held_out=100).make_row(23, 14)
    {'question': '3 2 * 4 1', 'steps': ['2 9 0', '0 3 2 0'], 'answer': '2 2 3 0'}
    """

    name: ClassVar[str] = "multiplication"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-digits",)

    num_digits: int = 4
    """Digits of each factor, and steps of a row; iCoT has 4, 5, 7, 9 and more."""
    num_rows: int = 10000
    """Number of training rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_digits < 2:
            raise ValueError(f"num_digits: must be at least 2, got {self.num_digits}.")
        check_ranges(self, {"num_digits": Range(2, 1000)})
        num_products = (9 * 10 ** (self.num_digits - 1)) ** 2
        for name, share in (("num_rows", 0.9), ("num_held_out", 0.05)):
            # Drawing the last remaining products would take long.
            most = int(0.8 * share * num_products)
            if getattr(self, name) > most:
                raise ValueError(
                    f"{name}: must be at most {most} with {self.num_digits} digits, got {getattr(self, name)}. Use "
                    "more digits."
                )

    def make_row(self, left: int, right: int) -> dict[str, Any]:
        """Return the row of one product."""
        size = self.num_digits
        steps, total = [], 0
        for place, digit in enumerate(reversed(str(right))):
            part = left * int(digit) * 10**place
            total += part
            step = _write(part, size + 1 + place)
            is_between = 0 < place < size - 1
            steps.append(f"{step} ( {_write(total, size + 1 + place)} )" if is_between else step)
        question = f"{_write(left, size)} * {_write(right, size)}"
        return {"question": question, "steps": steps, "answer": _write(total, 2 * size)}

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a split, each question once: drawn products whose question hashes into it."""
        wanted = self.num_in(split)
        rng = random.Random(f"multiplication {self.seed}")
        numbers = range(10 ** (self.num_digits - 1), 10**self.num_digits)
        seen: set[str] = set()
        while len(seen) < wanted:
            row = self.make_row(rng.choice(numbers), rng.choice(numbers))
            if split_of(row["question"]) == split and row["question"] not in seen:
                seen.add(row["question"])
                yield row


def split_of(question: str) -> str:
    """Return the split a question belongs to: 90 % train, 5 % validation, 5 % test, by a hash of its text.

    >>> split_of("3 2 * 4 1")
    'train'
    """
    value = question_hash(question, salt="multiplication")
    return "test" if value < 0.05 else "validation" if value < 0.1 else "train"


def _write(number: int, num_digits: int) -> str:
    """Write a number's digits, the ones first, padded with zeros to ``num_digits``.

    >>> _write(230, 4)
    '0 3 2 0'
    """
    return " ".join(reversed(str(number).zfill(num_digits)))
