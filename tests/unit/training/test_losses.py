"""Losses against sums worked out by hand."""

import torch

from rim_peft.training.losses import block_sums, readout_loss, token_weights

LABEL_BLOCKS = torch.tensor([[0, 1, 1, 0, 2], [0, 0, 1, 0, 0]])
LOG_PROBS = torch.tensor([[0.0, -1.0, -2.0, 0.0, -4.0], [0.0, 0.0, -8.0, 0.0, 0.0]])


def test_every_label_gets_its_readouts_weight() -> None:
    weights = token_weights(torch.tensor([[0.5, 0.25], [1.0, 0.0]]), LABEL_BLOCKS)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.25], [0.0, 0.0, 1.0, 0.0, 0.0]]))


def test_the_loss_is_the_weighted_sum_over_readouts_per_sample() -> None:
    weights = token_weights(torch.tensor([[0.5, 0.25], [1.0, 0.0]]), LABEL_BLOCKS)
    # (0.5 · (1 + 2) + 0.25 · 4 + 1 · 8) / 2 samples
    torch.testing.assert_close(readout_loss(LOG_PROBS, weights, num_samples=2), torch.tensor(5.25))


def test_sums_by_block() -> None:
    is_top1 = torch.tensor([[False, True, False, False, True], [False, False, True, False, False]])
    sums = block_sums(LOG_PROBS, is_top1, LABEL_BLOCKS, num_blocks=3)
    torch.testing.assert_close(sums, torch.tensor([[11.0, 4.0, 0.0], [2.0, 1.0, 0.0], [3.0, 1.0, 0.0]]))
