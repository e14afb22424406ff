"""Who attends to memory where blocks depart from plain causal attention: edits of a mask that a layer would get.

The edits know columns alone, not how rows are laid out, so that they serve training rows, plain forward passes and
decoding on a cache alike. A mask is bool (True where a query attends) or additive (0 there, the type's smallest number
elsewhere), (B or 1, heads or 1, Q, K): the last Q columns of K keys are the queries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def number_blocks(input_ids: Tensor, first_memory_id: int, *, before: Tensor | None = None) -> Tensor:
    """Say which tokens belong to the same block.

    >>> number_blocks(torch.tensor([[5, 90, 91, 92, 6, 90, 91, 92]]), 90).tolist()
    [[0, 2, 2, 2, 0, 3, 3, 3]]

    Args:
        input_ids: (B, S) token ids.
        first_memory_id: the id of ``<b>``; memory ids start here.
        before: (B, P) numbers of tokens that came before; a block that began among them goes on.

    Returns:
        (B, S) int64: a number of its own for each block of a row, 0 for other tokens. 1 is memory before any ``<b>``.
    """
    begun = (input_ids == first_memory_id).cumsum(1) + 1
    if before is not None and before.shape[1] > 0:
        begun = begun + (before.amax(1, keepdim=True) - 1).clamp(min=0)
    return begun.masked_fill(input_ids < first_memory_id, 0)


def causal_mask(numbers: Tensor, num_queries: int) -> Tensor:
    """Return the (1, 1, Q, K) bool mask of plain causal attention over the (B, K) keys' columns."""
    length = numbers.shape[1]
    return numbers.new_ones(num_queries, length, dtype=torch.bool).tril(length - num_queries)[None, None]


def hide_memory(mask: Tensor, numbers: Tensor) -> Tensor:
    """Hide memory from every query; a memory token still sees itself, so that no query is left without a key.

    >>> numbers = number_blocks(torch.tensor([[5, 90, 91, 92, 6]]), 90)
    >>> for query in hide_memory(causal_mask(numbers, 5), numbers)[0, 0]:
    ...     print("".join("x" if attends else "." for attends in query))
    x....
    xx...
    x.x..
    x..x.
    x...x

    Args:
        mask: (B or 1, heads or 1, Q, K), bool or additive.
        numbers: (B, K) block numbers of the keys.
    """
    num_queries, num_keys = mask.shape[-2:]
    columns = torch.arange(num_keys, device=numbers.device)
    is_own = columns[num_keys - num_queries :, None] == columns
    stays = (numbers[:, None, None, :] == 0) | is_own
    return mask & stays if mask.dtype == torch.bool else mask.masked_fill(~stays, torch.finfo(mask.dtype).min)


def join_blocks(mask: Tensor, numbers: Tensor) -> Tensor:
    """Let all tokens of a block attend to one another.

    >>> numbers = number_blocks(torch.tensor([[5, 90, 91, 92, 6]]), 90)
    >>> for query in join_blocks(causal_mask(numbers, 5), numbers)[0, 0]:
    ...     print("".join("x" if attends else "." for attends in query))
    x....
    xxxx.
    xxxx.
    xxxx.
    xxxxx

    Args:
        mask: (B or 1, heads or 1, Q, K), bool or additive.
        numbers: (B, K) block numbers of the keys.
    """
    of_queries = numbers[:, numbers.shape[1] - mask.shape[-2] :]
    joined = (of_queries[:, None, :, None] == numbers[:, None, None, :]) & (numbers[:, None, None, :] > 0)
    return mask | joined if mask.dtype == torch.bool else mask.masked_fill(joined, 0.0)
