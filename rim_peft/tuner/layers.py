"""The decoder layers of a base: which there are, how they are called, and which block options they support."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rim_peft.tuner.bases import attention_of
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
