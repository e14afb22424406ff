"""The interleaved row, against rows written by hand."""

import pytest
import torch

from rim_peft.sequence import IGNORE_INDEX as X
from rim_peft.sequence import BlockTokens, Layout, Sample, build_layout, keep_readouts

BLOCKS = BlockTokens(begin=90, memory=91, end=92, block_size=2)
# Two samples that differ in prompt length, number of blocks and readout lengths; the first's block 2 reads nothing out.
SAMPLES = [
    Sample(prompt=[1, 2, 3], readouts=[[10, 11], [], [12]]),
    Sample(prompt=[4], readouts=[[20]]),
]
FIRST = {
    "input_ids": [1, 2, 3, 90, 91, 91, 92, 10, 11, 90, 91, 91, 92, 90, 91, 91, 92, 12],
    "attention_mask": [1] * 18,
    "position_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    "segment_ids": [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 3],
    "shift_labels": [X, X, X, X, X, X, 10, 11, X, X, X, X, X, X, X, X, 12, X],
}
SECOND = {
    "input_ids": [4, 90, 91, 91, 92, 20],
    "attention_mask": [1] * 6,
    "position_ids": [0, 1, 2, 3, 4, 5],
    "segment_ids": [0, 0, 0, 0, 0, 1],
    "shift_labels": [X, X, X, X, 20, X],
}
PADDING = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "segment_ids": 0, "shift_labels": X}


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_rows_by_hand(padding_side: str) -> None:
    layout = build_layout(SAMPLES, BLOCKS, pad_id=0, padding_side=padding_side)
    for name, first in FIRST.items():
        gap = [PADDING[name]] * (18 - 6)
        second = SECOND[name] + gap if padding_side == "right" else gap + SECOND[name]
        torch.testing.assert_close(getattr(layout, name), torch.tensor([first, second]), msg=name)
    start = 0 if padding_side == "right" else 12
    torch.testing.assert_close(layout.block_ends, torch.tensor([[6, 12, 16], [start + 4, -1, -1]]))


def test_label_blocks_name_the_readout_a_label_belongs_to() -> None:
    layout = build_layout(SAMPLES, BLOCKS, pad_id=0)
    expected = torch.zeros(2, 18, dtype=torch.long)
    expected[0, 6] = expected[0, 7] = 1
    expected[0, 16] = 3
    expected[1, 4] = 1
    torch.testing.assert_close(layout.label_blocks, expected)


def test_a_bare_trunk_is_prompt_and_blocks() -> None:
    layout = build_layout([Sample([1, 2], [[], []])], BLOCKS, pad_id=0)
    assert layout.input_ids.tolist() == [[1, 2, 90, 91, 91, 92, 90, 91, 91, 92]]
    assert layout.position_ids.tolist() == [list(range(10))]
    assert (layout.shift_labels == X).all()


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_dropping_readouts_equals_never_having_laid_them_out(padding_side: str) -> None:
    samples = [
        Sample([1, 2, 3], [[10, 11], [13], [12]]),
        Sample([4], [[20], [21, 22]]),
        Sample([5, 6], [[30], [31], [32]]),
    ]
    keep = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    kept = [
        Sample([1, 2, 3], [[], [13], [12]]),
        Sample([4], [[20], []]),
        Sample([5, 6], [[], [], []]),
    ]
    pruned = keep_readouts(build_layout(samples, BLOCKS, pad_id=0, padding_side=padding_side), keep)
    expected = build_layout(kept, BLOCKS, pad_id=0)
    for name in ("attention_mask", "position_ids", "segment_ids", "shift_labels", "block_ends", "label_blocks"):
        torch.testing.assert_close(getattr(pruned, name), getattr(expected, name), msg=name)
    real = expected.attention_mask.bool()  # what stands under padding is never read
    torch.testing.assert_close(pruned.input_ids[real], expected.input_ids[real])


def test_a_layout_survives_the_way_through_a_batch_dict() -> None:
    layout = build_layout(SAMPLES, BLOCKS, pad_id=0)
    again = Layout(**layout.to_dict())
    torch.testing.assert_close(again.to_dict(), layout.to_dict())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="prompt: a sample needs at least one"):
        build_layout([Sample([], [[1]])], BLOCKS, pad_id=0)
    with pytest.raises(ValueError, match="samples: at least one"):
        build_layout([], BLOCKS, pad_id=0)
    with pytest.raises(ValueError, match="padding_side: must be 'left' or 'right', got 'top'"):
        build_layout(SAMPLES, BLOCKS, pad_id=0, padding_side="top")
