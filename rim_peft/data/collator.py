"""Tokenised examples → one batch of interleaved rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rim_peft.sequence import BlockTokens, Sample, build_layout

TokenizedRow = Mapping[str, Any]
"""``prompt_ids`` (list of int), ``step_ids`` (list of lists of int) and ``answer_ids`` (list of int)."""


def grounding_readouts(row: TokenizedRow, *, num_blocks: int = 0) -> list[list[int]]:
    """List stage 1's readouts: after block ``t`` the next step ``r_{t+1}``, after block ``T`` the answer.

    >>> row = {"prompt_ids": [1], "step_ids": [[2], [3]], "answer_ids": [4]}
    >>> grounding_readouts(row)
    [[3], [4]]
    >>> grounding_readouts(row, num_blocks=4)
    [[3], [4], [4], [4]]

    Args:
        row: a tokenised example with ``T`` steps, at least one.
        num_blocks: with more blocks than steps, the trailing ones read out the answer too.
    """
    readouts = [*row["step_ids"][1:], row["answer_ids"]]
    return readouts + [row["answer_ids"]] * (num_blocks - len(readouts))


def refinement_readouts(row: TokenizedRow, *, num_blocks: int) -> list[list[int]]:
    """List stage 2's readouts: the answer after each of ``num_blocks`` blocks."""
    return [row["answer_ids"]] * num_blocks


def chain_parts(row: TokenizedRow, *, separator_ids: Sequence[int]) -> list[list[int]]:
    """List the parts of a written chain of thought: every step with a separator for its EOS, then the answer with EOS.

    >>> chain_parts({"step_ids": [[5, 6, 2], [7, 2]], "answer_ids": [8, 2]}, separator_ids=[3])
    [[5, 6, 3], [7, 3], [8, 2]]
    """
    return [*([*step[:-1], *separator_ids] for step in row["step_ids"]), row["answer_ids"]]


def count_tokens(row: TokenizedRow, readouts: Sequence[Sequence[int]], *, block_length: int) -> int:
    """Count the tokens of a laid out row: prompt, a block for each readout, and the readouts."""
    return len(row["prompt_ids"]) + sum(block_length + len(readout) for readout in readouts)


@dataclass(frozen=True)
class ReadoutCollator:
    """Lay tokenised rows out as one right-padded batch, a sample in each row.

    The batch is a :class:`rim_peft.sequence.Layout` as a dict, plus ``num_steps`` (B,), each sample's ``T``.

    Attributes:
        blocks: the adapter's block tokens.
        pad_id: id of padding.
        readouts: which readouts a row gets, one for each block; with ``num_blocks=K``, for that many blocks.
        block_range: the least and the most blocks that a batch may have, both included: each batch draws its own
            number from them. None: what ``readouts`` gives by itself.
        seed: seed of the draw.
    """

    blocks: BlockTokens
    pad_id: int
    readouts: Callable[..., list[list[int]]]
    block_range: tuple[int, int] | None = None
    seed: int = 0

    def count_tokens(self, row: TokenizedRow) -> int:
        """Count the tokens that a row takes at most, with all its readouts."""
        return count_tokens(row, self.readouts(row), block_length=self.blocks.length)

    def __call__(self, rows: Sequence[TokenizedRow]) -> dict[str, Tensor]:
        """Collate ``rows`` into tensors."""
        options = {} if self.block_range is None else {"num_blocks": self._draw(rows, *self.block_range)}
        samples = [Sample(row["prompt_ids"], self.readouts(row, **options)) for row in rows]
        layout = build_layout(samples, self.blocks, pad_id=self.pad_id)
        return {**layout.to_dict(), "num_steps": torch.tensor([len(row["step_ids"]) for row in rows])}

    def _draw(self, rows: Sequence[TokenizedRow], least: int, most: int) -> int:
        """Draw a batch's number of blocks from what is in it, so that a run that is resumed draws the same."""
        digest = hashlib.blake2b(digest_size=8)
        for row in rows:
            digest.update(repr(list(row["prompt_ids"])).encode())
        return random.Random(f"{self.seed} {digest.hexdigest()}").randint(least, most)
