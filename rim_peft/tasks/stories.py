"""Base classes of tasks that draw rows from a seed, and the assignment of questions to splits."""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from rim_peft.tasks.task import GeneratedTask
from rim_peft.values import Range, check_ranges

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def split_of(question: str) -> Split:
    """Return the split a question belongs to: 90 % train, 5 % validation, 5 % test, by a hash of its text.

    So no question is ever in two splits, whatever the seed.

    >>> split_of("Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?")
    'train'
    """
    bucket = hashlib.blake2b(question.encode(), digest_size=2).digest()
    twentieth = int.from_bytes(bucket, "big") % 20
    return {0: SPLITS[1], 1: SPLITS[2]}.get(twentieth, SPLITS[0])


@dataclass(frozen=True)
class DrawnTask(GeneratedTask):
    """Base of tasks that draw a given number of rows; the same options give the same rows."""

    num_rows: int = 1000
    """Number of training rows."""
    num_held_out: int = 1000
    """Number of rows in each of the other splits."""
    seed: int = 0
    """Seed of the rows; the splits share no question, whatever the seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_rows < 1 or self.num_held_out < 1:
            raise ValueError(f"num_rows, num_held_out: must be at least 1, got {self.num_rows}, {self.num_held_out}.")
        check_ranges(self, dict.fromkeys(("num_rows", "num_held_out"), Range(1, 10**9)))

    def num_in(self, split: str) -> int:
        """Return the number of rows in a split."""
        if split not in SPLITS:
            raise ValueError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}")
        return self.num_rows if split == "train" else self.num_held_out


@dataclass(frozen=True)
class StoryTask(DrawnTask):
    """Base of tasks that draw stories."""

    lengths: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of dependent steps in a question, to draw from."""
    weights: tuple[float, ...] | None = None
    """Relative frequency of each of `lengths`; equal if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.longest
        if not self.lengths or not all(1 <= length <= longest for length in self.lengths):
            raise ValueError(f"lengths: must hold numbers of steps from 1 to {longest}, got {self.lengths!r}.")
        weights = self.weights
        if weights is not None and (len(weights) != len(self.lengths) or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(
                f"weights: must hold a weight for each of the {len(self.lengths)} lengths, none below 0 and not all 0, "
                f"got {self.weights!r}. Give one for each, or omit them."
            )

    @property
    @abstractmethod
    def longest(self) -> int:
        """The most steps that a story can have."""

    @abstractmethod
    def draw_row(self, rng: random.Random, length: int) -> dict[str, Any]:
        """Draw a row with ``question``, ``steps`` and ``answer``, regardless of split."""

    def row(self, index: int) -> dict[str, Any]:
        """Return candidate row `index` with its ``length``, regardless of split."""
        rng = random.Random(f"{self.name} {self.seed} {index}")
        length = rng.choices(self.lengths, self.weights)[0]
        return {**self.draw_row(rng, length), "length": length}

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a split: candidates whose question hashes into it."""
        left = self.num_in(split)
        for index in count():
            if left <= 0:
                return
            row = self.row(index)
            if split_of(row["question"]) == split:
                left -= 1
                yield row
