"""Compiling a base's layers for training steps."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


class CompiledLayers:
    """While entered, a base's decoder layers run compiled: one compilation serves all layers and all row lengths.

    Not the model as a whole, which takes longer, breaks at the output head, and is compiled anew for each part. And not
    for good: answers, with their caches and their pass for each token, would be compiled too.
    """

    def __init__(self, base: Any, *, backend: str = "inductor") -> None:
        """Get ready; the first step compiles.

        Args:
            base: the model under the adapter.
            backend: what makes the code, as for ``torch.compile``.

        Raises:
            ValueError: the model has no layers of transformers' usual kind.
        """
        self._layers: list[Any] = [layer for layer in base.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not self._layers:
            raise ValueError(
                f"compile_layers: found no decoder layers in {type(base).__name__}, which is not built as "
                "transformers' models are. Leave it out."
            )
        self._compiled = [torch.compile(layer._call_impl, dynamic=True, backend=backend) for layer in self._layers]

    def __enter__(self) -> None:
        # What `nn.Module.compile` sets.
        for layer, compiled in zip(self._layers, self._compiled, strict=True):
            layer._compiled_call_impl = compiled

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer._compiled_call_impl = None
