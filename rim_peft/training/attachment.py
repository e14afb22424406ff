"""Turn a trainer's ``model`` argument into a base with a trainable adapter; write the card beside its checkpoints."""

from __future__ import annotations

import logging
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from rim_peft.data.sources import asking_hub
from rim_peft.training.distributed import shards_weights
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.tuner.bases import attention_of
from rim_peft.tuner.card import CARD_FILE, TAGS, CardText, Usage, render_card
from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.layers import find_layers


def write_card(folder: Path, *, name: str | None, stage: str, base: str) -> None:
    """Write ``README.md``.

    Args:
        folder: the checkpoints' folder; created if missing.
        name: what to call the adapter; the folder's name if None.
        stage: the trainer's class.
        base: name of the base that the adapter is loaded on; empty if it has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    card = CardText(f"An adapter trained by `rim_peft.{stage}`.", Usage(base), metadata={"tags": [*TAGS, "trl"]})
    (folder / CARD_FILE).write_text(render_card(name or folder.name, card), encoding="utf-8")


logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=ReadoutConfig)


def attach(
    model: str | PreTrainedModel | PeftModel,
    peft_config: RiMConfig | None,
    args: ReadoutConfig,
    *,
    quantization_config: Any,
) -> Any:
    """Load the base if ``model`` is a name, and attach an adapter if ``peft_config`` is given."""
    base: Any = model
    if isinstance(model, str):
        kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
        if quantization_config is not None:  # None would hide that weights are stored quantised
            kwargs["quantization_config"] = quantization_config
        if isinstance(args.model_init_kwargs, dict):
            kwargs.update(args.model_init_kwargs)
        with asking_hub(model):
            base = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    elif quantization_config is not None:
        raise ValueError(
            "quantization_config: must come with a model's id or folder, got a loaded model. Load it quantised."
        )
    if peft_config is None:
        return base
    if isinstance(base, PeftModel) or getattr(base, "peft_config", None):
        raise ValueError("peft_config: the model has an adapter already. Give the base model, or no peft_config.")
    set_seed(args.seed)
    return get_peft_model(base, peft_config)


def check_adapter(
    model: PeftModel, config: RiMConfig, *, min_blocks: int = 1, block_range: list[int] | None = None
) -> None:
    """Refuse an adapter that training would not change, or whose number of blocks it does not train."""
    if config.num_blocks < min_blocks:
        raise ValueError(
            f"num_blocks: training needs at least one block, got {config.num_blocks}. Attach an adapter with "
            "RiMConfig(num_blocks=...)."
        )
    if block_range is not None and not block_range[0] <= config.num_blocks <= block_range[1]:
        raise ValueError(
            f"block_range: must include the adapter's num_blocks, {config.num_blocks}, which it answers and is "
            f"validated with, got {block_range}. Widen it, or give the adapter another num_blocks."
        )
    base_model: Any = model.base_model
    rows = base_model.memory.rows(model.active_adapter)
    # A training without blocks may have left the rows frozen.
    is_frozen = not rows.requires_grad if config.num_blocks else not any(p.requires_grad for p in model.parameters())
    if is_frozen:
        raise ValueError(
            f"model: the adapter {model.active_adapter!r} is loaded for inference, with its weights frozen. Load it "
            "with PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )


def fall_back_from_flex(base: Any, *, device_type: str) -> None:
    """Switch flex attention to sdpa on a CPU, where flex attention has no backward pass."""
    if device_type == "cpu" and attention_of(base.config) == "flex_attention":
        logger.warning("attn_implementation: flex_attention has no backward pass on a CPU; training with sdpa.")
        base.set_attn_implementation("sdpa")


def checkpoint_for(base: Any, args: ConfigT) -> ConfigT:
    """Return the options with the kind of gradient checkpointing that saves memory on this base, unless one is set."""
    # bitsandbytes' 8-bit layers keep their inputs outside autograd's saved tensors, so PyTorch's default
    # (non-reentrant) checkpointing cannot drop them, and a step would take more memory than without quantisation.
    # The reentrant kind first runs layers without autograd. It does not work with DDP's search for unused parameters;
    # a step has none without layer_shares.
    if not (args.gradient_checkpointing and is_8_bit(base)) or args.gradient_checkpointing_kwargs:
        return args
    args = copy(args)
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # the old name and the new one
        if hasattr(args, name):
            setattr(args, name, {"use_reentrant": True})
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    return args


def check_depth(base: Any, config: RiMConfig, args: ConfigT) -> ConfigT:
    """Refuse ``layer_shares`` where a training step cannot leave out layers; return the options for several processes.

    Raises:
        ValueError: the base's layers are not found, blocks would come in above the lowest layers, or the launcher or
            the options expect that each step trains every weight.
    """
    _, layers = find_layers(base, options="layer_shares")
    fewest = args.num_layers(1, len(layers))
    if config.insertion_layer >= fewest:
        raise ValueError(
            f"layer_shares: must run the layer where blocks are inserted, {config.insertion_layer}, from the start, "
            f"got {fewest} of {len(layers)} layers. Raise its first share, or omit insertion_layer."
        )
    if shards_weights():
        raise ValueError(
            "layer_shares: must be null with FSDP, whose processes expect that each step runs every layer. Omit it, "
            "or start the processes without FSDP."
        )
    needs_all = args.ddp_find_unused_parameters is False or (args.gradient_checkpointing and is_8_bit(base))
    if needs_all and args.world_size > 1:
        raise ValueError(
            "layer_shares: must be null in several processes with ddp_find_unused_parameters=False or an 8-bit base "
            "with gradient_checkpointing, since a step then has to train every weight. Omit one of them."
        )
    if not needs_all:
        args = copy(args)
        args.ddp_find_unused_parameters = True
    return args


def is_8_bit(base: Any) -> bool:
    """Whether a base has bitsandbytes' 8-bit layers."""
    return bool(getattr(base, "is_loaded_in_8bit", False))
