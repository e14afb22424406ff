"""One adapter from several, by weights: PEFT's combinations of LoRA, and the weighted sum of memory rows.

Rows are embeddings, so there is one way to combine them, whatever is done with LoRA: ``sum(weight * rows)``. Weights
that sum to 1 keep them at the size that they were trained to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.layer import MemoryEmbedding
from rim_peft.tuner.registration import BLOCK_OPTIONS

_NOT_COMBINED = {
    "use_dora": (False, "DoRA's magnitudes"),
    "lora_bias": (False, "LoRA's biases"),
    "modules_to_save": (None, "modules trained in full"),
}
"""Options that give an adapter weights which are not combined."""


def check_combination(configs: dict[str, RiMConfig], adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse adapters whose weighted sum means nothing.

    Raises:
        ValueError: names, weights, or options of the adapters do not fit one another.
    """
    missing = [name for name in adapters if name not in configs]
    if missing or not adapters:
        raise ValueError(f"adapters: must be some of {list(configs)}, got {list(adapters)!r}. Load them first.")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"weights: must be a number for each of the {len(adapters)} adapters, got {list(weights)!r}. Name one each."
        )
    for option in BLOCK_OPTIONS:
        values = {name: getattr(configs[name], option) for name in adapters}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"{option}: must be the same for all adapters that are combined, got {values}: their memory rows are "
                "used in other ways. Combine adapters that were trained with the same blocks."
            )
    for option, (off, left_out) in _NOT_COMBINED.items():
        if having := {name: value for name in adapters if (value := getattr(configs[name], option))}:
            raise ValueError(
                f"{option}: must be {off} for all adapters that are combined, got {having}: PEFT combines LoRA's "
                f"matrices and leaves {left_out} out. Merge one of them into the base instead."
            )


def combine_rows(memory: MemoryEmbedding, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Set an adapter's memory rows to the weighted sum of others'."""
    with torch.no_grad():
        rows = [weight * memory.rows(name) for name, weight in zip(adapters, weights, strict=True)]
        memory.rows(adapter_name).copy_(torch.stack(rows).sum(0))


def use_plain_scaling(model: nn.Module, config: RiMConfig, adapter_name: str) -> None:
    """Let the LoRA of a combined adapter count once, and note its ranks, which a file of it is read by.

    PEFT works the scaling of each adapter into the combined matrices and sets alpha to the rank, for a scaling of 1.
    With rsLoRA, which the new adapter takes over from the first one, it would be the square root of the rank. Ranks
    that some layers have of their own, by ``rank_pattern``, it leaves out of the configuration.
    """
    config.use_rslora = False
    ranks: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            module.use_rslora[adapter_name] = False
            module.set_scale(adapter_name, 1.0)
            matrix: Any = module.lora_A[adapter_name].weight if adapter_name in module.lora_A else None
            if matrix is not None and len(matrix) != config.r:
                ranks[name] = module.r[adapter_name] = len(matrix)
    config.rank_pattern, config.alpha_pattern = ranks, dict(ranks)
