"""Which bases and which targets a RiM adapter can be attached to, checked before the base is changed; its positions."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel

from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.probing import observe


def check_base(model: nn.Module) -> None:
    """Refuse models that cannot continue a prompt after blocks.

    Raises:
        ValueError: if the model is not a decoder-only language model of transformers, its tokens see later ones, or it
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
            "a second time (as hidden_size_per_layer_input asks for), where memory has no row. Use another base."
        )


def not_causal(model: nn.Module) -> str:
    """Return the error of a base whose tokens see later ones."""
    return (
        f"model: must be causal, got {type(model).__name__} with a config that lets tokens see later ones, so that it "
        "would be trained on what it is to predict. Set is_decoder=True in the config of an encoder that was trained "
        "as a decoder, or use another base."
    )


def mask_dtype(model: Any) -> torch.dtype:
    """Return the type of dense masks for a causal language model: the one that it computes in."""
    head: torch.dtype = model.get_output_embeddings().weight.dtype
    own: torch.dtype = model.dtype
    return head if head.is_floating_point else own  # a quantised head holds integers


def num_positions(config: Any) -> int | None:
    """Return how many positions a row may take on a base with this config; None for any number.

    These are its ``max_position_embeddings``. With ``longrope`` they are those that it was trained on first, since
    longer rows are rotated by other frequencies, and with them all rows of their batch and all readouts of their own.
    """
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [rope for rope in ropes.values() if isinstance(rope, dict)]
    limits = [rope["original_max_position_embeddings"] for rope in [ropes, *by_layer_type] if _is_longrope(rope)]
    limits.append(getattr(config, "max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None), default=None)


def _is_longrope(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") == "longrope"


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking nf4 weights at the first inference on some CPUs (those with AVX512-BF16).

    Repacked weights answer faster, but give wrong gradients in a training step that follows and are merged as noise
    (bitsandbytes 0.50.2 and PEFT 0.21.2, measured in ``tests/integration/test_quantized.py``).
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def describe_architecture(model: Any) -> dict[str, Any]:
    """Return what an adapter notes of its base, besides the size of its vocabulary."""
    config = model.config.get_text_config()
    return {name: getattr(config, name, None) for name in ("model_type", "hidden_size", "num_hidden_layers")}


def check_base_architecture(config: RiMConfig, model: Any) -> None:
    """Refuse a configuration made for a base of another architecture or size; old adapters do not say theirs.

    Raises:
        ValueError: if ``base_architecture`` is another one's.
    """
    noted, found = config.base_architecture or {}, describe_architecture(model)
    differing = _differing(noted, found)
    if not differing:
        return
    base = config.base_model_name_or_path
    raise ValueError(
        f"base_architecture: must be that of the adapter's own base, {_list(noted, differing)}, got "
        f"{_list(found, differing)}: the adapter was made for another base. Load it onto "
        f"{repr(base) if base else 'its own base'}; for a new adapter make a new RiMConfig."
    )


def check_swap(config: RiMConfig, other: RiMConfig) -> None:
    """Refuse to put an adapter's weights in place of another's where PEFT cannot, or where they mean nothing.

    Args:
        config: of the adapter that is attached.
        other: of the adapter that comes in its place.

    Raises:
        ValueError: one of them has no LoRA, or the other one was made for another base.
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
            f"base_architecture, first_memory_id: must be those of the adapter's own base, {_list(noted, differing)}, "
            f"got {_list(found, differing)}: the adapter that comes in was made for another base. Load it onto its own."
        )


def _differing(noted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of values that differ, among those that both have: other versions may note other ones."""
    return [name for name, value in noted.items() if name in found and value != found[name]]


def _list(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {values.get(name)}" for name in names)


def check_vocabulary(config: RiMConfig, num_embeddings: int) -> None:
    """Refuse a configuration made for another vocabulary than the base's (V) rows.

    Raises:
        ValueError: if ``first_memory_id`` or a token id of ``init_memory`` does not fit.
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
    """Refuse targets that RiM needs as they are, and those that match nothing.

    Raises:
        ValueError: if ``modules_to_save`` or ``target_modules`` hold the input embedding, which is named
            ``embedding``, or the latter the output head, or no layer at all.
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
            "head's own weights. Leave it out, or use 'all-linear'."
        )
    if not matched and not config.target_parameters:
        raise ValueError(
            f"target_modules: must name layers of the base, got {targets!r}, which matches none. Use 'all-linear', or "
            "r=0 to train the memory rows alone."
        )


def _not_on_embedding(field: str, value: object) -> str:
    return f"{field}: must not hold the input embedding, got {value!r}: RiM looks its memory up there. Leave it out."
