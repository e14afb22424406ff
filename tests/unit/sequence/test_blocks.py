"""Edits of masks, against masks written by hand."""

import pytest
import torch
from torch import Tensor

from rim_peft.sequence.masks import causal_mask, hide_memory, join_blocks, number_blocks

#        x  b   m   e  y   b   m   e
IDS = [[5, 90, 91, 92, 6, 90, 91, 92]]
NUMBERS = torch.tensor([[0, 2, 2, 2, 0, 3, 3, 3]])
HIDDEN = """
x.......
xx......
x.x.....
x..x....
x...x...
x...xx..
x...x.x.
x...x..x
"""
JOINED = """
x.......
xxxx....
xxxx....
xxxx....
xxxxx...
xxxxxxxx
xxxxxxxx
xxxxxxxx
"""


def drawn(picture: str) -> Tensor:
    return torch.tensor([[mark == "x" for mark in line] for line in picture.split()])


def test_tokens_of_a_block_share_a_number() -> None:
    assert torch.equal(number_blocks(torch.tensor(IDS), 90), NUMBERS)
    assert number_blocks(torch.tensor([[1, 2, 90], [90, 91, 90]]), 90).tolist() == [[0, 0, 2], [2, 2, 3]]
    assert number_blocks(torch.tensor([[91, 92, 90]]), 90).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("cut", range(9))
def test_numbers_go_on_behind_a_cache(cut: int) -> None:
    before = number_blocks(torch.tensor(IDS)[:, :cut], 90)
    after = number_blocks(torch.tensor(IDS)[:, cut:], 90, before=before)
    assert torch.equal(torch.cat([before, after], 1), NUMBERS)


@pytest.mark.parametrize(("edit", "picture"), [(hide_memory, HIDDEN), (join_blocks, JOINED)])
@pytest.mark.parametrize("num_queries", [1, 3, 4, 8])
def test_edits_of_bool_and_of_additive_masks(edit: object, picture: str, num_queries: int) -> None:
    assert callable(edit)
    mask = causal_mask(NUMBERS, num_queries)
    expected = drawn(picture)[-num_queries:]
    assert torch.equal(edit(mask, NUMBERS)[0, 0], expected)
    lowest = torch.finfo(torch.bfloat16).min
    additive = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, lowest)
    found = edit(additive, NUMBERS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0, 0], torch.where(expected, 0.0, lowest).to(torch.bfloat16))
    assert torch.equal(additive == 0, mask)  # the given mask stays as it is


def test_what_is_hidden_stays_hidden() -> None:
    """Neither edit shows a token of another row or of the padding."""
    mask = causal_mask(NUMBERS, 8).expand(2, 1, 8, 8).clone()
    mask[1, :, :, 0] = False  # padding
    numbers = NUMBERS.expand(2, -1)
    for edit in (hide_memory, join_blocks):
        found = edit(mask, numbers)
        assert not found[1, 0, 1:, 0].any()
        assert torch.equal(found[0], edit(mask[:1], NUMBERS)[0])


def test_rows_of_a_mask_that_serves_all_rows() -> None:
    numbers = torch.tensor([[0, 2, 2], [2, 2, 0]])
    found = join_blocks(causal_mask(numbers, 3), numbers)
    assert found.shape == (2, 1, 3, 3)
    assert found[0, 0].tolist() == [[True, False, False], [True, True, True], [True, True, True]]
    assert found[1, 0].tolist() == [[True, True, False], [True, True, False], [True, True, True]]
