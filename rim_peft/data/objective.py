"""What a stage trains of a row, without a model: its blocks, their readouts, how much each counts, and its length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from rim_peft.data.collator import ReadoutCollator, TokenizedRow
from rim_peft.sequence import BlockTokens


@dataclass(frozen=True)
class Objective(ABC):
    """What is read out after each of a row's blocks, and how much it counts.

    Trainers lay their batches out by it; ``rim-peft check`` and tokenisation ask it how long rows get.

    Attributes:
        blocks: what stands before each readout.
        num_blocks: readouts of a row; a subclass says which rows have others.
    """

    blocks: BlockTokens
    num_blocks: int

    needs_steps: ClassVar[bool] = False
    """Whether rows must have steps."""

    @property
    def trains_memory(self) -> bool:
        """Whether the loss reaches the memory rows."""
        return True

    @abstractmethod
    def readouts(self, row: TokenizedRow, *, num_blocks: int | None = None) -> list[list[int]]:
        """Return what is read out after each block of a row.

        Args:
            row: a tokenised row.
            num_blocks: how many, in place of the objective's own number.
        """

    def weights(
        self, num_steps: Tensor, num_blocks: Tensor, *, progress: float | None, longest: int | None = None
    ) -> Tensor:
        """Return the (D, K) loss weights of a batch's readouts: 1 each, unless a stage weighs them otherwise.

        Args:
            num_steps: (D,) each sample's number of reasoning steps.
            num_blocks: (D,) each sample's number of readouts.
            progress: share of the stage that is done, in [0, 1); None to weigh all readouts, as evaluation does.
            longest: the most steps that rows have at the moment, in a curriculum by length; None for any number.
        """
        return (torch.arange(int(num_blocks.max())) < num_blocks[:, None]).float()

    def collator(self, *, pad_id: int, block_range: Sequence[int] | None = None, seed: int = 0) -> Callable[..., Any]:
        """Return what makes batches of tokenised rows; it must travel to data loader processes by pickle.

        Args:
            pad_id: id of padding.
            block_range: least and most readouts of a batch, which draws its own number; None for the objective's.
            seed: seed of that draw.
        """
        return ReadoutCollator(self, pad_id=pad_id, block_range=block_range, seed=seed)

    def last_block(self, longest: int) -> int:
        """Return the last block that is read out of chains of at most so many steps, in a curriculum by length."""
        return self.num_blocks

    def num_tokens(self, row: TokenizedRow) -> int:
        """Count the tokens that a row takes at most: prompt, blocks and readouts."""
        readouts = self.readouts(row)
        return len(row["prompt_ids"]) + sum(self.blocks.length + len(readout) for readout in readouts)

    def num_positions(self, row: TokenizedRow) -> int:
        """Count the positions that a row needs: readouts follow their blocks side by side."""
        ends = (k * self.blocks.length + len(readout) for k, readout in enumerate(self.readouts(row), start=1))
        return len(row["prompt_ids"]) + max(ends)

    def describe_length(self, row: TokenizedRow) -> tuple[str, str]:
        """Return what takes a row's tokens and what reaches its last position, as the beginning of two sentences."""
        return (
            f"prompt, {len(self.readouts(row))} blocks and readouts take {self.num_tokens(row)} tokens",
            f"readouts reach {self.num_positions(row)} positions",
        )

    def most_tokens(self, rows: pa.Table) -> NDArray[np.int64]:
        """Return numbers of tokens, one a row, that the rows do not exceed, from the lengths of their texts alone."""
        answers = list_lengths(rows["answer_ids"])
        return list_lengths(rows["prompt_ids"]) + self.num_blocks * (self.blocks.length + answers)


def list_lengths(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the length of each list of a column."""
    return pc.list_value_length(lists).to_numpy().astype(np.int64)


def step_lengths(rows: pa.Table) -> NDArray[np.int64]:
    """Return the tokens of all steps together of each row of a table."""
    num_steps = list_lengths(rows["step_ids"])
    owners = np.repeat(np.arange(len(num_steps)), num_steps)
    lengths = list_lengths(pc.list_flatten(rows["step_ids"]))
    return np.bincount(owners, weights=lengths, minlength=len(num_steps)).astype(np.int64)
