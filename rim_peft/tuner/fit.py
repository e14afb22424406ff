"""Whether an adapter fits a base: its architecture, vocabulary and targets."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

from rim_peft.tuner.config import RiMConfig


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
