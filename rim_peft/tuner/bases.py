"""Checks of a base: its decoder layers, which adapters and targets fit it, and how a small copy of it behaves.

The small copy has few and narrow layers and a small vocabulary, so a trial takes equally long for any base. It leaves
the base's own weights alone, which may be on another device, quantised, offloaded or not loaded yet.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from rim_peft.tuner.config import RiMConfig

_IMPLEMENTATIONS = ("eager", "sdpa")


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
    implementation = model_config._attn_implementation
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
