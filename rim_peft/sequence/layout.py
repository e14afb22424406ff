"""Where prompt, blocks and readouts lie in a row: token ids, segment, position, label.

All readouts of a sample share one row, so that one forward pass trains them all::

    x  m_1  readout_1  m_2  readout_2  ...  m_K  readout_K

The *trunk*, ``x, m_1 … m_K``, is what exists at inference. A readout is a side branch: its tokens carry the
positions they would have if they followed their block directly, and the mask (:mod:`rim_peft.sequence.masks`) hides
them from everything but themselves.

Source: arXiv 2605.30343; the row is described in ``docs/concepts.md``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that predicts nothing, as everywhere in transformers."""


@dataclass(frozen=True)
class BlockTokens:
    """The three token ids that blocks are made of, and how many memory tokens a block has.

    >>> BlockTokens(begin=90, memory=91, end=92, block_size=2).ids(2)
    [90, 91, 91, 92, 90, 91, 91, 92]
    """

    begin: int
    memory: int
    end: int
    block_size: int

    @property
    def length(self) -> int:
        """Tokens in one block, ``B = M + 2``."""
        return self.block_size + 2

    def ids(self, num_blocks: int) -> list[int]:
        """Token ids of ``num_blocks`` blocks in a row, ``[<b>, <m> × M, </b>] × K``."""
        return [self.begin, *[self.memory] * self.block_size, self.end] * num_blocks


@dataclass(frozen=True)
class Sample:
    """One prompt and what is to be read out after each of its blocks.

    ``readouts[k - 1]`` directly follows block ``k``; an empty one leaves the block without a readout. The number of
    readouts is the sample's number of blocks, so ``[[]] * K`` is a bare trunk.
    """

    prompt: Sequence[int]
    readouts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Layout:
    """A batch of D samples in R rows, one sample to a row unless they are packed; every tensor is int64.

    Attributes:
        input_ids: (R, S) token ids.
        attention_mask: (R, S) 1 for a token, 0 for padding.
        position_ids: (R, S) trunk tokens count their sample's trunk tokens alone; token ``j`` of readout ``k`` has
            ``n + k·B + j``.
        segment_ids: (R, S) 0 for the trunk and for padding, ``k`` for the tokens of readout ``k``.
        document_ids: (R, S) number of the sample that a token belongs to, from 0; -1 for padding.
        shift_labels: (R, S) the token that this position is to predict, ``IGNORE_INDEX`` for none. A block's end
            predicts its readout's first token; the last token of a readout predicts nothing.
        block_ends: (D, K) index of each block's last token among the R·S tokens, row after row; -1 where a sample has
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
        """List the positions that predict something, row after row."""
        places = (self.shift_labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
        # A position predicts the token behind it, whose segment says which readout that is.
        return Labels(
            places,
            self.shift_labels.flatten()[places],
            self.document_ids.flatten()[places],
            self.segment_ids.flatten()[places + 1],
        )

    def to(self, device: torch.device | str) -> Layout:
        """Copy to a device."""
        return Layout(**{name: _send(tensor, device) for name, tensor in self.to_dict().items()})

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name, as data loaders want them; ``Layout(**batch)`` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Labels:
    """The N labels of a batch: a loss needs hidden states and logits at their places alone.

    Attributes:
        places: (N,) index of the predicting position among the R·S tokens, row after row.
        token_ids: (N,) what it is to predict.
        documents: (N,) the sample that it belongs to, from 0.
        blocks: (N,) the number ``k`` of the readout that it belongs to, from 1.
    """

    places: Tensor
    token_ids: Tensor
    documents: Tensor
    blocks: Tensor

    def to(self, device: torch.device | str) -> Labels:
        """Copy to a device."""
        return Labels(*(_send(getattr(self, field.name), device) for field in fields(self)))


def _send(tensor: Tensor, device: torch.device | str) -> Tensor:
    # A copy from pinned memory does not wait for what a GPU is still doing.
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
    """Lay every sample out as one row of interleaved blocks and readouts, and pad the rows to one length.

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

    Args:
        samples: at least one; their prompts, readouts and numbers of blocks may differ.
        blocks: the ids of the block tokens.
        pad_id: id of padding; its value is never read by a real token.
        padding_side: ``"right"`` or ``"left"``.
        min_length: rows are padded to at least this many tokens.

    Raises:
        ValueError: no samples, an empty prompt, or another padding side.
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

    def pad(columns: list[list[int]], value: int) -> Tensor:
        padded = torch.full((len(columns), length), value)
        for i, (column, start) in enumerate(zip(columns, starts, strict=True)):
            padded[i, start : start + len(column)] = torch.tensor(column, dtype=torch.long)
        return padded

    return Layout(
        input_ids=pad([row.tokens for row in rows], pad_id),
        attention_mask=pad([[1] * len(row.tokens) for row in rows], 0),
        position_ids=pad([row.positions for row in rows], 0),
        segment_ids=pad([row.segments for row in rows], 0),
        document_ids=pad([[number] * len(row.tokens) for number, row in enumerate(rows)], -1),
        shift_labels=pad([row.labels for row in rows], IGNORE_INDEX),
        block_ends=ends,
    )


def keep_readouts(layout: Layout, keep: Tensor) -> Layout:
    """Take the tokens of unwanted readouts out of the rows, and close the gaps.

    What is left is unchanged, since no kept token attends to a dropped one and positions don't depend on them: a
    readout whose loss weight has reached 0 need not be computed. Rows come back padded on the right.

    Args:
        layout: rows of D samples with K blocks.
        keep: (D, K) bool, whether readout ``k`` of a sample stays.
    """
    wanted = torch.cat([keep.new_ones(len(keep), 1), keep.bool()], dim=1)  # segment 0, the trunk, always stays
    stays = wanted[layout.document_ids, layout.segment_ids] & layout.attention_mask.bool()
    length = int(stays.sum(1).max())
    row, column = stays.nonzero(as_tuple=True)
    target = row * length + stays.cumsum(1)[row, column] - 1
    return _move(layout, stays, target, num_rows=len(stays), length=length)


def pack_rows(layout: Layout, row_length: int | None, *, multiple_of: int = 1) -> Layout:
    """Put the samples into as few rows of about equal length as hold them, several to a row.

    Tokens, positions, segments and labels stay as they are: the mask keeps samples apart by ``document_ids``.

    >>> blocks = BlockTokens(begin=90, memory=91, end=92, block_size=1)
    >>> layout = build_layout([Sample([5], [[7]]), Sample([1, 2, 3], [[7]]), Sample([6], [[8]])], blocks, pad_id=0)
    >>> pack_rows(layout, 10).document_ids.tolist()
    [[1, 1, 1, 1, 1, 1, 1, -1, -1, -1], [0, 0, 0, 0, 0, 2, 2, 2, 2, 2]]

    Args:
        layout: rows of D samples, packed or not.
        row_length: tokens in a row at most; a longer sample gets a row of its own, and is not cut. None: one sample
            to a row.
        multiple_of: rows are padded to a multiple of this, so that kernels that are compiled for a length can be used
            again.
    """
    is_token = layout.attention_mask.bool()
    documents = layout.document_ids[is_token]
    sizes = torch.bincount(documents, minlength=len(layout.block_ends))
    rows = _fill_rows(sizes.tolist(), row_length)
    length = max(sum(int(sizes[document]) for document in row) for row in rows)
    length = -(-length // multiple_of) * multiple_of
    starts = torch.empty_like(sizes)
    for number, row in enumerate(rows):
        members = torch.tensor(row, device=sizes.device)
        starts[members] = number * length + sizes[members].cumsum(0) - sizes[members]
    # A sample's tokens lie side by side in their order; what counts is how far each lies behind the first.
    order = torch.arange(len(documents), device=documents.device)
    first = order.new_full((len(sizes),), len(order)).scatter_reduce(0, documents, order, "amin")
    return _move(layout, is_token, starts[documents] + order - first[documents], num_rows=len(rows), length=length)


def _fill_rows(sizes: list[int], row_length: int | None) -> list[list[int]]:
    """Spread documents over as few rows of ``row_length`` as will do, the longest first, each to the emptiest row."""
    if row_length is None:
        return [[document] for document in range(len(sizes))]
    row_length = max(row_length, *sizes)
    by_size = sorted(range(len(sizes)), key=lambda document: (-sizes[document], document))
    num_rows = -(-sum(sizes) // row_length)
    while True:  # ends where every document has a row of its own, if not before
        filled = [(0, row) for row in range(num_rows)]
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        for document in by_size:
            length, row = heapq.heappop(filled)
            rows[row].append(document)
            heapq.heappush(filled, (length + sizes[document], row))
        if max(filled)[0] <= row_length:
            return [sorted(row) for row in rows]
        num_rows += 1


def _move(layout: Layout, is_moved: Tensor, target: Tensor, *, num_rows: int, length: int) -> Layout:
    """Make new rows of those of the (R, S) tokens that are moved, the i-th to place ``target[i]``; else padding."""
    source = is_moved.flatten().nonzero()[:, 0]

    def place(values: Tensor, fill: int) -> Tensor:
        placed = values.new_full((num_rows * length,), fill)
        placed[target] = values.flatten()[source]
        return placed.view(num_rows, length)

    new_place = source.new_full((is_moved.numel(),), -1)
    new_place[source] = target
    # A block's end whose readout is gone predicts nothing any more: what is behind it has moved away from it.
    labels = place(layout.shift_labels, IGNORE_INDEX)
    segments = place(layout.segment_ids, 0)
    following = torch.zeros_like(segments)
    following[:, :-1] = segments[:, 1:]
    return Layout(
        input_ids=place(layout.input_ids, 0),
        attention_mask=place(layout.attention_mask, 0),
        position_ids=place(layout.position_ids, 0),
        segment_ids=segments,
        document_ids=place(layout.document_ids, -1),
        shift_labels=labels.masked_fill(following == 0, IGNORE_INDEX),
        block_ends=torch.where(layout.block_ends < 0, -1, new_place[layout.block_ends]),
    )


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
        trunk_length += blocks.length
        if len(readout):
            row.tokens.extend(readout)
            row.positions.extend(range(trunk_length, trunk_length + len(readout)))
            row.segments.extend([number] * len(readout))
            # Shifted: the block's end predicts the first token, the last token predicts nothing.
            row.labels[-1:] = [*readout, IGNORE_INDEX]
    return row
