"""Rebuild rows: drop readouts without weight, and pack several samples into a row."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from rim_peft.sequence.layout import IGNORE_INDEX, Layout


def keep_readouts(layout: Layout, keep: Tensor) -> Layout:
    """Remove the tokens of unwanted readouts from the rows, and close the gaps.

    This also removes blocks after a sample's last kept readout. The other tokens give the same results, since none
    attends to a removed one and positions do not depend on them. Rows are padded on the right.

    Args:
        layout: rows of D samples with K blocks.
        keep: (D, K) bool, whether readout ``k`` of a sample stays.
    """
    wanted = torch.cat([keep.new_ones(len(keep), 1), keep.bool()], dim=1)  # segment 0, the trunk, is always kept
    stays = wanted[layout.document_ids, layout.segment_ids] & layout.attention_mask.bool()
    last = torch.where(keep.bool(), layout.block_ends, -1).amax(dim=1)  # end of a sample's last block with a readout
    last = torch.where(last < 0, stays.numel(), last)
    place = torch.arange(stays.numel(), device=stays.device).view_as(stays)
    stays &= (layout.segment_ids > 0) | (place <= last[layout.document_ids])
    length = int(stays.sum(1).max())
    row, column = stays.nonzero(as_tuple=True)
    target = row * length + stays.cumsum(1)[row, column] - 1
    return _move(layout, stays, target, num_rows=len(stays), length=length)


def pack_rows(layout: Layout, row_length: int | None, *, multiple_of: int = 1) -> Layout:
    """Pack the samples into as few rows as possible, of about equal length.

    Tokens, positions, segments and labels do not change: the mask separates samples by ``document_ids``.

    >>> from rim_peft.sequence.layout import BlockTokens, Sample, build_layout
    >>> blocks = BlockTokens(begin=90, memory=91, end=92, block_size=1)
    >>> layout = build_layout([Sample([5], [[7]]), Sample([1, 2, 3], [[7]]), Sample([6], [[8]])], blocks, pad_id=0)
    >>> pack_rows(layout, 10).document_ids.tolist()
    [[0, 0, 0, 0, 0, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, -1, -1, -1]]

    Args:
        layout: rows of D samples, packed or not.
        row_length: most tokens in a row; raised to the longest sample, since samples are never cut. None: one sample
            per row.
        multiple_of: rows are padded to a multiple of this, so that kernels compiled for a length can be reused.
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
    # A sample's tokens are contiguous and in order, so only the distance to the sample's first token matters.
    order = torch.arange(len(documents), device=documents.device)
    first = order.new_full((len(sizes),), len(order)).scatter_reduce(0, documents, order, "amin")
    return _move(layout, is_token, starts[documents] + order - first[documents], num_rows=len(rows), length=length)


def _fill_rows(sizes: list[int], row_length: int | None) -> list[list[int]]:
    """Assign documents to rows with few tokens in total, padding included; a heuristic."""
    if row_length is None:
        return [[document] for document in range(len(sizes))]
    row_length = max(row_length, *sizes)
    fitting: list[list[list[int]]] = []
    num_rows = -(-sum(sizes) // row_length)
    # More rows than necessary can be so much shorter that the total shrinks. One row per document always fits.
    while len(fitting) < 2 and (num_rows <= len(sizes) or not fitting):
        rows = _spread(sizes, min(num_rows, len(sizes)))
        if max(sum(sizes[document] for document in row) for row in rows) <= row_length:
            fitting.append(rows)
        num_rows += 1 + num_rows // 16  # skip some counts if there are many rows
    return min(fitting, key=lambda rows: len(rows) * max(sum(sizes[document] for document in row) for row in rows))


def _spread(sizes: list[int], num_rows: int) -> list[list[int]]:
    """Spread documents over that many rows of about equal length, by Karmarkar and Karp's largest differencing method.

    Every document begins as its own spread, alone in one of the rows. Repeatedly, the two spreads whose rows differ
    most in length are joined: the longest row of one with the shortest row of the other.

    Source: Karmarkar and Karp, The Differencing Method of Set Partitioning, UCB/CSD 82/113, 1982.

    >>> _spread([8, 7, 6, 5, 4], 2)
    [[0, 2], [1, 3, 4]]
    """
    empty: tuple[int, ...] = ()
    spreads = []
    for document, size in enumerate(sizes):
        spreads.append((-size, document, [(0, empty)] * (num_rows - 1) + [(size, (document,))]))
    heapq.heapify(spreads)
    while len(spreads) > 1:
        _, first, rows = heapq.heappop(spreads)
        _, _, others = heapq.heappop(spreads)
        joined = sorted((a[0] + b[0], a[1] + b[1]) for a, b in zip(rows, reversed(others), strict=True))
        heapq.heappush(spreads, (joined[0][0] - joined[-1][0], first, joined))
    return sorted(sorted(row) for _, row in spreads[0][2])


def _move(layout: Layout, is_moved: Tensor, target: Tensor, *, num_rows: int, length: int) -> Layout:
    """Move the chosen (R, S) tokens to new rows, the i-th to place ``target[i]``; other places become padding."""
    source = is_moved.flatten().nonzero()[:, 0]

    def place(values: Tensor, fill: int) -> Tensor:
        placed = values.new_full((num_rows * length,), fill)
        placed[target] = values.flatten()[source]
        return placed.view(num_rows, length)

    new_place = source.new_full((is_moved.numel(),), -1)
    new_place[source] = target
    # A block's end predicts nothing once its readout is removed, since another token follows it then. A label in place
    # stays, which no token of a readout follows.
    labels = place(layout.shift_labels, IGNORE_INDEX)
    segments = place(layout.segment_ids, 0)
    is_wanted = (_following(segments) > 0) | place((_following(layout.segment_ids) == 0).long(), 0).bool()
    return Layout(
        input_ids=place(layout.input_ids, 0),
        attention_mask=place(layout.attention_mask, 0),
        position_ids=place(layout.position_ids, 0),
        segment_ids=segments,
        document_ids=place(layout.document_ids, -1),
        shift_labels=labels.masked_fill(~is_wanted, IGNORE_INDEX),
        block_ends=torch.where(layout.block_ends < 0, -1, new_place[layout.block_ends]),
    )


def _following(segments: Tensor) -> Tensor:
    """Return the segment of the token after each one; 0 after a row's last."""
    return torch.nn.functional.pad(segments[:, 1:], (0, 1))
