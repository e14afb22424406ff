"""Compiling a base's layers for training."""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(base: Any, *, backend: str = "inductor") -> None:
    """Compile every decoder layer in place: one compilation serves all layers and all row lengths.

    Not the model as a whole, which takes longer, breaks at the output head, and is compiled anew for each part.

    Args:
        base: the model under the adapter.
        backend: what makes the code, as for ``torch.compile``.

    Raises:
        ValueError: the model has no layers of transformers' usual kind.
    """
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"compile_layers: found no decoder layers in {type(base).__name__}, which is not built as transformers' "
            "models are. Leave it out."
        )
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
