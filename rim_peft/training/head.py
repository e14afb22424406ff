"""A forward pass with the output head on supervised positions only; compiled layers.

TRL's fused head computes the loss from the backbone's hidden states and the output matrix, without holding all logits.
It knows the scales and caps that some models apply to their logits, but not layers between states and matrix. So it
is compared with the model once, and the model's own head is used if the two differ.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.modeling_layers import GradientCheckpointingLayer

from rim_peft.sequence import IGNORE_INDEX, Labels, Layout
from rim_peft.training.trl_plugin import fuse_head
from rim_peft.tuner.bases import attention_masks, evaluation_mode, input_device, mask_dtype, not_causal
from rim_peft.tuner.small_copy import on_small_copy


class CompiledLayers:
    """While entered, a base's decoder layers run compiled; one compilation serves all layers and row lengths."""

    # Compiling the whole model takes longer, breaks at the output head, and compiles each part again. Compiling
    # permanently would also compile generation, with its caches and one pass per token.

    def __init__(self, base: Any, *, backend: str = "inductor") -> None:
        """Prepare; the first step compiles.

        Args:
            backend: backend of ``torch.compile``.

        Raises:
            ValueError: the model has none of transformers' usual decoder layers.
        """
        self._layers: list[Any] = [layer for layer in base.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not self._layers:
            raise ValueError(
                f"compile_layers: found no decoder layers in {type(base).__name__}, which is not built like "
                "transformers' models. Omit it."
            )
        self._compiled = [torch.compile(layer._call_impl, dynamic=True, backend=backend) for layer in self._layers]

    def __enter__(self) -> None:
        # The attribute that `nn.Module.compile` sets.
        for layer, compiled in zip(self._layers, self._compiled, strict=True):
            layer._compiled_call_impl = compiled

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer._compiled_call_impl = None


logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8


class Head(Enum):
    """Which head scores labels."""

    FUSED = "TRL's fused head"
    OWN = "the model's own head"


class Scores(NamedTuple):
    """Scores from the model's own head, named like the fused head's outputs.

    Attributes:
        log_probs: each label's log-probability, float32; 0 at positions without a label.
        is_top1: whether the label was the likeliest token.
    """

    log_probs: Tensor
    is_top1: Tensor


def score_labels(model: Any, base: Any, layout: Layout, labels: Labels, *, head: Head = Head.FUSED) -> Any:
    """Run a model on rows, and its head on the positions that predict a label.

    Args:
        model: the model as a trainer calls it, with TRL's fused head.
        layout: R rows, on the model's device.
        labels: the N labels of these rows.

    Returns:
        ``log_probs`` and ``is_top1``, (1, N) each, in the order of the labels.
    """
    with record_function("rim_peft.mask"):
        mask = attention_masks(base.config, layout, dtype=mask_dtype(base))
    with head_at(base, labels.places), record_function("rim_peft.forward"):
        return run_head(
            model,
            labels.token_ids[None],
            head=head,
            input_ids=layout.input_ids,
            attention_mask=mask,
            position_ids=layout.position_ids,
        )


def run_head(model: Any, token_ids: Tensor, *, head: Head, **inputs: Any) -> Any:
    """Run a model and score a token at each position that reaches its head.

    Args:
        token_ids: (R, N) the tokens, -100 for none.

    Returns:
        ``log_probs`` and ``is_top1``, (R, N) each.
    """
    if head is Head.FUSED:
        return model(**inputs, shift_labels=token_ids, fused_lm_head=True)
    logits = model(**{**inputs, "use_cache": False}).logits.float()
    token_ids = token_ids.to(logits.device)
    is_label = token_ids != IGNORE_INDEX
    log_probs = logits.log_softmax(-1).gather(-1, token_ids.clamp(min=0)[..., None])[..., 0]
    return Scores(log_probs.masked_fill(~is_label, 0.0), (logits.argmax(-1) == token_ids) & is_label)


@contextmanager
def head_at(base: Any, places: Tensor) -> Iterator[None]:
    """While entered, the base's head gets only the hidden states at ``places``, as one row (1, N, H).

    Args:
        places: (N,) indices into the R·S tokens, row by row.
    """

    def select(backbone: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state  # on another device than `places` if the base is spread over several
        output.last_hidden_state = hidden.flatten(0, 1)[places.to(hidden.device)][None]
        return output

    hook = base.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def choose_head(base: Any, *, is_sharded: bool = False) -> Head:
    """Return the head that reproduces a base's own probabilities on two short rows.

    Does not change modes, weights or random state.

    Args:
        base: the model under the adapter, with TRL's fused head.
        is_sharded: whether weights will be sharded over processes; until then they are on the CPU, where a pass would
            take long, so a small copy is tried first.

    Raises:
        ValueError: the base's tokens attend to later ones, or no head gives its probabilities.
    """
    found = find_head(base) if is_sharded else None
    found = _try_heads(base) if found is None else found
    head = check_heads(base, found)
    if head is Head.OWN:
        logger.warning(
            "model: TRL's fused head does not give the logits of %s, so training uses its own head, which takes more "
            "memory.",
            type(base).__name__,
        )
    return head


class FoundHead(NamedTuple):
    """Result of trying the heads.

    Attributes:
        head: the one that gives the model's own probabilities; None if neither does.
        is_causal: whether a token changes nothing before it.
    """

    head: Head | None
    is_causal: bool


def check_heads(base: Any, found: FoundHead) -> Head:
    """Return the head to train a base with.

    Raises:
        ValueError: its tokens attend to later ones, or no head gives its own probabilities.
    """
    if not found.is_causal:
        raise ValueError(not_causal(base))
    if found.head is None:
        raise ValueError(
            f"model: its logits must follow from its backbone's last hidden state, token by token, got "
            f"{type(base).__name__}, whose own probabilities are different. Use another base."
        )
    return found.head


def find_head(model: Any) -> FoundHead | None:
    """Try the heads on a small copy of a model, without its weights; None if there is no small copy."""

    def try_copy(copy: Any) -> FoundHead:
        fuse_head(copy)
        return _try_heads(copy)

    found: FoundHead | None = on_small_copy(model, try_copy)
    return found


@torch.no_grad()
def _try_heads(base: Any) -> FoundHead:
    """Compare the heads with a model's own logits, on two rows that differ in their last token."""
    with evaluation_mode(base):
        size = base.get_input_embeddings().weight.shape[0]
        ids = torch.arange(7, 7 + 13 * _PROBE_TOKENS, 13, device=input_device(base)).repeat(2, 1)
        ids[1, -1] += 1
        logits = base(input_ids=ids % size, use_cache=False).logits.float()
        is_causal = _distance(logits[0, :-1], logits[1, :-1], scale=logits) <= (1e-3 if _is_exact(base) else 0.05)
        return FoundHead(next((head for head in Head if _agrees(base, head, ids % size, logits)), None), is_causal)


def _agrees(base: Any, head: Head, ids: Tensor, logits: Tensor) -> bool:
    """Whether a head that gets only some places agrees with the (2, S, V) logits."""
    places = torch.arange(0, ids.numel(), 3, device=ids.device)
    labels = ids.flatten()[places].roll(1)
    expected = logits.log_softmax(-1).flatten(0, 1)[places.to(logits.device)]
    expected = expected.gather(-1, labels.to(logits.device)[:, None])[:, 0]
    try:
        with head_at(base, places):
            scores = run_head(base, labels[None], head=head, input_ids=ids)
        found = scores.log_probs[0].float().to(expected.device)
    except Exception as error:  # a head of an unknown kind can fail anywhere
        logger.debug("%s fails: %s", head.value, error)
        return False
    return _distance(found, expected, scale=logits) <= (1e-3 if _is_exact(base) else 0.02)


def _distance(one: Tensor, other: Tensor, *, scale: Tensor) -> float:
    """Return the largest difference relative to the largest logit."""
    return float((one - other).abs().max() / scale.abs().max())


def _is_exact(base: Any) -> bool:
    """Whether a base computes in float32, so that the order of sums hardly matters."""
    return mask_dtype(base) == torch.float32 and getattr(base, "hf_quantizer", None) is None
