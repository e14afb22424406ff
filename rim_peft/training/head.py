"""A pass over rows with the output head on supervised positions alone: most positions predict nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.profiler import record_function

from rim_peft.sequence import Labels, Layout, attention_masks

FUSED_OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What TRL's trainer asks its fused head for."""


def score_labels(model: Any, base: Any, layout: Layout, labels: Labels) -> Any:
    """Run a model on rows, and its head on the positions that predict something.

    Args:
        model: the model as a trainer calls it, with TRL's fused head.
        base: the model under its adapter.
        layout: R rows, on the model's device.
        labels: the N labels of these rows.

    Returns:
        The fused head's output: ``log_probs`` and ``is_top1``, (1, N) each, of the labels in their order.
    """
    with record_function("rim_peft.mask"):
        mask = attention_masks(base.config, layout, dtype=base.get_output_embeddings().weight.dtype)
    with head_at(base, labels.places), record_function("rim_peft.forward"):
        return model(
            input_ids=layout.input_ids,
            attention_mask=mask,
            position_ids=layout.position_ids,
            shift_labels=labels.token_ids[None],
            fused_lm_head=True,
        )


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
