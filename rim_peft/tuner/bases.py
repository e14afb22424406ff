"""What a base must have, asked in one place: layers, attention, masks that branch, positions, adapters and targets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rim_peft.sequence.layout import Layout
from rim_peft.sequence.masks import block_mask, dense_mask
from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.peft_plugin import Contact
from rim_peft.tuner.small_copy import observe

_IMPLEMENTATIONS = ("eager", "sdpa")

CONTACTS = (
    Contact(
        "transformers.PretrainedConfig._attn_implementation",
        "which masks a base takes",
        "set_attn_implementation alone",
    ),
    Contact("transformers.PretrainedConfig._commit_hash", "an export names the base that it fits", "none"),
)


class Arguments:
    """The arguments of one call by name, whether passed by position or by keyword."""

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.names = names
        self.args = list(args)
        self.kwargs = dict(kwargs)

    def get(self, *names: str) -> Any:
        """Return the first of some arguments that is given and not None."""
        for name in names:
            index = self.names.index(name) if name in self.names else len(self.args)
            value = self.args[index] if index < len(self.args) else self.kwargs.get(name)
            if value is not None:
                return value
        return None

    def put(self, name: str, value: Any) -> None:
        """Replace or add an argument."""
        index = self.names.index(name) if name in self.names else len(self.args)
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value


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


def parameter_names(module: nn.Module) -> list[str]:
    """Return the parameter names of a module's ``forward``, without ``self``."""
    # From the class: accelerate wraps an instance's forward with one that takes any arguments.
    return list(inspect.signature(type(module).forward).parameters)[1:]


def find_layers(
    model: Any, *, options: str = "insertion_layer, bidirectional_blocks"
) -> tuple[nn.Module, list[nn.Module]]:
    """Return the module that runs the decoder layers of a causal language model, and these layers.

    ``options`` names what needs them, for the error.

    Raises:
        ValueError: the model is not built like transformers' decoders.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (parent, list(child))
        for parent in model.modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList)
        and len(child) == count
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in child)
    ]
    if len(found) != 1 or not _is_usual(*found[0]):
        raise ValueError(
            f"{options}: need a decoder with layers of transformers' usual kind, got {type(model).__name__}. Omit "
            "them, or use another base."
        )
    return found[0]


@contextmanager
def lowest_layers(model: Any, count: int) -> Iterator[None]:
    """Let a causal language model run only its lowest ``count`` decoder layers, then the final norm and the head.

    Raises:
        ValueError: the model is not built like transformers' decoders.
    """
    decoder, layers = find_layers(model, options="layer_shares")
    name = next(name for name, child in decoder.named_children() if list(child.children()) == layers)
    every = getattr(decoder, name)
    setattr(decoder, name, every[:count])
    try:
        yield
    finally:
        setattr(decoder, name, every)


def check_variants(config: RiMConfig, model: Any) -> None:
    """Refuse block options that the base's layers do not support.

    Raises:
        ValueError: ``insertion_layer`` is not one of the base's layers, or blocks cannot change its layers, masks or
            attention.
    """
    if not config.changes_layers:
        return
    _, layers = find_layers(model)
    text_config: Any = model.config.get_text_config()
    check_implementation(config, text_config)
    if config.insertion_layer >= len(layers):
        raise ValueError(
            f"insertion_layer: must be below the base's number of layers, {len(layers)}, got "
            f"{config.insertion_layer}. The middle layer is {len(layers) // 2}; 0 inserts at the embeddings."
        )
    if config.insertion_layer > 0 and getattr(text_config, "num_kv_shared_layers", None):
        raise ValueError(
            f"insertion_layer: must be 0 for {type(model).__name__}, got {config.insertion_layer}: upper layers use "
            "the keys of lower ones, where blocks are not there yet. Omit it."
        )
    if config.bidirectional_blocks and any(_has_causal_buffer(layer) for layer in layers):
        raise ValueError(
            f"bidirectional_blocks: must be False for {type(model).__name__}, got True: its attention is always "
            "causal, whatever the mask. Omit it, or use another base."
        )


def check_implementation(config: RiMConfig, model_config: Any) -> None:
    """Refuse attention without a mask per query; it can still be changed after an adapter is attached."""
    implementation = attention_of(model_config)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation: must be 'eager' or 'sdpa' with {config.describe_variants()}, got "
            f"{implementation!r}, which takes no dense mask. Load the base with attn_implementation='sdpa'."
        )


def check_uncompiled(name: str, config: RiMConfig) -> None:
    """Refuse compiled layers if blocks change the inputs of layers; ``name`` is the option that compiles them.

    Raises:
        ValueError: the adapter has ``insertion_layer`` or ``bidirectional_blocks``.
    """
    if config.changes_layers:
        raise ValueError(
            f"{name}: must be False with {config.describe_variants()}, got True: the inputs of the layers are changed "
            "outside of compiled code. Omit it."
        )


def _is_usual(decoder: nn.Module, layers: list[nn.Module]) -> bool:
    # The decoder passes unknown keyword arguments on to its layers; this is how layers learn of a pass's blocks.
    parameters = inspect.signature(type(decoder).forward).parameters.values()
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = [{"hidden_states", "attention_mask"} <= set(parameter_names(layer)) for layer in layers]
    return takes_more and "input_ids" in parameter_names(decoder) and all(known)


def _has_causal_buffer(layer: nn.Module) -> bool:
    """Tell whether attention has its own (1, 1, N, N) causal triangle, as GPT-Neo's does."""
    shapes = [tuple(b.shape) for b in layer.buffers() if b.dtype in (torch.bool, torch.uint8)]
    return any(len(shape) == 4 and shape[-1] == shape[-2] > 1 for shape in shapes)


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


def describe_architecture(model: Any) -> dict[str, Any]:
    """Return what an adapter records about its base, besides its vocabulary size."""
    config = model.config.get_text_config()
    return {name: getattr(config, name, None) for name in ("model_type", "hidden_size", "num_hidden_layers")}


def check_base_architecture(config: RiMConfig, model: Any) -> None:
    """Refuse a configuration made for a base of another architecture or size; old adapters did not record theirs.

    Raises:
        ValueError: ``base_architecture`` describes another base.
    """
    noted, found = config.base_architecture or {}, describe_architecture(model)
    differing = _differing(noted, found)
    if not differing:
        return
    base = config.base_model_name_or_path
    raise ValueError(
        f"base_architecture: must match the adapter's own base, {_list(noted, differing)}, got "
        f"{_list(found, differing)}: the adapter was made for another base. Load it onto "
        f"{repr(base) if base else 'its own base'}; for a new adapter make a new RiMConfig."
    )


def check_swap(config: RiMConfig, other: RiMConfig) -> None:
    """Refuse to swap an adapter's weights for another's if PEFT cannot, or if they do not fit the base.

    Args:
        config: of the attached adapter.
        other: of the adapter that replaces it.

    Raises:
        ValueError: one of them has no LoRA, or the new one was made for another base.
    """
    if 0 in (config.r, other.r):
        raise ValueError(
            f"r: must be at least 1 to swap adapters in place, got {config.r} and {other.r}: PEFT scales LoRA by it. "
            "Use load_adapter, then set_adapter."
        )
    noted = {"first_memory_id": other.first_memory_id, **(other.base_architecture or {})}
    found = {"first_memory_id": config.first_memory_id, **(config.base_architecture or {})}
    if differing := _differing(noted, found):
        raise ValueError(
            f"base_architecture, first_memory_id: must match the adapter's own base, {_list(noted, differing)}, "
            f"got {_list(found, differing)}: the new adapter was made for another base. Load it onto its own base."
        )


def _differing(noted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names in both mappings whose values differ; other versions may record other names."""
    return [name for name, value in noted.items() if name in found and value != found[name]]


def _list(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {values.get(name)}" for name in names)


def check_vocabulary(config: RiMConfig, num_embeddings: int) -> None:
    """Refuse a configuration made for another vocabulary than the base's ``num_embeddings`` rows (V).

    Raises:
        ValueError: ``first_memory_id`` or a token id of ``init_memory`` does not fit.
    """
    if config.first_memory_id not in (None, num_embeddings):
        raise ValueError(
            f"first_memory_id: must be the number of rows of the base's embedding, {num_embeddings}, got "
            f"{config.first_memory_id}: the adapter was made for another base, or this one's vocabulary was resized. "
            "Load the adapter's own base without resizing it; for a new adapter make a new RiMConfig."
        )
    if not isinstance(config.init_memory, str) and max(config.init_memory) >= num_embeddings:
        raise ValueError(
            f"init_memory: token ids must be below the vocabulary's size {num_embeddings}, got {config.init_memory!r}. "
            "Take the ids from this base's tokenizer."
        )


def check_targets(config: RiMConfig, model: Any, embedding: str) -> None:
    """Refuse targets that RiM must leave unchanged, and targets that match no layer.

    Raises:
        ValueError: ``modules_to_save`` or ``target_modules`` contains the input embedding, which is named
            ``embedding``, or ``target_modules`` contains the output head or matches no layer.
    """
    for name in config.modules_to_save or []:
        if f".{embedding}.".endswith(f".{name}."):
            raise ValueError(_not_on_embedding("modules_to_save", name))
    targets = config.target_modules
    if config.r == 0 or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    matched = [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
    if embedding in matched:
        raise ValueError(_not_on_embedding("target_modules", targets))
    if any(model.get_submodule(name) is model.get_output_embeddings() for name in matched):
        raise ValueError(
            f"target_modules: must not hold the output head, got {targets!r}: TRL computes the trainers' loss from the "
            "head's own weights. Omit it, or use 'all-linear'."
        )
    if not matched and not config.target_parameters:
        raise ValueError(
            f"target_modules: must name layers of the base, got {targets!r}, which matches none. Use 'all-linear', or "
            "r=0 to train only the memory rows."
        )


def _not_on_embedding(field: str, value: object) -> str:
    return f"{field}: must not hold the input embedding, got {value!r}: RiM looks up its memory there. Omit it."
