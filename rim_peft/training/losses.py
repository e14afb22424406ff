"""The loss over all readouts of a batch, and its parts by block, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from rim_peft.sequence import Labels


def label_weights(block_weights: Tensor, labels: Labels) -> Tensor:
    """Give every label the weight of the readout it belongs to.

    Args:
        block_weights: (D, K) weight of each sample's readouts.
        labels: the batch's N labels.

    Returns:
        (N,) in the weights' dtype.
    """
    return block_weights[labels.documents, labels.blocks - 1]


def readout_loss(log_probs: Tensor, weights: Tensor, *, num_samples: int | Tensor) -> Tensor:
    """Return ``L = - sum_k weight_k · log p(readout_k | x, m_<=k)``, the mean over samples, in nats per sample.

    Both stages share it: ``L1`` with ``lambda_t(s)`` as weights, ``L2`` with ``alpha_k``.

    Args:
        log_probs: (N,) log-probability of each label.
        weights: (N,) weight of each label.
        num_samples: samples of the whole optimiser step: D, or more with gradient accumulation.

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
