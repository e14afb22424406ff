"""Losses against sums worked out by hand."""

import pytest
import torch

from rim_peft.sequence import Labels
from rim_peft.training.losses import block_sums, grounding_weights, label_weights, readout_loss, refinement_weights

BLOCKS = torch.tensor([1, 1, 2, 1])
LABELS = Labels(
    torch.arange(4),
    torch.arange(4),
    documents=torch.tensor([0, 0, 0, 1]),
    blocks=BLOCKS,
    in_place=torch.zeros(4, dtype=torch.bool),
)
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


def _weights(num_steps: int, num_blocks: int, **options: object) -> list[float]:
    return grounding_weights(torch.tensor([num_steps]), torch.tensor([num_blocks]), **options)[0].tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        # max(0, 1 - s / (S t/T)) with T = 4: the denominators are 1/4, 1/2, 3/4 and 1.
        (0.0, [1.0, 1.0, 1.0, 1.0]),
        (0.125, [0.5, 0.75, 5 / 6, 0.875]),
        (0.5, [0.0, 0.0, 1 / 3, 0.5]),
        (1.0, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_relative_falls_early_blocks_first(progress: float, expected: list[float]) -> None:
    assert _weights(4, 4, progress=progress) == pytest.approx(expected)


@pytest.mark.parametrize(("progress", "expected"), [(0.59, [1.0, 1.0]), (0.7, [0.5, 0.75]), (0.9, [0.0, 0.25])])
def test_hold_keeps_every_weight_then_falls_over_the_rest(progress: float, expected: list[float]) -> None:
    assert _weights(2, 2, progress=progress, hold=0.6) == pytest.approx(expected)


def test_linear_and_uniform_do_not_move() -> None:
    for progress in (0.0, 0.9):
        assert _weights(4, 4, progress=progress, schedule="linear") == pytest.approx([0.25, 0.5, 0.75, 1.0])
        assert _weights(4, 4, progress=progress, schedule="uniform") == [1.0] * 4


def test_trailing_blocks_share_the_answers_weight() -> None:
    # T = 2, K = 4: blocks 2, 3 and 4 read out the answer with a third of its weight each.
    assert _weights(2, 4, progress=0.0) == pytest.approx([1.0, 1 / 3, 1 / 3, 1 / 3])
    assert _weights(2, 4, progress=0.25) == pytest.approx([0.5, 0.25, 0.25, 0.25])


def test_samples_with_fewer_blocks_weigh_nothing_beyond_them() -> None:
    weights = grounding_weights(torch.tensor([1, 3]), torch.tensor([1, 3]), progress=0.5)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.25, 0.5]]))


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule: must be one of relative, linear, uniform, got 'cosine'"):
        _weights(1, 1, progress=0.0, schedule="cosine")


@pytest.mark.parametrize(("num_blocks", "expected"), [(1, [1.0]), (2, [1 / 3, 2 / 3]), (4, [0.1, 0.2, 0.3, 0.4])])
def test_refinement_weights(num_blocks: int, expected: list[float]) -> None:
    assert refinement_weights(num_blocks).tolist() == pytest.approx(expected)
