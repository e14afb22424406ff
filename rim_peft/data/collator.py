"""Tokenised examples → one batch of interleaved rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rim_peft.sequence import Sample, build_layout

if TYPE_CHECKING:
    from rim_peft.data.objective import Objective

TokenizedRow = Mapping[str, Any]
"""``prompt_ids`` (list of int), ``step_ids`` (list of lists of int) and ``answer_ids`` (list of int)."""


def chain_parts(row: TokenizedRow, *, separator_ids: Sequence[int]) -> list[list[int]]:
    """List the parts of a written chain of thought: every step with a separator for its EOS, then the answer with EOS.

    >>> chain_parts({"step_ids": [[5, 6, 2], [7, 2]], "answer_ids": [8, 2]}, separator_ids=[3])
    [[5, 6, 3], [7, 3], [8, 2]]
    """
    return [*([*step[:-1], *separator_ids] for step in row["step_ids"]), row["answer_ids"]]


@dataclass(frozen=True)
class ReadoutCollator:
    """Lay tokenised rows out as one right-padded batch, a sample in each row.

    The batch is a :class:`rim_peft.sequence.Layout` as a dict, plus ``num_steps`` (B,), each sample's ``T``.

    Attributes:
        objective: which readouts a row gets, and what stands before them.
        pad_id: id of padding.
        block_range: the least and the most readouts that a batch may have, both included: each batch draws its own
            number from them. None: the objective's number.
        seed: seed of the draw.
    """

    objective: Objective
    pad_id: int
    block_range: Sequence[int] | None = None
    seed: int = 0

    def __call__(self, rows: Sequence[TokenizedRow]) -> dict[str, Tensor]:
        """Collate ``rows`` into tensors."""
        num_blocks = None if self.block_range is None else self._draw(rows, *self.block_range)
        samples = [Sample(row["prompt_ids"], self.objective.readouts(row, num_blocks=num_blocks)) for row in rows]
        layout = build_layout(samples, self.objective.blocks, pad_id=self.pad_id)
        return {**layout.to_dict(), "num_steps": torch.tensor([len(row["step_ids"]) for row in rows])}

    def _draw(self, rows: Sequence[TokenizedRow], least: int, most: int) -> int:
        """Draw a batch's number of blocks from what is in it, so that a run that is resumed draws the same."""
        digest = hashlib.blake2b(digest_size=8)
        for row in rows:
            digest.update(repr(list(row["prompt_ids"])).encode())
        return random.Random(f"{self.seed} {digest.hexdigest()}").randint(least, most)
