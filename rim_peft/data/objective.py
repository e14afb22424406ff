"""Training objectives: the readouts and weights of a row, independent of a model; and the batches of such rows."""

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
    """The readout after each block of a row, and its loss weight.

    Trainers build their batches from it; ``rim-peft check`` and tokenisation use it for the lengths of rows.

    Attributes:
        blocks: the memory block before each readout.
        num_blocks: readouts per row, unless a subclass says otherwise.
    """

    blocks: BlockTokens
    num_blocks: int

    needs_steps: ClassVar[bool] = False
    """Whether rows must have steps."""

    @property
    def in_place_weight(self) -> float:
        """Loss weight of the labels in place."""
        return 1.0

    @property
    def trains_memory(self) -> bool:
        """Whether the loss reaches the memory rows."""
        return True

    @abstractmethod
    def readouts(self, row: TokenizedRow, *, num_blocks: int | None = None) -> list[list[int]]:
        """Return the readout after each block of a row.

        Args:
            num_blocks: how many blocks; the objective's own number if None.
        """

    def in_place(self, row: TokenizedRow) -> Sequence[Sequence[int]]:
        """Return the tokens that the memory tokens of each block predict in place: none, unless a subclass says so."""
        return ()

    def weights(
        self, num_steps: Tensor, num_blocks: Tensor, *, progress: float | None, longest: int | None = None
    ) -> Tensor:
        """Return the (D, K) loss weights of a batch's readouts: 1 each, unless a stage overrides this.

        Args:
            num_steps: (D,) number of reasoning steps of each sample.
            num_blocks: (D,) number of readouts of each sample.
            progress: share of the stage that is done, in [0, 1); None to weigh all readouts, as in evaluation.
            longest: current limit on the steps of a row, in a curriculum by length; None for no limit.
        """
        return (torch.arange(int(num_blocks.max())) < num_blocks[:, None]).float()

    def collator(self, *, pad_id: int, block_range: Sequence[int] | None = None, seed: int = 0) -> Callable[..., Any]:
        """Return the collator of tokenised rows; it must be picklable, for data loader processes.

        Args:
            block_range: smallest and largest number of readouts, drawn for each batch; None for the objective's number.
        """
        return ReadoutCollator(self, pad_id=pad_id, block_range=block_range, seed=seed)

    def last_block(self, longest: int) -> int:
        """Return the last block with a readout for chains of at most ``longest`` steps, in a curriculum by length."""
        return self.num_blocks

    def num_tokens(self, row: TokenizedRow) -> int:
        """Return the most tokens that a row takes: prompt, blocks and readouts."""
        readouts = self.readouts(row)
        return len(row["prompt_ids"]) + sum(self.blocks.length + len(readout) for readout in readouts)

    def num_positions(self, row: TokenizedRow) -> int:
        """Return the number of positions that a row needs; readouts share positions with the blocks after them."""
        ends = (k * self.blocks.length + len(readout) for k, readout in enumerate(self.readouts(row), start=1))
        return len(row["prompt_ids"]) + max(ends)

    def describe_length(self, row: TokenizedRow) -> tuple[str, str]:
        """Describe a row's number of tokens and of positions, as the start of two error messages."""
        return (
            f"prompt, {len(self.readouts(row))} blocks and readouts take {self.num_tokens(row)} tokens",
            f"readouts reach {self.num_positions(row)} positions",
        )

    def most_tokens(self, rows: pa.Table) -> NDArray[np.int64]:
        """Return an upper bound on each row's tokens, computed from the lengths of its parts."""
        answers = list_lengths(rows["answer_ids"])
        return list_lengths(rows["prompt_ids"]) + self.num_blocks * (self.blocks.length + answers)


def list_lengths(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the length of each list of a column."""
    return pc.list_value_length(lists).to_numpy().astype(np.int64)


def step_lengths(rows: pa.Table) -> NDArray[np.int64]:
    """Return the total number of step tokens of each row of a table."""
    num_steps = list_lengths(rows["step_ids"])
    owners = np.repeat(np.arange(len(num_steps)), num_steps)
    lengths = list_lengths(pc.list_flatten(rows["step_ids"]))
    return np.bincount(owners, weights=lengths, minlength=len(num_steps)).astype(np.int64)


TokenizedRow = Mapping[str, Any]
"""``prompt_ids`` (list of int), ``step_ids`` (list of lists of int) and ``answer_ids`` (list of int)."""


def chain_parts(row: TokenizedRow, *, separator_ids: Sequence[int]) -> list[list[int]]:
    """List the parts of a written chain of thought: each step with the separator instead of EOS, then the answer.

    >>> chain_parts({"step_ids": [[5, 6, 2], [7, 2]], "answer_ids": [8, 2]}, separator_ids=[3])
    [[5, 6, 3], [7, 3], [8, 2]]
    """
    return [*([*step[:-1], *separator_ids] for step in row["step_ids"]), row["answer_ids"]]


@dataclass(frozen=True)
class ReadoutCollator:
    """Collate tokenised rows into one right-padded batch, one sample per row.

    The batch is a :class:`rim_peft.sequence.Layout` as a dict, plus ``num_steps`` (B,), each sample's ``T``.

    Attributes:
        objective: defines the readouts of a row and the blocks before them.
        pad_id: padding token id.
        block_range: smallest and largest number of readouts, both included; each batch draws its own number. None: the
            objective's number.
        seed: seed of the draw.
    """

    objective: Objective
    pad_id: int
    block_range: Sequence[int] | None = None
    seed: int = 0

    def __call__(self, rows: Sequence[TokenizedRow]) -> dict[str, Tensor]:
        """Collate ``rows`` into tensors."""
        num_blocks = None if self.block_range is None else self._draw(rows, *self.block_range)
        objective = self.objective
        samples = [
            Sample(row["prompt_ids"], objective.readouts(row, num_blocks=num_blocks), objective.in_place(row))
            for row in rows
        ]
        layout = build_layout(samples, objective.blocks, pad_id=self.pad_id)
        return {**layout.to_dict(), "num_steps": torch.tensor([len(row["step_ids"]) for row in rows])}

    def _draw(self, rows: Sequence[TokenizedRow], least: int, most: int) -> int:
        """Draw a batch's number of blocks; the draw depends on the batch's content, so a resumed run repeats it."""
        digest = hashlib.blake2b(digest_size=8)
        for row in rows:
            digest.update(repr(list(row["prompt_ids"])).encode())
        return random.Random(f"{self.seed} {digest.hexdigest()}").randint(least, most)
