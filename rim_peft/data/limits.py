"""What a row must have in a stage, and how long it may get."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rim_peft.data.examples import RowError, read_example
from rim_peft.data.objective import Objective, list_lengths
from rim_peft.data.tokenization import TokenizedExample

_WHOSE = " (max_position_embeddings; with longrope original_max_position_embeddings)"


@dataclass(frozen=True)
class Limits:
    """What a row must have in a stage, and how long it may get.

    Attributes:
        objective: what the stage trains of a row.
        max_length: longest row in tokens; None for no limit.
        max_positions: positions that the model has; None for no limit.
    """

    objective: Objective
    max_length: int | None
    max_positions: int | None

    def explain(self, row: Mapping[str, Any], tokenized: TokenizedExample | RowError) -> str | None:
        """Return what is wrong with a row in this stage, None if nothing is.

        Args:
            row: the row before it was tokenised.
            tokenized: its token ids, or why it has none.
        """
        try:
            if self.objective.needs_steps and read_example(row).steps is None:
                raise RowError("steps: there are none, and this training needs at least one")
            if isinstance(tokenized, RowError):
                raise tokenized
            self._check_length(tokenized)
        except RowError as error:
            return f"{error}{_excerpt(row)}"
        return None

    def may_fail(self, tokenized: pa.Table) -> NDArray[np.bool_]:
        """Tell from the lengths alone which rows :meth:`explain` may find too long or without steps.

        All that it would are among them, and few others.
        """
        limit = min(limit if limit is not None else math.inf for limit in (self.max_length, self.max_positions))
        lacks_steps = self.objective.needs_steps & (list_lengths(tokenized["step_ids"]) == 0)
        return (self.objective.most_tokens(tokenized) > limit) | lacks_steps

    def _check_length(self, row: TokenizedExample) -> None:
        tokens, positions = self.objective.describe_length(row)
        if self.max_length is not None and self.objective.num_tokens(row) > self.max_length:
            raise RowError(f"too long: {tokens}, max_length is {self.max_length}")
        if self.max_positions is not None and self.objective.num_positions(row) > self.max_positions:
            raise RowError(f"too long: {positions}, the model has {self.max_positions} positions{_WHOSE}")


def _excerpt(row: Mapping[str, Any]) -> str:
    """Name a row by the beginning of its question: after a split or a filter its index is no longer the file's."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        return ""
    return f" (question: {question[:40]!r}{'...' if len(question) > 40 else ''})"
