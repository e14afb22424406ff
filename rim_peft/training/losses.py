"""The loss over all readouts of a batch, and its parts by block, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(block_weights: Tensor, label_blocks: Tensor) -> Tensor:
    """Give every label the weight of the readout it belongs to.

    Args:
        block_weights: (B, K) weight of each readout.
        label_blocks: (B, S) int64, the readout number of each label, 0 for none
            (:attr:`rim_peft.sequence.Layout.label_blocks`).

    Returns:
        (B, S) in the weights' dtype, 0 where there is no label.
    """
    no_label = block_weights.new_zeros(len(block_weights), 1)
    return torch.cat([no_label, block_weights], dim=1).gather(1, label_blocks)


def readout_loss(log_probs: Tensor, weights: Tensor, *, num_samples: int | Tensor) -> Tensor:
    """Return ``L = - sum_k weight_k · log p(readout_k | x, m_<=k)``, the mean over samples, in nats per sample.

    Both stages share it: ``L1`` with ``lambda_t(s)`` as weights, ``L2`` with ``alpha_k``.

    Args:
        log_probs: (B, S) log-probability of each label, 0 where there is none.
        weights: (B, S) weight of each label.
        num_samples: samples of the whole optimiser step: B, or more with gradient accumulation.

    Source: arXiv 2605.30343.
    """
    return -(weights * log_probs).sum() / num_samples


def block_sums(log_probs: Tensor, is_top1: Tensor, label_blocks: Tensor, *, num_blocks: int) -> Tensor:
    """Sum a batch's negative log-likelihood, correct tokens and tokens by block.

    Args:
        log_probs: (B, S) log-probability of each label.
        is_top1: (B, S) whether the label was the most likely token.
        label_blocks: (B, S) readout number of each label, 0 for none.
        num_blocks: K.

    Returns:
        (3, K) float32: the sums, so that ``[0] / [2]`` is the loss per token and ``[1] / [2]`` the token accuracy.
    """
    sums = log_probs.new_zeros(3, num_blocks + 1, dtype=torch.float32)
    values = torch.stack([-log_probs.detach().float(), is_top1.float(), torch.ones_like(log_probs.detach()).float()])
    sums.scatter_add_(1, label_blocks.reshape(1, -1).expand(3, -1), values.flatten(1))
    return sums[:, 1:]
