"""What a stage trains of a row, without a model, and batches of such rows."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from rim_peft.sequence import BlockTokens, Sample, build_layout


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
