"""How much an optimiser keeps for what it trains, by the name that ``optim`` gives it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_FLOAT = 4
"""Bytes of a float32: the type of the adapter, and so of its optimiser's states."""
_NUM_STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}
"""Numbers that are kept for each trained one, in optimisers that keep the same for all."""
_WITH_MOMENTUM = ("sgd", "rmsprop")
_TORCH = re.compile(r"(adamw)_torch(?:_fused)?|(sgd|adagrad|rmsprop)")
_BITSANDBYTES = re.compile(r"(?:paged_)?(adamw|ademamix|lion|rmsprop)(?:_bnb)?(_8bit|_32bit)?")
_LEAST_8BIT, _BLOCK = 4096, 256
"""bitsandbytes: numbers of a tensor from which on its states are 8-bit, and numbers that share one scale."""


def optimizer_bytes(optim: str, shapes: Iterable[tuple[int, ...]], *, has_momentum: bool = False) -> int | None:
    """Return the bytes of an optimiser's state; None for an optimiser that is not known here.

    States that bitsandbytes pages are counted too: they lie on the GPU as long as there is room.

    >>> optimizer_bytes("adamw_torch", [(100, 10)])
    8000
    >>> optimizer_bytes("adafactor", [(100, 10)])
    440

    Args:
        optim: the option ``optim`` of ``TrainingArguments``.
        shapes: of the trained tensors, float32 each.
        has_momentum: whether ``sgd`` or ``rmsprop`` is given a momentum.
    """
    shapes = list(shapes)
    if optim == "adafactor":  # one number for each row and each column
        return _FLOAT * sum(sum(shape) if len(shape) == 2 else math.prod(shape) for shape in shapes)
    if found := _TORCH.fullmatch(optim):
        num_states = _NUM_STATES[found[1] or found[2]] + (found[2] in _WITH_MOMENTUM and has_momentum)
        return _FLOAT * num_states * sum(map(math.prod, shapes))
    if found := _BITSANDBYTES.fullmatch(optim):
        sizes = [math.prod(shape) for shape in shapes]
        if found[2] != "_8bit":
            return _FLOAT * _NUM_STATES[found[1]] * sum(sizes)
        return _NUM_STATES[found[1]] * sum(map(_bytes_8bit, sizes))
    return None


def _bytes_8bit(size: int) -> int:
    """Return the bytes of one state of a tensor, which is left in float32 where it is small."""
    return size + _FLOAT * math.ceil(size / _BLOCK) if size >= _LEAST_8BIT else _FLOAT * size
