"""What a block's readout says, and one answer from several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Blocks = NDArray[np.int64]
"""(N,) for each question the index of the block, from 0, whose readout is the answer."""


def select_final(num_questions: int, num_blocks: int) -> Blocks:
    """Choose the last block: RiM's own answer."""
    return np.full(num_questions, num_blocks - 1)


def select_by_vote(answers: Sequence[Sequence[str | None]]) -> Blocks:
    """Choose the answer that most blocks give, from the last block that gives it.

    Readouts that give no answer don't vote; where none does, the last block is chosen. Of answers with equally many
    votes the one that the later block gives wins, since later blocks are trained to be surer.

    >>> select_by_vote([["1", "2", "2", "3"], ["1", "2", None, "3"], [None, None]]).tolist()
    [2, 3, 1]
    """
    return np.array([_vote(row) for row in answers], dtype=np.int64)


def _vote(answers: Sequence[str | None]) -> int:
    voting = [(answers.count(answer), block) for block, answer in enumerate(answers) if answer is not None]
    return max(voting)[1] if voting else len(answers) - 1


def select_by_confidence(log_probs: ArrayLike) -> Blocks:
    """Choose the block that is surest of its readout: with the largest (N, K) log-probability, the later of equals.

    A readout's log-probability is the sum over its tokens, so that a longer answer is not preferred for its length.

    >>> select_by_confidence([[-0.5, -0.1, -0.3], [-0.2, -0.2, -0.9]]).tolist()
    [1, 1]
    """
    return _last_largest(np.asarray(log_probs))


def select_by_score(scores: ArrayLike) -> Blocks:
    """Choose the block with the largest (N, K) score, such as a probe's, the later of equals."""
    return _last_largest(np.asarray(scores))


def _last_largest(values: NDArray[np.float64]) -> Blocks:
    reverse = values[:, ::-1].argmax(axis=1)
    return values.shape[1] - 1 - reverse


@dataclass(frozen=True)
class Readout:
    """What one block's readout says, decoded greedily.

    Attributes:
        block: the block's number, from 1.
        text: the readout as text, without EOS and surrounding space.
        token_ids: the readout's tokens, EOS included if it was reached.
        token_log_probs: natural logarithm of each token's probability.
        hidden_state: (H,) float32, the last layer's state at the block's end, which the head reads.
    """

    block: int
    text: str
    token_ids: list[int]
    token_log_probs: list[float]
    hidden_state: Tensor
