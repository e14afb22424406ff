"""Pure functions for the loss over a batch's readouts, the weight of each readout, and the logged sums.

Source: arXiv 2605.30343; ``hold``, trailing blocks and the curriculum by length are this package's own
(``docs/stages.md``). Coconut has stages instead of weights: arXiv 2412.06769.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rim_peft.sequence import Labels

SCHEDULES = ("relative", "linear", "uniform")


def grounding_weights(
    num_steps: Tensor, num_blocks: Tensor, *, progress: float, schedule: str = "relative", hold: float = 0.0
) -> Tensor:
    """Return the weight of every block's readout at one point of stage 1.

    With ``T`` steps, the weight of step ``t`` of the chain at training step ``s`` of ``S`` is:

    * ``relative``: ``max(0, 1 - s / (S · t/T))``, so early blocks fade first and the answer last;
    * ``linear``: ``t / T`` throughout;
    * ``uniform``: 1 throughout.

    A sample with more blocks than steps has *trailing* blocks: every block from ``T`` on reads out the answer and
    has ``1 / (K - T + 1)`` of the answer's weight.

    >>> grounding_weights(torch.tensor([2, 4]), torch.tensor([4, 4]), progress=0.25)
    tensor([[0.5000, 0.2500, 0.2500, 0.2500],
            [0.0000, 0.5000, 0.6667, 0.7500]])

    Args:
        num_steps: (B,) int, each sample's ``T``, at least 1.
        num_blocks: (B,) int, each sample's ``K``, at least its ``T``.
        progress: ``s / S``, in [0, 1].
        schedule: one of ``SCHEDULES``.
        hold: share of the stage, in [0, 1), during which ``relative`` stays at 1 before it falls over the rest.

    Returns:
        (B, largest K) float32; 0 for blocks that a sample does not have.
    """
    block = torch.arange(1, int(num_blocks.max()) + 1, device=num_steps.device)
    steps, blocks = num_steps[:, None], num_blocks[:, None]
    share_of_chain = torch.minimum(block, steps) / steps
    if schedule == "relative":
        fallen = max(0.0, progress - hold) / (1.0 - hold)
        weight = (1.0 - fallen / share_of_chain).clamp(min=0.0)
    elif schedule == "linear":
        weight = share_of_chain
    elif schedule == "uniform":
        weight = torch.ones_like(share_of_chain)
    else:
        raise ValueError(f"schedule: must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    trailing_share = torch.where(block >= steps, 1.0 / (blocks - steps + 1), 1.0)
    return torch.where(block <= blocks, weight * trailing_share, 0.0)


def refinement_weights(num_blocks: int) -> Tensor:
    """Return stage 2's weights, ``alpha_k = 2k / (K (K + 1))``: later blocks count more, and they sum to 1.

    >>> refinement_weights(3)
    tensor([0.1667, 0.3333, 0.5000])

    Args:
        num_blocks: ``K``.

    Returns:
        (K,) float32.
    """
    block = torch.arange(1, num_blocks + 1)
    return 2.0 * block / (num_blocks * (num_blocks + 1))


def phase_at(progress: float, shares: Sequence[float]) -> int:
    """Return the phase of a curriculum at one point: phase ``k`` lasts ``shares[k]`` of the training.

    >>> [phase_at(step / 6, [1 / 3] * 3) for step in range(7)]
    [0, 0, 1, 1, 2, 2, 2]
    >>> [phase_at(step / 6, [0.5, 0.0, 0.5]) for step in range(7)]
    [0, 0, 0, 2, 2, 2, 2]

    Args:
        progress: share of the training that is done, in [0, 1].
        shares: one for each phase, from phase 0; they sum to 1.
    """
    ends = list(accumulate(shares))[:-1]
    return sum(end <= progress + 1e-9 for end in ends)  # a sum of shares may exceed its step by a rounding error


def label_weights(block_weights: Tensor, labels: Labels, *, in_place: float = 1.0) -> Tensor:
    """Return the weight of every label, which is its readout's weight.

    Args:
        block_weights: (D, K) weight of each sample's readouts.
        labels: the batch's N labels.
        in_place: weight of the labels that memory tokens predict.

    Returns:
        (N,) in the weights' dtype.
    """
    weights = block_weights[labels.documents, labels.blocks - 1]
    return weights.masked_fill(labels.in_place, in_place)


def readout_loss(log_probs: Tensor, weights: Tensor, *, num_samples: int | Tensor) -> Tensor:
    """Return ``L = - sum_k weight_k · log p(readout_k | x, m_<=k)``, the mean over samples, in nats per sample.

    Both stages use it: ``L1`` with weights ``lambda_t(s)``, ``L2`` with ``alpha_k``.

    Args:
        log_probs: (N,) log-probability of each label.
        weights: (N,) weight of each label.
        num_samples: samples in the whole optimiser step: D, or more with gradient accumulation.

    Source: arXiv 2605.30343.
    """
    return -(weights * log_probs).sum() / num_samples


def block_sums(log_probs: Tensor, is_top1: Tensor, blocks: Tensor, *, num_blocks: int) -> Tensor:
    """Sum a batch's negative log-likelihood, correct tokens and tokens by block.

    Args:
        log_probs: (N,) log-probability of each label.
        is_top1: (N,) whether the label was the most likely token.
        blocks: (N,) the number of each label's readout, from 1.
        num_blocks: K.

    Returns:
        (3, K) float32: the sums, so that ``[0] / [2]`` is the loss per token and ``[1] / [2]`` the token accuracy.
    """
    values = torch.stack([-log_probs.detach().float(), is_top1.float(), torch.ones_like(log_probs.detach()).float()])
    return values.new_zeros(3, num_blocks).index_add_(1, blocks - 1, values)
