"""Layout of prompt, blocks and readouts in a row: token ids, segments, positions, labels.

All readouts of a sample share one row, so that one forward pass trains them all::

    x  m_1  readout_1  m_2  readout_2  ...  m_K  readout_K

The *trunk*, ``x, m_1 … m_K``, is the input at inference. A readout is a side branch: its tokens have the positions
they would have directly after their block, and the mask (:mod:`rim_peft.sequence.masks`) hides them from everything
but themselves.

Source: arXiv 2605.30343; the row is described in ``docs/concepts.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that predicts nothing, as in transformers."""


@dataclass(frozen=True)
class BlockTokens:
    """The three token ids of blocks, and the number of memory tokens in a block.

    >>> BlockTokens(begin=90, memory=91, end=92, block_size=2).ids(2)
    [90, 91, 91, 92, 90, 91, 91, 92]

    A group of ``per_readout`` blocks counts as one block: only the last of the group has a readout. With 0, blocks
    are empty and the only readout follows the prompt.
    """

    begin: int
    memory: int
    end: int
    block_size: int
    per_readout: int = 1

    @property
    def length(self) -> int:
        """Tokens in one block, ``B = M + 2``."""
        return (self.block_size + 2) * self.per_readout

    def ids(self, num_blocks: int) -> list[int]:
        """Return the token ids of ``num_blocks`` consecutive blocks, ``[<b>, <m> × M, </b>] × K``."""
        return [self.begin, *[self.memory] * self.block_size, self.end] * (num_blocks * self.per_readout)


@dataclass(frozen=True)
class Sample:
    """One prompt and the readouts after its blocks.

    ``readouts[k - 1]`` directly follows block ``k``; if it is empty, the block has no readout. A sample has as many
    blocks as readouts, so ``[[]] * K`` is a trunk without readouts. Memory token ``j`` of block ``k`` predicts
    ``in_place[k - 1][j]``, if there is one: a label without tokens of its own in the row.
    """

    prompt: Sequence[int]
    readouts: Sequence[Sequence[int]]
    in_place: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Layout:
    """A batch of D samples in R rows, one sample per row unless packed; every tensor is int64.

    Attributes:
        input_ids: (R, S) token ids.
        attention_mask: (R, S) 1 for a token, 0 for padding.
        position_ids: (R, S) a trunk token's position counts only its sample's trunk tokens; token ``j`` of readout
            ``k`` has ``n + k·B + j``.
        segment_ids: (R, S) 0 for the trunk and for padding, ``k`` for the tokens of readout ``k``.
        document_ids: (R, S) number of the token's sample, from 0; -1 for padding.
        shift_labels: (R, S) the token that this position must predict, ``IGNORE_INDEX`` for none. A block's end
            predicts its readout's first token; the last token of a readout predicts nothing. A memory token's label is
            predicted in place: no such token follows.
        block_ends: (D, K) index of each block's last token among the R·S tokens, row by row; -1 where a sample has
            fewer blocks.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    document_ids: Tensor
    shift_labels: Tensor
    block_ends: Tensor

    def labels(self) -> Labels:
        """Return the positions that predict something, row by row."""
        places = (self.shift_labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
        documents = self.document_ids.flatten()[places]
        # A position predicts the next token, so that token's segment is the readout's number.
        readouts = self.segment_ids.flatten()[places + 1]
        ends = self.block_ends[documents]
        blocks = 1 + ((ends >= 0) & (ends < places[:, None])).sum(dim=1)
        in_place = readouts == 0
        return Labels(
            places,
            self.shift_labels.flatten()[places],
            documents,
            torch.where(in_place, blocks, readouts),
            in_place,
        )

    def to(self, device: torch.device | str) -> Layout:
        """Copy to a device."""
        return Layout(**{name: _send(tensor, device) for name, tensor in self.to_dict().items()})

    def to_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, as data loaders need them; ``Layout(**batch)`` reverses it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Labels:
    """The N labels of a batch, for losses that need hidden states and logits only at their places.

    Attributes:
        places: (N,) index of the predicting position among the R·S tokens, row by row.
        token_ids: (N,) the token to predict.
        documents: (N,) the label's sample, from 0.
        blocks: (N,) number ``k`` of the label's readout, or of its memory token's block, from 1.
        in_place: (N,) bool, whether a memory token predicts it.
    """

    places: Tensor
    token_ids: Tensor
    documents: Tensor
    blocks: Tensor
    in_place: Tensor

    def to(self, device: torch.device | str) -> Labels:
        """Copy to a device."""
        return Labels(*(_send(getattr(self, field.name), device) for field in fields(self)))


def _send(tensor: Tensor, device: torch.device | str) -> Tensor:
    # A copy from pinned memory does not wait for the GPU's pending work.
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


def build_layout(
    samples: Sequence[Sample],
    blocks: BlockTokens,
    *,
    pad_id: int,
    padding_side: str = "right",
    min_length: int = 0,
) -> Layout:
    """Build one row of interleaved blocks and readouts per sample, and pad the rows to one length.

    A prompt of two tokens, one block with ``M = 1``, and a readout of two tokens:

    >>> blocks = BlockTokens(begin=90, memory=91, end=92, block_size=1)
    >>> layout = build_layout([Sample(prompt=[5, 6], readouts=[[7, 8], [9]])], blocks, pad_id=0)
    >>> layout.input_ids.tolist()
    [[5, 6, 90, 91, 92, 7, 8, 90, 91, 92, 9]]
    >>> layout.segment_ids.tolist()
    [[0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 2]]
    >>> layout.position_ids.tolist()
    [[0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8]]
    >>> layout.shift_labels.tolist()
    [[-100, -100, -100, -100, 7, 8, -100, -100, -100, 9, -100]]
    >>> layout.block_ends.tolist()
    [[4, 9]]
    >>> layout.labels().places.tolist()
    [4, 5, 9]

    With a label in place, which the memory token predicts:

    >>> build_layout([Sample([5, 6], [[9]], in_place=[[7]])], blocks, pad_id=0).shift_labels.tolist()
    [[-100, -100, -100, 7, 9, -100]]

    Args:
        samples: at least one; their prompts, readouts and numbers of blocks may differ.
        pad_id: id of padding; no real token reads its value.
        padding_side: ``"right"`` or ``"left"``.
        min_length: rows are padded to at least this many tokens.

    Raises:
        ValueError: no samples, an empty prompt, or an unknown padding side.
    """
    if not samples:
        raise ValueError("samples: at least one sample is needed, got none.")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: must be 'left' or 'right', got {padding_side!r}.")
    rows = [_lay_out(sample, blocks) for sample in samples]
    length = max(min_length, *(len(row.tokens) for row in rows))
    left = padding_side == "left"
    starts = [length - len(row.tokens) if left else 0 for row in rows]
    num_blocks = max(len(row.block_ends) for row in rows)
    ends = torch.full((len(rows), num_blocks), -1)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ends[i, : len(row.block_ends)] = torch.tensor(row.block_ends, dtype=torch.long) + i * length + start

    pad = partial(_pad, length=length, starts=starts)
    return Layout(
        input_ids=pad([row.tokens for row in rows], pad_id),
        attention_mask=pad([[1] * len(row.tokens) for row in rows], 0),
        position_ids=pad([row.positions for row in rows], 0),
        segment_ids=pad([row.segments for row in rows], 0),
        document_ids=pad([[number] * len(row.tokens) for number, row in enumerate(rows)], -1),
        shift_labels=pad([row.labels for row in rows], IGNORE_INDEX),
        block_ends=ends,
    )


def _pad(columns: Sequence[Sequence[int]], value: int, *, length: int, starts: Sequence[int]) -> Tensor:
    """Return rows of one length, each with its numbers from its start on and ``value`` elsewhere."""
    padded = torch.full((len(columns), length), value)
    for i, (column, start) in enumerate(zip(columns, starts, strict=True)):
        padded[i, start : start + len(column)] = torch.tensor(column, dtype=torch.long)
    return padded


def pad_left(
    prompts: Sequence[Sequence[int]], pad_id: int, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return (B, S) ids of prompts padded on the left, and their mask, 1 for a token and 0 for padding; both int64."""
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True)
class _Row:
    """One sample's row before padding, as lists."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    labels: list[int]
    block_ends: list[int]


def _lay_out(sample: Sample, blocks: BlockTokens) -> _Row:
    if not len(sample.prompt):
        raise ValueError("prompt: a sample needs at least one prompt token, got an empty prompt.")
    row = _Row(list(sample.prompt), list(range(len(sample.prompt))), [0] * len(sample.prompt), [], [])
    row.labels.extend([IGNORE_INDEX] * len(sample.prompt))
    trunk_length = len(sample.prompt)
    for number, readout in enumerate(sample.readouts, start=1):
        row.tokens.extend(blocks.ids(1))
        row.positions.extend(range(trunk_length, trunk_length + blocks.length))
        row.segments.extend([0] * blocks.length)
        row.labels.extend([IGNORE_INDEX] * blocks.length)
        row.block_ends.append(len(row.tokens) - 1)
        if number <= len(sample.in_place):
            held = list(sample.in_place[number - 1][: blocks.block_size])
            first = len(row.tokens) - blocks.length + 1
            row.labels[first : first + len(held)] = held
        trunk_length += blocks.length
        if len(readout):
            row.tokens.extend(readout)
            row.positions.extend(range(trunk_length, trunk_length + len(readout)))
            row.segments.extend([number] * len(readout))
            # Shifted: the block's end predicts the first token, the last token predicts nothing.
            row.labels[-1:] = [*readout, IGNORE_INDEX]
    return row
