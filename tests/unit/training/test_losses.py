"""Losses against sums worked out by hand."""

import torch

from rim_peft.sequence import Labels
from rim_peft.training.losses import block_sums, label_weights, readout_loss

BLOCKS = torch.tensor([1, 1, 2, 1])
LABELS = Labels(torch.arange(4), torch.arange(4), documents=torch.tensor([0, 0, 0, 1]), blocks=BLOCKS)
WEIGHTS = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
LOG_PROBS = torch.tensor([-1.0, -2.0, -4.0, -8.0])


def test_every_label_gets_its_readouts_weight() -> None:
    torch.testing.assert_close(label_weights(WEIGHTS, LABELS), torch.tensor([0.5, 0.5, 0.25, 1.0]))


def test_the_loss_is_the_weighted_sum_over_readouts_per_sample() -> None:
    # (0.5 · (1 + 2) + 0.25 · 4 + 1 · 8) / 2 samples
    weights = label_weights(WEIGHTS, LABELS)
    torch.testing.assert_close(readout_loss(LOG_PROBS, weights, num_samples=2), torch.tensor(5.25))


def test_sums_by_block() -> None:
    sums = block_sums(LOG_PROBS, torch.tensor([True, False, True, True]), BLOCKS, num_blocks=3)
    torch.testing.assert_close(sums, torch.tensor([[11.0, 4.0, 0.0], [2.0, 1.0, 0.0], [3.0, 1.0, 0.0]]))
