"""Weights of a base without data: tensors with the shapes and types of real ones, quantised ones included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def make_fake(model: nn.Module) -> list[Tensor]:
    """Replace a ``meta`` model's weights in place by fake ones on the CPU; tied weights stay tied.

    Returns:
        The extra tensors of quantised weights.
    """
    made: dict[Tensor, nn.Parameter] = {}
    states: list[Tensor] = []
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and type(module).__name__ in _QUANTIZED:
            states += _QUANTIZED[type(module).__name__](module)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                empty = torch.empty_like(parameter, device="cpu")
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    return states


def _make_4bit(layer: Any) -> list[Tensor]:
    """Give a ``bitsandbytes.nn.Linear4bit`` a packed weight, as loading does; return its scales."""
    from bitsandbytes.functional import QuantState

    weight, shape = layer.weight, layer.weight.shape
    num_scales = -(-weight.numel() // weight.blocksize)
    scales = torch.empty(num_scales, dtype=torch.uint8 if weight.compress_statistics else torch.float32)
    tensors = [scales, torch.empty(16)]
    nested: dict[str, Any] = {}
    if weight.compress_statistics:  # the scales are quantised too
        tensors += [torch.empty(()), torch.empty(-(-num_scales // _NESTED_BLOCK)), torch.empty(256)]
        inner = QuantState(absmax=tensors[3], code=tensors[4], blocksize=_NESTED_BLOCK, dtype=torch.float32)
        nested = {"offset": tensors[2], "state2": inner}
    packed: Any = nn.Parameter(torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = QuantState(
        absmax=scales,
        shape=shape,
        code=tensors[1],
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
        dtype=layer.compute_dtype or weight.dtype,
        **nested,
    )
    packed.bnb_quantized, packed.module = True, layer
    layer._parameters["weight"] = packed
    return tensors + _fake_bias(layer)


def _make_8bit(layer: Any) -> list[Tensor]:
    """Give a ``bitsandbytes.nn.Linear8bitLt`` its int8 weight; return its scales."""
    weight: Any = nn.Parameter(torch.empty(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    scales = torch.empty(layer.weight.shape[0])
    weight.CB, weight.SCB, weight.has_fp16_weights = weight.data, scales, False
    layer._parameters["weight"] = weight
    layer.state.CB, layer.state.SCB = weight.data, scales
    return [scales, *_fake_bias(layer)]


def _fake_bias(layer: nn.Module) -> list[Tensor]:
    bias = layer._parameters["bias"]
    if bias is not None:
        layer._parameters["bias"] = nn.Parameter(torch.empty_like(bias, device="cpu"), requires_grad=False)
    return []


_QUANTIZED = {"Linear4bit": _make_4bit, "Linear8bitLt": _make_8bit}
"""Functions that fill a bitsandbytes layer, by its class."""

_NESTED_BLOCK = 256
"""How many quantised scales share one scale, as in bitsandbytes."""
