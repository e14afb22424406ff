"""What blocks' states look like in two dimensions: by block, and as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rim_peft.inference.decoding import check_number


class BlockStates(Protocol):
    """What is read of :class:`~rim_peft.evaluation.readouts.BlockReadouts`."""

    @property
    def states(self) -> Tensor:
        """(N, K, H) the last layer's states at the blocks' ends."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """(N, K) whether a block's readout is right."""

    @property
    def lengths(self) -> list[int | None]:
        """N numbers of reasoning steps, None where a row has none."""


class _Projection(NamedTuple):
    """The two directions, (2, H), in which states spread the most around their (H,) mean, and the shares they take."""

    mean: Tensor
    directions: Tensor
    explained_variance: list[float]

    def points(self, states: Tensor) -> list[list[float]]:
        """Return [x, y] of (R, H) states, rounded to 6 digits."""
        found = (states.detach().cpu().double() - self.mean) @ self.directions.T
        return [[round(value, 6) for value in point] for point in found.tolist()]


def block_components(readouts: BlockStates, *, max_points: int = 400) -> dict[str, Any]:
    """Project the states at all blocks' ends on their first two principal components.

    Args:
        readouts: states, verdicts and lengths of N questions with K blocks.
        max_points: points returned at most; questions are left out evenly, whole ones. The components are of all.

    Returns:
        ``explained_variance``, the share of the variance along x and y, and ``points``, question after question, with
        ``block`` (from 1), ``length``, ``right``, ``x`` and ``y``.

    Raises:
        ValueError: there are no states, some are not finite, or ``max_points`` is lower than K.
    """
    states = readouts.states
    projection = _fit([states])
    num_questions, num_blocks = states.shape[:2]
    check_number("max_points", max_points, least=num_blocks)
    shown = min(num_questions, max_points // num_blocks)
    points = []
    for index in (number * num_questions // shown for number in range(shown)):
        for block, (x, y) in enumerate(projection.points(states[index]), start=1):
            right = bool(readouts.right[index, block - 1])
            points.append({"block": block, "length": readouts.lengths[index], "right": right, "x": x, "y": y})
    return {"explained_variance": projection.explained_variance, "points": points}


def training_components(checkpoints: Sequence[tuple[str, int, Tensor]]) -> dict[str, Any]:
    """Show where each block's mean state goes in the course of training, in one projection of all checkpoints' states.

    Args:
        checkpoints: stage, step and (N, K, H) states of each; all of the same H.

    Returns:
        ``explained_variance``, the share of the variance of single states along x and y, and ``points``, checkpoint
        after checkpoint, with ``step``, ``stage``, ``block`` (from 1), ``x`` and ``y``.

    Raises:
        ValueError: there are no states, they differ in H, or some are not finite.
    """
    projection = _fit([states for _, _, states in checkpoints])
    points = []
    for stage, step, states in checkpoints:
        for block, (x, y) in enumerate(projection.points(states.double().mean(0)), start=1):
            points.append({"step": step, "stage": stage, "block": block, "x": x, "y": y})
    return {"explained_variance": projection.explained_variance, "points": points}


def _fit(parts: Sequence[Tensor]) -> _Projection:
    """Fit two principal components to all states of (N, K, H) tensors.

    The sign of a component is free: here its entry of the largest size is positive.
    """
    shapes = [tuple(part.shape) for part in parts]
    if not shapes or any(len(shape) != 3 or 0 in shape for shape in shapes) or len({s[-1] for s in shapes}) > 1:
        raise ValueError(f"states: must be (N, K, H), at least one of each and of one H, got shapes {shapes}.")
    states = torch.cat([part.detach().cpu().flatten(0, 1).double() for part in parts])
    if not bool(states.isfinite().all()):
        raise ValueError("states: must be finite, got infinite ones or NaN. Check the adapter's training.")
    mean = states.mean(0)
    _, sizes, directions = torch.linalg.svd(states - mean, full_matrices=False)
    variances = sizes.square()
    total = float(variances.sum())
    shares = [round(float(variance) / total, 6) if total > 0 else 0.0 for variance in variances[:2]]
    # One state, or states of one dimension, have no second component: y is 0.
    kept = torch.zeros(2, states.shape[1], dtype=states.dtype)
    kept[: len(shares)] = directions[:2]
    largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
    return _Projection(mean, torch.where(largest < 0, -kept, kept), [*shares, 0.0][:2])
