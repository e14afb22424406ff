"""The interleaved row, against rows written by hand."""

from unittest import mock

import pytest
import torch

from rim_peft.sequence import IGNORE_INDEX as X
from rim_peft.sequence import BlockTokens, Layout, Sample, build_layout, keep_readouts, pack_rows, packing

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
    "document_ids": [0] * 18,
    "shift_labels": [X, X, X, X, X, X, 10, 11, X, X, X, X, X, X, X, X, 12, X],
}
SECOND = {
    "input_ids": [4, 90, 91, 91, 92, 20],
    "attention_mask": [1] * 6,
    "position_ids": [0, 1, 2, 3, 4, 5],
    "segment_ids": [0, 0, 0, 0, 0, 1],
    "document_ids": [1] * 6,
    "shift_labels": [X, X, X, X, 20, X],
}
PADDING = {
    "input_ids": 0,
    "attention_mask": 0,
    "position_ids": 0,
    "segment_ids": 0,
    "document_ids": -1,
    "shift_labels": X,
}


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_rows_by_hand(padding_side: str) -> None:
    layout = build_layout(SAMPLES, BLOCKS, pad_id=0, padding_side=padding_side)
    for name, first in FIRST.items():
        gap = [PADDING[name]] * (18 - 6)
        second = SECOND[name] + gap if padding_side == "right" else gap + SECOND[name]
        torch.testing.assert_close(getattr(layout, name), torch.tensor([first, second]), msg=name)
    start = 18 if padding_side == "right" else 30
    torch.testing.assert_close(layout.block_ends, torch.tensor([[6, 12, 16], [start + 4, -1, -1]]))


def test_labels_know_their_sample_and_readout() -> None:
    labels = build_layout(SAMPLES, BLOCKS, pad_id=0).labels()
    torch.testing.assert_close(labels.places, torch.tensor([6, 7, 16, 18 + 4]))
    torch.testing.assert_close(labels.token_ids, torch.tensor([10, 11, 12, 20]))
    torch.testing.assert_close(labels.documents, torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(labels.blocks, torch.tensor([1, 1, 3, 1]))


def test_packed_rows_by_hand() -> None:
    samples = [*SAMPLES, Sample(prompt=[5], readouts=[[]]), Sample(prompt=[6, 7], readouts=[[30, 31]])]
    packed = pack_rows(build_layout(samples, BLOCKS, pad_id=0), 20, multiple_of=4)
    # 18, 6, 5 and 8 tokens: the first alone, the others in their order, both rows padded to a multiple of four.
    third = {"input_ids": [5, 90, 91, 91, 92], "position_ids": [0, 1, 2, 3, 4], "document_ids": [2] * 5}
    third |= {"attention_mask": [1] * 5, "segment_ids": [0] * 5, "shift_labels": [X] * 5}
    fourth = {"input_ids": [6, 7, 90, 91, 91, 92, 30, 31], "position_ids": [*range(8)], "document_ids": [3] * 8}
    fourth |= {"attention_mask": [1] * 8, "segment_ids": [0] * 6 + [1] * 2, "shift_labels": [X] * 5 + [30, 31, X]}
    for name, first in FIRST.items():
        second = SECOND[name] + third[name] + fourth[name]
        expected = [first + [PADDING[name]] * 2, [*second, PADDING[name]]]
        torch.testing.assert_close(getattr(packed, name), torch.tensor(expected), msg=name)
    ends = [[6, 12, 16], [20 + 4, -1, -1], [20 + 10, -1, -1], [20 + 16, -1, -1]]
    torch.testing.assert_close(packed.block_ends, torch.tensor(ends))


def test_packing_keeps_every_token_once_and_rows_short() -> None:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (50,), generator=random).tolist()
    layout = build_layout([Sample([1] * n, [[2] * (n % 5)] * (n % 4)) for n in lengths], BLOCKS, pad_id=0)
    for row_length in (1, 64, 200, 10_000):
        packed = pack_rows(layout, row_length)
        longest = int(layout.attention_mask.sum(1).max())
        assert packed.input_ids.shape[1] <= max(row_length, longest)
        assert packed.attention_mask.sum() == layout.attention_mask.sum()
        for document in range(50):
            for name in FIRST:
                values = getattr(packed, name)[packed.document_ids == document]
                torch.testing.assert_close(values, getattr(layout, name)[layout.document_ids == document], msg=name)
        labels, expected = packed.labels(), layout.labels()
        order = torch.argsort(labels.documents, stable=True)
        for name in ("token_ids", "documents", "blocks"):
            torch.testing.assert_close(getattr(labels, name)[order], getattr(expected, name), msg=name)
        ends = packed.block_ends[packed.block_ends >= 0]
        assert (packed.input_ids.flatten()[ends] == BLOCKS.end).all()


def test_many_documents_that_hardly_fit_are_packed_soon() -> None:
    """Tried one by one, hundreds of numbers of rows would take seconds; counted, not timed."""
    layout = build_layout([Sample([1] * (130 + n % 70), []) for n in range(300)], BLOCKS, pad_id=0)
    with mock.patch("rim_peft.sequence.packing._spread", wraps=packing._spread) as spread:
        packed = pack_rows(layout, 256)
    assert packed.attention_mask.sum() == layout.attention_mask.sum()
    assert spread.call_count < 20


def test_packed_rows_have_little_padding() -> None:
    layout = build_layout([Sample([1] * n, []) for n in range(20, 120)], BLOCKS, pad_id=0)
    packed = pack_rows(layout, 512)
    assert packed.attention_mask.float().mean() > 0.97
    assert layout.attention_mask.float().mean() < 0.7


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
        Sample([4], [[20]]),  # nothing is read behind the second block
        Sample([5, 6], [[], [], []]),
    ]
    pruned = keep_readouts(build_layout(samples, BLOCKS, pad_id=0, padding_side=padding_side), keep)
    expected = build_layout(kept, BLOCKS, pad_id=0)
    for name in ("attention_mask", "position_ids", "segment_ids", "document_ids", "shift_labels", "block_ends"):
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
