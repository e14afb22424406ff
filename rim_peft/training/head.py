"""The output head on supervised positions alone: a row's other positions predict nothing, and most are of that kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def head_at(base: Any, places: Tensor) -> Iterator[None]:
    """While entered, the base's head is given the hidden states at some places alone, as one row (1, N, H).

    Args:
        base: the model under the adapter.
        places: (N,) index among the R·S tokens, row after row.
    """

    def select(backbone: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state  # on another device than the places where a base is spread over several
        output.last_hidden_state = hidden.flatten(0, 1)[places.to(hidden.device)][None]
        return output

    hook = base.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()
