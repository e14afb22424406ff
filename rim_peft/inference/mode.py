"""Evaluation mode for as long as a model answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules of a model into evaluation mode while entered; each gets its own mode back.

    One by one: an adapter added to a model in evaluation mode is in training mode, and parts of a model in training may
    be kept in evaluation mode.
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
