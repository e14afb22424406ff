"""A base's decoder layers: where they are, how they are called, and whether blocks can depart from causal there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rim_peft.tuner.config import RiMConfig

_IMPLEMENTATIONS = ("eager", "sdpa")


class Arguments:
    """The arguments of one call, by name, however they were passed."""

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.names = names
        self.args = list(args)
        self.kwargs = dict(kwargs)

    def get(self, *names: str) -> Any:
        """The first of some arguments that is given and not None."""
        for name in names:
            index = self.names.index(name) if name in self.names else len(self.args)
            value = self.args[index] if index < len(self.args) else self.kwargs.get(name)
            if value is not None:
                return value
        return None

    def put(self, name: str, value: Any) -> None:
        """Pass another value."""
        index = self.names.index(name) if name in self.names else len(self.args)
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value


def input_device(model: nn.Module) -> torch.device:
    """Return where a model's inputs go: to its first weights that are not offloaded."""
    devices = [parameter.device for parameter in model.parameters()]
    return next((device for device in devices if device.type != "meta"), devices[0])


def parameter_names(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's ``forward``, ``self`` left out."""
    # The class's own: what wraps a module's forward (accelerate) takes anything.
    return list(inspect.signature(type(module).forward).parameters)[1:]


def find_layers(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """Return the decoder of a causal language model, which runs the layers, and its layers.

    Raises:
        ValueError: the model is not built as transformers' decoders are.
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
            "insertion_layer, bidirectional_blocks: need a decoder with layers of transformers' usual kind, got "
            f"{type(model).__name__}. Leave both out, or use another base."
        )
    return found[0]


def check_variants(config: RiMConfig, model: Any) -> None:
    """Refuse options of blocks that a base's layers cannot follow.

    Raises:
        ValueError: ``insertion_layer`` is not one of the base's layers, or layers, masks or attention are of a kind
            that cannot be changed for blocks.
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
            "the keys of lower ones, where blocks are not there yet. Leave it out."
        )
    if config.bidirectional_blocks and any(_has_causal_buffer(layer) for layer in layers):
        raise ValueError(
            f"bidirectional_blocks: must be False for {type(model).__name__}, got True: its attention is causal "
            "whatever the mask says. Leave it out, or use another base."
        )


def check_implementation(config: RiMConfig, model_config: Any) -> None:
    """Refuse attention that takes no mask per query; it can be changed after an adapter was attached."""
    implementation = model_config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation: must be 'eager' or 'sdpa' with {config.describe_variants()}, got "
            f"{implementation!r}, which takes no dense mask. Load the base with attn_implementation='sdpa'."
        )


def check_uncompiled(name: str, config: RiMConfig) -> None:
    """Refuse compiled layers where blocks change what goes into each layer; ``name`` is the option that asks for it.

    Raises:
        ValueError: the adapter has ``insertion_layer`` or ``bidirectional_blocks``.
    """
    if config.changes_layers:
        raise ValueError(
            f"{name}: must be False with {config.describe_variants()}, got True: what goes into each layer is changed "
            "outside of compiled code. Leave it out."
        )


def _is_usual(decoder: nn.Module, layers: list[nn.Module]) -> bool:
    # What the decoder does not know it hands on to its layers: so they learn of a pass's blocks.
    parameters = inspect.signature(type(decoder).forward).parameters.values()
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    known = [{"hidden_states", "attention_mask"} <= set(parameter_names(layer)) for layer in layers]
    return takes_more and "input_ids" in parameter_names(decoder) and all(known)


def _has_causal_buffer(layer: nn.Module) -> bool:
    """Whether attention holds a (1, 1, N, N) triangle of its own, as GPT-Neo's does."""
    shapes = [tuple(b.shape) for b in layer.buffers() if b.dtype in (torch.bool, torch.uint8)]
    return any(len(shape) == 4 and shape[-1] == shape[-2] > 1 for shape in shapes)
