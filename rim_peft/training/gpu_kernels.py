"""What a GPU's kernels hold where a CPU's hold more, for a step that is simulated on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl.kernels import chunked_logprob

_attention = functional.scaled_dot_product_attention


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """While entered, operations make what they would on a GPU; for tensors without data, since results are wrong.

    * Dropout keeps a mask of one byte for each number, not the numbers that it multiplies with.
    * Attention draws its dropout anew in backward, so that it keeps no probabilities.
    * TRL's fused head works on a tile of logits in place.
    """
    replaced: list[tuple[Any, str, Any]] = [
        (functional, "dropout", _dropout),
        (functional, "scaled_dot_product_attention", _attend),
        (chunked_logprob, "_forward_tile", _in_place),
        (chunked_logprob, "_backward_tile", _in_place),
        (chunked_logprob, "_addmm_fp32", _in_place),
    ]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, kernel in replaced:
        setattr(owner, name, kernel)
    try:
        yield
    finally:
        for (owner, name, _), kernel in zip(replaced, before, strict=True):
            setattr(owner, name, kernel)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attend(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
    return _attention(*args, **kwargs)


def _in_place(*args: Any, **kwargs: Any) -> None:
    """Do nothing: what is held stays as it is."""
