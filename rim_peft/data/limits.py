"""What a row must have in a stage, and how long it may get."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rim_peft.data.collator import grounding_readouts, refinement_readouts
from rim_peft.data.examples import RowError, read_example
from rim_peft.data.tokenization import TokenizedExample

_WHOSE = " (max_position_embeddings; with longrope original_max_position_embeddings)"


@dataclass(frozen=True)
class Limits:
    """What a row must have in a stage, and how long it may get; for the fields see ``prepare_dataset``."""

    needs_steps: bool
    num_blocks: int
    block_length: int
    max_length: int | None
    max_positions: int | None
    count_tokens: Callable[[TokenizedExample], int] | None = None

    def explain(self, row: Mapping[str, Any], tokenized: TokenizedExample | RowError) -> str | None:
        """Return what is wrong with a row in this stage, None if nothing is.

        Args:
            row: the row before it was tokenised.
            tokenized: its token ids, or why it has none.
        """
        try:
            if self.needs_steps and read_example(row).steps is None:
                raise RowError("steps: there are none, and this training needs at least one")
            if isinstance(tokenized, RowError):
                raise tokenized
            self._check_length(tokenized)
        except RowError as error:
            return f"{error}{_excerpt(row)}"
        return None

    def may_fail(self, tokenized: pa.Table) -> NDArray[np.bool_]:
        """Tell from the lengths alone which rows :meth:`explain` may find too long or without steps.

        All that it would are among them, and few others: a readout is the answer or a step, and no step is read out
        twice, so no row is longer than its prompt, its blocks, all its steps, and the answer after every block.
        """
        num_steps = _lengths(tokenized["step_ids"])
        step_lengths = _lengths(pc.list_flatten(tokenized["step_ids"]))
        num_blocks: Any = self.num_blocks
        longest = _lengths(tokenized["prompt_ids"])
        if self.needs_steps:
            num_blocks = np.maximum(num_steps, num_blocks)
            owners = np.repeat(np.arange(len(num_steps)), num_steps)
            longest = longest + np.bincount(owners, weights=step_lengths, minlength=len(num_steps))
        longest = longest + num_blocks * (self.block_length + _lengths(tokenized["answer_ids"]))
        limit = min(limit if limit is not None else math.inf for limit in (self.max_length, self.max_positions))
        return (longest > limit) | (self.needs_steps & (num_steps == 0))

    def _check_length(self, row: TokenizedExample) -> None:
        if self.count_tokens is not None:
            self._check_counted(self.count_tokens(row))
            return
        readouts = (grounding_readouts if self.needs_steps else refinement_readouts)(row, num_blocks=self.num_blocks)
        prompt = len(row["prompt_ids"])
        length = prompt + len(readouts) * self.block_length + sum(len(readout) for readout in readouts)
        if self.max_length is not None and length > self.max_length:
            parts = f"prompt, {len(readouts)} blocks and readouts"
            raise RowError(f"too long: {parts} take {length} tokens, max_length is {self.max_length}")
        last = max(prompt + k * self.block_length + len(readout) for k, readout in enumerate(readouts, start=1))
        if self.max_positions is not None and last > self.max_positions:
            raise RowError(f"too long: readouts reach {last} positions, the model has {self.max_positions}{_WHOSE}")

    def _check_counted(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise RowError(f"too long: it takes {length} tokens, max_length is {self.max_length}")
        if self.max_positions is not None and length > self.max_positions:
            raise RowError(f"too long: it takes {length} tokens, the model has {self.max_positions} positions{_WHOSE}")


def _lengths(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.list_value_length(lists).to_numpy().astype(np.int64)


def _excerpt(row: Mapping[str, Any]) -> str:
    """Name a row by the beginning of its question: after a split or a filter its index is no longer the file's."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        return ""
    return f" (question: {question[:40]!r}{'...' if len(question) > 40 else ''})"
