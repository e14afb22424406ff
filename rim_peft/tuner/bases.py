"""What a base must have, asked in one place: causal attention, masks that branch, positions, one use of token ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from rim_peft.sequence.layout import Layout
from rim_peft.sequence.masks import block_mask, dense_mask
from rim_peft.tuner.peft_plugin import Contact
from rim_peft.tuner.small_copy import observe

CONTACTS = (
    Contact(
        "transformers.PretrainedConfig._attn_implementation",
        "which masks a base takes",
        "set_attn_implementation alone",
    ),
    Contact("transformers.PretrainedConfig._commit_hash", "an export names the base that it fits", "none"),
)


_RENAMED = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if _RENAMED else "past_key_values"
"""A base's argument for the keys and values of earlier tokens: transformers 5.24 renamed it, and takes the old name
until 5.40."""

CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")
"""What a call may name it, a layer's included."""


def find_cache(inputs: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of the cache among a call's inputs: the base's own name and None without one."""
    return next(((name, inputs[name]) for name in CACHE_NAMES if inputs.get(name) is not None), (CACHE, None))


def num_cached(cache: Any) -> int:
    """Return how many tokens a cache holds; 0 without one, and for recurrent layers alone, which count none."""
    if cache is None or not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return 0
    return int(cache.get_seq_length())


def check_cache_name(base: Any) -> None:
    """Refuse to generate on a base whose code was written for transformers before 5.24.

    Raises:
        ValueError: it takes its cache under the old name alone, and would not see the tokens before the last one.
    """
    # transformers passes the new name without asking; a forward that takes any arguments swallows it.
    parameters = inspect.signature(type(base).forward).parameters
    old = [name for name in ("past_key_values", "cache_params") if name in parameters]
    if _RENAMED and old and CACHE not in parameters:
        raise ValueError(
            f"model: must take its cache as {CACHE!r}, as transformers passes it from 5.24 on, got "
            f"{type(base).__name__}, which takes {old[0]!r}. Update the base's code, use transformers<5.24, or pass "
            "use_cache=False."
        )


def input_device(model: nn.Module) -> torch.device:
    """Return the device for a model's inputs: that of its first weights that are not offloaded."""
    devices = [parameter.device for parameter in model.parameters()]
    return next((device for device in devices if device.type != "meta"), devices[0])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules of a model into evaluation mode, and restore each module's own mode on exit."""
    # One by one, since modules may differ: an adapter added to a model in evaluation mode is in training mode, and
    # parts of a model in training may stay in evaluation mode.
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


AttentionMasks = Any
"""A model's ``attention_mask`` argument: a tensor, a ``BlockMask``, or a dict of either by layer type."""

SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
_WINDOWED = "sliding_attention"
_LAYER_TYPES = ("full_attention", _WINDOWED)


def attention_of(config: Any) -> str:
    """Return the name of the attention implementation of a base with this config."""
    return str(config.get_text_config()._attn_implementation)


def commit_of(base: Any) -> str | None:
    """Return the commit of a base that was loaded from the Hub; None for another base."""
    commit: str | None = getattr(base.config, "_commit_hash", None)
    return commit


def attention_masks(
    config: Any, layout: Layout, *, dtype: torch.dtype, places: tuple[Tensor, Tensor] | None = None
) -> AttentionMasks:
    """Build the masks for the ``attention_mask`` of a model with this config.

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
    build = block_mask if attention_of(config) == "flex_attention" else partial(dense_mask, dtype=dtype)
    return by_layer_type(config, lambda window: build(layout, window, places))


def by_layer_type(config: Any, build: Callable[[int | None], Any]) -> AttentionMasks:
    """Build a mask for each kind of layer in a model, in the form that the model takes.

    Args:
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
    if (implementation := attention_of(config)) not in SUPPORTED_IMPLEMENTATIONS:
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


def check_base(model: nn.Module) -> None:
    """Refuse models that cannot continue a prompt after blocks.

    Raises:
        ValueError: the model is not a decoder-only language model of transformers, its tokens see later ones, or it
            looks token ids up a second time.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"model: must be a transformers causal language model, got {type(model).__name__}. Load the base with "
            "AutoModelForCausalLM."
        )
    behaviour = observe(model)
    if behaviour is not None and not behaviour.is_causal:
        raise ValueError(not_causal(model))
    if behaviour is not None and not behaviour.reads_ids_once:
        raise ValueError(
            f"model: must use token ids for its input embedding alone, got {type(model).__name__}, which looks them up "
            "a second time (because of hidden_size_per_layer_input), where memory has no row. Use another base."
        )


def not_causal(model: nn.Module) -> str:
    """Return the error message for a base whose tokens see later ones."""
    return (
        f"model: must be causal, got {type(model).__name__} with a config that lets tokens see later ones: it would "
        "see the tokens that it must predict. Set is_decoder=True in the config of an encoder that was trained as a "
        "decoder, or use another base."
    )


def mask_dtype(model: Any) -> torch.dtype:
    """Return the dtype of dense masks for a causal language model: the dtype that it computes in."""
    head: torch.dtype = model.get_output_embeddings().weight.dtype
    own: torch.dtype = model.dtype
    return head if head.is_floating_point else own  # a quantised head holds integers


def num_positions(config: Any) -> int | None:
    """Return how many positions a row may take on a base with this config; None means any number.

    This is ``max_position_embeddings``; with ``longrope``, the length that the base was first trained on.
    """
    # longrope rotates longer rows by other frequencies, and with them all other rows and readouts of their batch.
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [rope for rope in ropes.values() if isinstance(rope, dict)]
    limits = [rope["original_max_position_embeddings"] for rope in [ropes, *by_layer_type] if _is_longrope(rope)]
    limits.append(getattr(config, "max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None), default=None)


def _is_longrope(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") == "longrope"


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking nf4 weights at the first inference on some CPUs (those with AVX512-BF16)."""
    # Repacked weights are faster, but give wrong gradients in later training steps and merge as noise
    # (bitsandbytes 0.50.2 and PEFT 0.21.2, measured in tests/integration/test_quantized.py).
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
