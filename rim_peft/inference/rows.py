"""Rows of prompts, blocks and room for answers, and the order in which decoding computes their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rim_peft.sequence import BlockTokens, Layout, Sample, build_layout


@dataclass(frozen=True)
class AnswerRows:
    """A batch of B rows, laid out as in training but with room in place of R readouts of T tokens.

    Training computes a row at once, decoding first the trunk and then one token of every readout at a time. A prompt
    of one token, two blocks (``M = 1``) and three tokens each; the last token of a readout needs no room, since nothing
    follows it::

        places   x b m e . . b m e . .
                 0 1 2 3 4 5 6 7 8 9 10
        order    0 1 2 3 6 7 8, then 4 9, then 5 10

    So positions and masks are those of training, at other columns: column ``c`` of a cache holds place ``order[c]``.

    Attributes:
        layout: the (B, L) rows, padded on the left, so that all have the same places.
        ends: (R,) place of the block's end (without blocks, of the prompt's) before every readout.
        order: (L,) places in the order in which they are computed.
        num_steps: passes after the trunk's, ``T - 1``.
    """

    layout: Layout
    ends: Tensor
    order: Tensor
    num_steps: int

    @property
    def trunk(self) -> Tensor:
        """(S,) places of the trunk."""
        return self.order[: len(self.order) - len(self.ends) * self.num_steps]

    @property
    def trunk_ids(self) -> Tensor:
        """(B, S) token ids of the trunk."""
        return self.layout.input_ids[:, self.trunk]

    @property
    def end_columns(self) -> Tensor:
        """(R,) the ends as columns of the trunk."""
        return self.ends - self.num_steps * torch.arange(len(self.ends), device=self.ends.device)

    def answers(self, step: int) -> Tensor:
        """(R,) places of every answer's token ``step``, from 0."""
        return self.ends + step + 1

    def to(self, device: torch.device | str) -> AnswerRows:
        """Copy to a device."""
        return replace(self, layout=self.layout.to(device), ends=self.ends.to(device), order=self.order.to(device))

    def select(self, rows: Tensor) -> AnswerRows:
        """Keep some of the rows, given by their numbers."""
        kept = {name: tensor[rows] for name, tensor in self.layout.to_dict().items()}
        return replace(self, layout=Layout(**kept))


def lay_out_answers(
    prompts: Sequence[Sequence[int]],
    blocks: BlockTokens,
    *,
    num_blocks: int,
    every_block: bool,
    max_new_tokens: int,
    pad_id: int,
    prompt_multiple: int = 1,
) -> AnswerRows:
    """Lay prompts out with their blocks, and with room for an answer after every block or after the last.

    >>> blocks = BlockTokens(begin=90, memory=91, end=92, block_size=1)
    >>> rows = lay_out_answers([[5]], blocks, num_blocks=2, every_block=True, max_new_tokens=3, pad_id=0)
    >>> rows.order.tolist(), rows.ends.tolist(), rows.end_columns.tolist()
    ([0, 1, 2, 3, 6, 7, 8, 4, 9, 5, 10], [3, 8], [3, 6])

    Args:
        prompts: token ids of at least one prompt.
        blocks: the ids of the block tokens.
        num_blocks: blocks after each prompt, at least 1 for ``every_block``.
        every_block: room after every block, else after the last alone.
        max_new_tokens: tokens of an answer, T.
        pad_id: id of padding and of the room.
        prompt_multiple: prompts are padded to a multiple of this many tokens.
    """
    room = [pad_id] * (max_new_tokens - 1)
    if every_block:
        samples = [Sample(prompt, [room] * num_blocks) for prompt in prompts]
    else:
        samples = [Sample([*prompt, *blocks.ids(num_blocks), *room], []) for prompt in prompts]
    longest = -(-max(len(prompt) for prompt in prompts) // prompt_multiple) * prompt_multiple
    num_readouts = num_blocks if every_block else 1
    length = longest + num_blocks * blocks.length + num_readouts * len(room)
    layout = build_layout(samples, blocks, pad_id=pad_id, padding_side="left", min_length=length)
    ends = layout.block_ends[0] if every_block else torch.tensor([length - 1 - len(room)])
    answers = ends + torch.arange(1, max_new_tokens)[:, None]
    is_trunk = torch.ones(length, dtype=torch.bool)
    is_trunk[answers] = False
    order = torch.cat([is_trunk.nonzero()[:, 0], answers.flatten()])
    return AnswerRows(layout, ends, order, num_steps=len(room))
