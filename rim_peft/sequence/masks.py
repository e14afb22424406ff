"""Attention masks: one predicate over segment and document ids, as dense masks and as a flex-attention block mask.

Query ``q`` may attend to key ``i`` of its own document when ``i <= q`` and ``segment[i] in (0, segment[q])``: blocks
never see readouts, readouts never see each other, and samples in the same row do not see each other.

Source: "All readouts in one forward pass" of ``docs/concepts.md``.

The mask edits (``hide_memory``, ``join_blocks``) depend only on columns, not on the layout of rows, so they work for
training rows, plain forward passes and decoding with a cache. A mask is bool (True where a query attends) or additive
(0 there, the dtype's smallest number elsewhere), (B or 1, heads or 1, Q, K): the last Q of the K keys' columns are the
queries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rim_peft.sequence.layout import Layout

MaskFunction = Callable[[Tensor, Any, Tensor, Tensor], Tensor]
"""``f(batch, head, query index, key index) -> bool``, as flex attention expects it."""

AttentionMasks = Any
"""A model's ``attention_mask`` argument: a tensor, a ``BlockMask``, or a dict of either by layer type."""

SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
_WINDOWED = "sliding_attention"
_LAYER_TYPES = ("full_attention", _WINDOWED)


def branching_mask(layout: Layout, *, window: int | None = None) -> MaskFunction:
    """Return the predicate "query may attend to key" for a batch of rows.

    Row ``i``, column ``j`` is x where token ``i`` attends to token ``j``. The row is a prompt of one token, a block
    (``M = 1``) with a readout of two tokens, and a block with a readout of one:

    >>> from rim_peft.sequence.layout import BlockTokens, Sample, build_layout
    >>> blocks = BlockTokens(begin=90, memory=91, end=92, block_size=1)
    >>> layout = build_layout([Sample([5], [[7, 8], [9]])], blocks, pad_id=0)
    >>> for query in _evaluate(branching_mask(layout), layout)[0]:
    ...     print("".join("x" if attends else "." for attends in query))
    x.........
    xx........
    xxx.......
    xxxx......
    xxxxx.....
    xxxxxx....
    xxxx..x...
    xxxx..xx..
    xxxx..xxx.
    xxxx..xxxx

    Args:
        layout: the rows.
        window: a key must be less than this many *positions* before the query (sliding-window layers); None: no limit.

    Returns:
        A function for :func:`torch.nn.attention.flex_attention.create_block_mask`. Every query sees itself, even in
        padding, so no row of the attention is empty.
    """
    document, segment, position = layout.document_ids, layout.segment_ids, layout.position_ids

    def attends(batch: Tensor, head: Any, query: Tensor, key: Tensor) -> Tensor:
        segment_of_key = segment[batch, key]
        allowed = (segment_of_key == 0) | (segment_of_key == segment[batch, query])
        allowed = allowed & (document[batch, key] == document[batch, query]) & (key <= query)
        if window is not None:
            allowed = allowed & (position[batch, query] - position[batch, key] < window)
        return allowed

    return attends


def attention_masks(
    config: Any, layout: Layout, *, dtype: torch.dtype, places: tuple[Tensor, Tensor] | None = None
) -> AttentionMasks:
    """Build the masks for the ``attention_mask`` of a model with this config.

    Training computes all places of a row at once. Decoding computes some of them, with a cache whose columns hold
    places in the order of their computation; the attention pattern is the same. A prompt of one token and two blocks
    (``M = 1``), then the first token of both readouts:

    >>> from rim_peft.sequence.layout import BlockTokens, Sample, build_layout
    >>> blocks = BlockTokens(begin=90, memory=91, end=92, block_size=1)
    >>> layout = build_layout([Sample([5], [[7], [8]])], blocks, pad_id=0)
    >>> keys = torch.tensor([0, 1, 2, 3, 5, 6, 7, 4, 8])
    >>> for query in _evaluate(branching_mask(layout), layout, (keys[-2:], keys))[0]:
    ...     print("".join("x" if attends else "." for attends in query))
    xxxx...x.
    xxxxxxx.x

    Args:
        config: the base model's config; its text part, attention implementation, layer types and window are used.
        layout: the rows.
        dtype: dtype of the dense mask: the one that the model computes in.
        places: (Q,) places of a row that attend, and (C,) places that they may attend to, including themselves; by
            default all S places for both.

    Returns:
        An additive (R, 1, Q, C) tensor, 0 where a query attends and the dtype's smallest number elsewhere, for eager
            and sdpa; a ``BlockMask`` for flex attention; a dict of them by layer type if layers differ (Gemma 2 and 3).

    Raises:
        ValueError: :func:`check_config` refuses the config.
    """
    check_config(config)
    is_flex = config.get_text_config()._attn_implementation == "flex_attention"
    build = _block_sparse if is_flex else partial(_dense, dtype=dtype)
    return by_layer_type(config, lambda window: build(layout, window, places))


def by_layer_type(config: Any, build: Callable[[int | None], Any]) -> AttentionMasks:
    """Build a mask for each kind of layer in a model, in the form that the model takes.

    Args:
        config: the base model's config.
        build: builds the mask of layers with a window of the given length, or without a window (None).

    Returns:
        The result of ``build``, or a dict of results by layer type if layers differ.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layer_types = _layer_types(config)
    if layer_types == set(_LAYER_TYPES):
        return {kind: build(window if kind == _WINDOWED else None) for kind in _LAYER_TYPES}
    return build(window if layer_types == {_WINDOWED} else None)


def check_architecture(model: nn.Module) -> None:
    """Refuse a base model that cannot run branching rows, and say why.

    Raises:
        ValueError: the attention implementation takes no 4D mask, a layer is recurrent or attends by index, or the
            model takes no ``position_ids``.
    """
    config: Any = model.config
    check_config(config)
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        raise ValueError(
            f"model: readouts need their own positions, but {type(model).__name__} takes no `position_ids` "
            "(ALiBi, relative or recurrent models). Use a base with rotary or learned positions."
        )


def check_config(config: Any) -> None:
    """Refuse a config whose model cannot express a branching mask; see :func:`check_architecture`."""
    check_layers(config)
    config = config.get_text_config()
    if (implementation := config._attn_implementation) not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation: training readouts needs a mask per query, which {implementation!r} cannot express "
            f"(it takes only a padding mask). Load the base with one of {', '.join(SUPPORTED_IMPLEMENTATIONS)}."
        )


def check_layers(config: Any) -> None:
    """Refuse a config with layers that see more than a mask allows; see :func:`check_architecture`."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name!r} is an encoder-decoder model; blocks need a decoder-only causal model.")
    config = config.get_text_config()
    if unknown := _layer_types(config) - set(_LAYER_TYPES):
        raise ValueError(
            f"model: {name!r} has layers of type {', '.join(sorted(unknown))}, which cannot hide readouts from each "
            "other (recurrent state, or attention by index). Use a base with full or sliding attention in every layer."
        )
    if getattr(config, "alibi", False):
        raise ValueError(f"model: {name!r} is configured with ALiBi, which ignores `position_ids`; set alibi=False.")


def has_full_attention(config: Any) -> bool:
    """Tell whether every layer attends to all earlier tokens, and has no other state."""
    return _layer_types(config.get_text_config()) == {"full_attention"}


def _layer_types(config: Any) -> set[str]:
    """Return the layers' kinds of attention, by transformers' names."""
    # Hybrid and older models name their layers in other fields.
    for field in ("layer_types", "layers_block_type", "attention_layers"):
        if kinds := getattr(config, field, None):
            return {"full_attention" if kind in ("attention", "global") else kind for kind in kinds}
    recurrent = ("ssm_cfg", "state_size", "mamba_d_state", "attention_chunk_size", "linear_attn_config")
    if found := [field for field in recurrent if getattr(config, field, None) is not None]:
        return {f"unknown ({found[0]} is set)"}
    return {_WINDOWED} if getattr(config, "sliding_window", None) is not None else {"full_attention"}


def _evaluate(attends: MaskFunction, layout: Layout, places: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Evaluate the predicate at every pair of places, to (R, Q, C) bool."""
    rows, columns = (torch.arange(size, device=layout.input_ids.device) for size in layout.input_ids.shape)
    queries, keys = (columns, columns) if places is None else places
    return attends(rows[:, None, None], None, queries[None, :, None], keys[None, None, :])


def _dense(layout: Layout, window: int | None, places: tuple[Tensor, Tensor] | None, *, dtype: torch.dtype) -> Tensor:
    attends = _evaluate(branching_mask(layout, window=window), layout, places)
    # Not a bool mask, because eager attention adds the mask. Not -inf, because a kernel may subtract two of them.
    mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
    return mask.masked_fill_(~attends, torch.finfo(dtype).min)[:, None]


def _block_sparse(layout: Layout, window: int | None, places: tuple[Tensor, Tensor] | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    attends = branching_mask(layout, window=window)
    batch, length = layout.input_ids.shape
    device = str(layout.input_ids.device)
    if places is None:
        return create_block_mask(attends, batch, None, length, length, device=device)
    queries, keys = places

    def attends_at(batch: Tensor, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return attends(batch, head, queries[query], keys[key])

    return create_block_mask(attends_at, batch, None, len(queries), len(keys), device=device)


def number_blocks(input_ids: Tensor, first_memory_id: int, *, before: Tensor | None = None) -> Tensor:
    """Number the blocks, so that tokens of the same block have the same number.

    >>> number_blocks(torch.tensor([[5, 90, 91, 92, 6, 90, 91, 92]]), 90).tolist()
    [[0, 2, 2, 2, 0, 3, 3, 3]]

    Args:
        input_ids: (B, S) token ids.
        first_memory_id: the id of ``<b>``; memory ids start here.
        before: (B, P) numbers of preceding tokens; a block that began among them continues.

    Returns:
        (B, S) int64: a different number for each block of a row, 0 for other tokens. 1 is memory before any ``<b>``.
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
    """Hide memory from every query; a memory token still sees itself, so that every query has a key.

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
