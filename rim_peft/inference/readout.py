"""Readouts of blocks, and how to choose one answer from several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Blocks = NDArray[np.int64]
"""(N,) for each question the index, from 0, of the block whose readout is the answer."""


def select_final(num_questions: int, num_blocks: int) -> Blocks:
    """Choose the last block: RiM's own answer."""
    return np.full(num_questions, num_blocks - 1)


def select_by_vote(answers: Sequence[Sequence[str | None]]) -> Blocks:
    """Choose the most frequent answer, at the last block that gives it.

    Blocks without an answer do not vote; if no block votes, the last block is chosen. In a tie the answer with the
    later block wins, since later blocks are trained to be more certain.

    >>> select_by_vote([["1", "2", "2", "3"], ["1", "2", None, "3"], [None, None]]).tolist()
    [2, 3, 1]
    """
    return np.array([_vote(row) for row in answers], dtype=np.int64)


def _vote(answers: Sequence[str | None]) -> int:
    voting = [(answers.count(answer), block) for block, answer in enumerate(answers) if answer is not None]
    return max(voting)[1] if voting else len(answers) - 1


def select_by_confidence(log_probs: ArrayLike) -> Blocks:
    """Choose the block with the largest (N, K) log-probability of its readout; the later one in a tie.

    A readout's log-probability is the sum over its tokens, so longer answers are not preferred.

    >>> select_by_confidence([[-0.5, -0.1, -0.3], [-0.2, -0.2, -0.9]]).tolist()
    [1, 1]
    """
    return _last_largest(np.asarray(log_probs))


def select_by_score(scores: ArrayLike) -> Blocks:
    """Choose the block with the largest (N, K) score, such as a probe's; the later one in a tie."""
    return _last_largest(np.asarray(scores))


def _last_largest(values: NDArray[np.float64]) -> Blocks:
    reverse = values[:, ::-1].argmax(axis=1)
    return values.shape[1] - 1 - reverse


@dataclass(frozen=True)
class Readout:
    """One block's readout, decoded greedily.

    Attributes:
        block: the block's number, from 1.
        text: the readout as text, without EOS and surrounding space.
        token_ids: the readout's tokens, EOS included if reached.
        token_log_probs: natural logarithm of each token's probability.
        hidden_state: (H,) float32, the last layer's state at the block's end, the input of the head.
    """

    block: int
    text: str
    token_ids: list[int]
    token_log_probs: list[float]
    hidden_state: Tensor
