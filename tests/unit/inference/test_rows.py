"""Where answers have their room, and the order in which decoding computes places, by hand."""

import torch

from rim_peft.inference.passes import lay_out_answers
from rim_peft.sequence import BlockTokens

BLOCKS = BlockTokens(begin=90, memory=91, end=92, block_size=1)


def test_room_after_every_block() -> None:
    rows = lay_out_answers([[5, 6], [7]], BLOCKS, num_blocks=2, every_block=True, max_new_tokens=3, pad_id=0)
    assert rows.layout.input_ids.tolist() == [
        [5, 6, 90, 91, 92, 0, 0, 90, 91, 92, 0, 0],
        [0, 7, 90, 91, 92, 0, 0, 90, 91, 92, 0, 0],
    ]
    assert rows.layout.position_ids.tolist()[1] == [0, 0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert rows.ends.tolist() == [4, 9]
    assert rows.order.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 5, 10, 6, 11]
    assert rows.trunk.tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert rows.trunk_ids.tolist()[1] == [0, 7, 90, 91, 92, 90, 91, 92]
    assert [rows.answers(step).tolist() for step in (0, 1)] == [[5, 10], [6, 11]]
    assert rows.order[rows.end_columns].tolist() == rows.ends.tolist()


def test_room_after_the_last_block() -> None:
    rows = lay_out_answers([[5, 6], [7]], BLOCKS, num_blocks=2, every_block=False, max_new_tokens=3, pad_id=0)
    assert rows.layout.input_ids.tolist()[1] == [0, 7, 90, 91, 92, 90, 91, 92, 0, 0]
    assert rows.layout.position_ids.tolist()[1] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert rows.layout.attention_mask.tolist()[1] == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert (rows.ends.tolist(), rows.end_columns.tolist()) == ([7], [7])
    assert rows.order.tolist() == list(range(10))


def test_without_blocks_the_answer_follows_the_prompt() -> None:
    rows = lay_out_answers([[5, 6]], BLOCKS, num_blocks=0, every_block=False, max_new_tokens=1, pad_id=0)
    assert rows.layout.input_ids.tolist() == [[5, 6]]
    assert (rows.ends.tolist(), rows.num_steps, rows.trunk.tolist()) == ([1], 0, [0, 1])


def test_prompts_are_padded_to_a_multiple() -> None:
    rows = lay_out_answers(
        [[5, 6, 7]], BLOCKS, num_blocks=1, every_block=True, max_new_tokens=2, pad_id=0, prompt_multiple=4
    )
    assert rows.layout.input_ids.tolist() == [[0, 5, 6, 7, 90, 91, 92, 0]]
    assert rows.ends.tolist() == [6]
    assert len(rows.trunk) == 7


def test_selected_rows_keep_their_places() -> None:
    rows = lay_out_answers([[5, 6], [7]], BLOCKS, num_blocks=1, every_block=True, max_new_tokens=2, pad_id=0)
    left = rows.select(torch.tensor([1]))
    assert left.layout.input_ids.tolist() == [[0, 7, 90, 91, 92, 0]]
    assert left.order.tolist() == rows.order.tolist()
