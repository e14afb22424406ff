"""How a base behaves, observed on a small copy of it.

The copy has few and narrow layers and a small vocabulary, so a trial takes equally long for any base. It leaves the
base's own weights alone, which may be on another device, quantised, offloaded or not loaded yet.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

_NUM_LAYERS = 2
_VOCABULARY = 96
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "n_words")
_WIDTHS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_global_key_value_heads"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "rotary_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "altup_num_inputs", "laurel_rank"), 2),
    "num_kv_shared_layers": 0,
}
"""Largest sizes in the copy, by their names in transformers' configs."""
_MOST_PARAMETERS = 50_000_000
_SPREAD = 0.15
"""Spread of the copy's weights: wide enough for every token to matter."""


class Behaviour(NamedTuple):
    """How a base behaves.

    Attributes:
        is_causal: whether a token affects only itself and later ones.
        reads_ids_once: whether token ids affect the result only through their input embedding.
    """

    is_causal: bool
    reads_ids_once: bool


_known: dict[str, Behaviour | None] = {}


def observe(model: Any) -> Behaviour | None:
    """Return how a base of this class and config behaves, or None if no small copy of it can be made."""
    key = f"{type(model).__module__}.{type(model).__qualname__} {json.dumps(_shrunk(model.config), default=str)}"
    if key not in _known:
        _known[key] = on_small_copy(model, _observe)
    return _known[key]


def on_small_copy(model: Any, trial: Callable[[Any], Any]) -> Any:
    """Return the result of a trial on a small copy of a model, or None if the copy or the trial fails.

    Torch's random state does not change.

    Args:
        model: gives the class and the config; its weights are not used.
        trial: function of a model in float32 on the CPU, in evaluation mode.
    """
    # Heads keep their width, since other sizes derive from it, unless the base derives it from the hidden size.
    for widths in (_WIDTHS, {**_WIDTHS, "head_dim": 16}, {}):
        settings = _shrunk(model.config, widths)
        with _undisturbed():
            try:
                return trial(_build(type(model), type(model.config), settings, like=model.config))
            except Exception:  # noqa: S112 - a class's own code can raise anything where sizes do not fit together
                continue
    return None


def _observe(copy: Any) -> Behaviour:
    ids = torch.arange(5, 11)[None]
    other_end = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
    first, second = (_logits(copy, tokens) for tokens in (ids, other_end))
    embedded = copy.get_input_embeddings()(ids)
    # Bases may modify the embedding's output in place.
    handle = copy.get_input_embeddings().register_forward_hook(lambda *_: embedded.clone())
    try:
        by_ids, by_others = (_logits(copy, tokens) for tokens in (ids, ids + 10))
    finally:
        handle.remove()
    return Behaviour(_is_close(first[:, :-1], second[:, :-1]), _is_close(by_ids, by_others))


def _logits(copy: Any, ids: Tensor) -> Tensor:
    logits: Tensor = copy(input_ids=ids, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("logits: must be finite.")
    return logits


def _is_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * one.abs().max())


def _build(model_class: Any, config_class: Any, settings: dict[str, Any], *, like: Any) -> Any:
    config = config_class.from_dict(json.loads(json.dumps(settings, default=str)))
    for part in (config, config.get_text_config()):
        part._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"model: a copy must have at most {_MOST_PARAMETERS} parameters, got {size}.")
    with torch.device("cpu"):
        copy = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in copy.parameters():
        if parameter.dim() == 1:  # a norm, or a gate that may start from 0
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_SPREAD)
        else:
            parameter.normal_(0, _SPREAD, generator=generator)
    return copy


def _shrunk(config: Any, widths: dict[str, int] = _WIDTHS) -> dict[str, Any]:
    """Return a config's fields with smaller sizes, nested configs included."""
    fields = dict(config.to_dict())
    for name in ("quantization_config", "per_layer_config"):
        fields.pop(name, None)
    return _smaller(fields, widths)


def _smaller(fields: dict[str, Any], widths: dict[str, int]) -> dict[str, Any]:
    depth = next((fields[name] for name in _DEPTHS if isinstance(fields.get(name), int)), None)
    sizes = {**dict.fromkeys(_DEPTHS, _NUM_LAYERS), **dict.fromkeys(_VOCABULARIES, _VOCABULARY), **widths}
    smaller: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            value = _smaller(value, widths)
        elif isinstance(value, list) and depth is not None and len(value) == depth > _NUM_LAYERS:
            value = [value[0], value[-1]]  # one entry per layer
        elif name in sizes and isinstance(value, int) and not isinstance(value, bool):
            value = min(value, sizes[name])
        elif name in _SPECIAL_IDS and value is not None:
            value = _SPECIAL_IDS[name]
        smaller[name] = value
    return smaller


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Run without gradients, and without effects on random numbers, warnings and log output."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
