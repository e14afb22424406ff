"""Measure the memory of a training step without weights or computation, on tensors with shapes but no data."""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rim_peft.sequence import Layout
from rim_peft.training.attachment import is_8_bit
from rim_peft.training.fake_weights import make_fake
from rim_peft.training.head import Head, score_labels
from rim_peft.training.losses import label_weights, readout_loss
from rim_peft.training.trl_plugin import FUSED_TILES, fuse_head

_attention = functional.scaled_dot_product_attention


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """While entered, operations allocate what they would on a GPU; only for tensors without data: results are wrong.

    * Dropout keeps a mask of one byte per number, not the factors.
    * Attention draws its dropout again in backward, so it keeps no probabilities.
    * TRL's fused head works in place on a tile of logits.
    """
    replaced: list[tuple[Any, str, Any]] = [
        (functional, "dropout", _dropout),
        (functional, "scaled_dot_product_attention", _attend),
        *((module, name, _in_place) for module, name in FUSED_TILES),
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
    """Allocate nothing."""


_FLOAT = 4
"""Bytes of a float32, the type of the adapter and so of its optimiser's states."""
_NUM_STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}
"""Numbers kept for each trained number, in optimisers that treat all tensors alike."""
_WITH_MOMENTUM = ("sgd", "rmsprop")
_TORCH = re.compile(r"(adamw)_torch(?:_fused)?|(sgd|adagrad|rmsprop)")
_BITSANDBYTES = re.compile(r"(?:paged_)?(adamw|ademamix|lion|rmsprop)(?:_bnb)?(_8bit|_32bit)?")
_LEAST_8BIT, _BLOCK = 4096, 256
"""bitsandbytes: smallest tensor with 8-bit states, and how many numbers share one scale."""


def optimizer_bytes(optim: str, shapes: Iterable[tuple[int, ...]], *, has_momentum: bool = False) -> int | None:
    """Return the bytes of an optimiser's state; None for an unknown optimiser.

    Paged states of bitsandbytes are counted too: they stay on the GPU as long as there is room.

    >>> optimizer_bytes("adamw_torch", [(100, 10)])
    8000
    >>> optimizer_bytes("adafactor", [(100, 10)])
    440

    Args:
        optim: the option ``optim`` of ``TrainingArguments``.
        shapes: shapes of the trained tensors, all float32.
        has_momentum: whether ``sgd`` or ``rmsprop`` uses momentum.
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
    """Return the bytes of one state of a tensor; small tensors' states stay float32."""
    return size + _FLOAT * math.ceil(size / _BLOCK) if size >= _LEAST_8BIT else _FLOAT * size


LAYERS, HEAD, GRADIENTS = "activations", "logits", "gradients"


@dataclass(frozen=True)
class StepMemory:
    """Bytes that training holds, except for the optimiser's state.

    Attributes:
        weights: the base's weights and buffers, and the extra tensors of quantised weights.
        adapter: memory rows and LoRA.
        gradients: the adapter's gradients that exist at the step's peak.
        activations: activations of the layers: those kept for backward, and temporary ones.
        logits: tensors of the output head, on supervised positions.
        most_logits: the head's own peak, which with checkpointing rarely coincides with the step's.
    """

    weights: int
    adapter: int
    gradients: int
    activations: int
    logits: int
    most_logits: int

    @property
    def step(self) -> int:
        """Bytes of a step at its peak, on top of what is held between steps."""
        return self.gradients + self.activations + self.logits


def simulate_step(
    model: PeftModel,
    layout: Layout,
    weights: Tensor,
    *,
    checkpointing: bool = False,
    reentrant: bool | None = None,
    autocast: torch.dtype | None = None,
    accumulates: bool = False,
    on_gpu: bool = False,
    head: Head = Head.FUSED,
) -> StepMemory:
    """Run forward and backward of a stage's loss on tensors without data, and add up the memory held.

    Every operation is dispatched as in a real step and returns outputs of the real shapes and types, so the result
    equals a CPU allocator's figure, except for memory used inside kernels.

    Args:
        model: the base with a RIM adapter on the device ``meta``, with bitsandbytes layers if it is to be quantised;
            consumed by this call.
        layout: the batch's rows as a stage arranges them, on the CPU.
        weights: (D, K) loss weights of the readouts.
        checkpointing: whether layers are computed again in backward, as with ``gradient_checkpointing``.
        reentrant: the kind of checkpointing; None for the one that :func:`checkpoint_for` would choose.
        autocast: type of mixed precision, None for none.
        accumulates: whether an earlier batch's gradients exist already, as with ``gradient_accumulation_steps``.
        on_gpu: whether kernels hold what a GPU's kernels hold (:func:`gpu_kernels`).

    Returns:
        The bytes at the step's peak. The optimiser's own step is not included; it holds less than backward except in
        very small batches.
    """
    base: Any = model.get_base_model()
    labels = layout.labels()
    tracker = _Tracker()
    # Row indices and labels are real, since they decide shapes.
    with FakeTensorMode(allow_non_fake_inputs=True):
        states = make_fake(model)
        fuse_head(base)
        if checkpointing:
            # transformers' new name for it, where it is there, and the old one, of which it then warns
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": is_8_bit(base) if reentrant is None else reentrant})
            base.enable_input_require_grads()
        model.train()
        held = [*model.parameters(), *model.buffers(), *states]
        tracker.leave_out(*held)
        tracker.follow_gradients(model, accumulates=accumulates)
        mixed = torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext()
        with tracker, _told_where(base, tracker), gpu_kernels() if on_gpu else nullcontext():
            with mixed:
                outputs = score_labels(model, base, _cloned(layout), labels, head=head)
                loss = readout_loss(outputs.log_probs[0], label_weights(weights, labels), num_samples=len(weights))
            loss.backward()
    adapter = _num_bytes(tensor for tensor in held if tensor.requires_grad)
    parts = {part: tracker.at_peak[part] for part in (GRADIENTS, LAYERS, HEAD)}
    return StepMemory(weights=_num_bytes(held) - adapter, adapter=adapter, most_logits=tracker.most_logits, **parts)


class _Tracker(TorchDispatchMode):
    """Adds up the storages that operations allocate and that are still held, by the part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.part = LAYERS
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.most_logits = 0
        self._parts: dict[int, str | None] = {}

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count these tensors' storages."""
        self._parts.update((tensor.untyped_storage()._cdata, None) for tensor in tensors)

    def follow_gradients(self, model: nn.Module, *, accumulates: bool) -> None:
        """Count the gradients of a model's parameters separately; ``accumulates`` if they exist already."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._found_gradient)
                if accumulates:
                    parameter.grad = torch.empty_like(parameter)
                    self._count(parameter.grad.untyped_storage(), GRADIENTS)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it allocated; a view allocates nothing."""
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), self.part)
        return found

    def _count(self, storage: torch.UntypedStorage, part: str) -> None:
        if storage._cdata in self._parts:
            return
        self._parts[storage._cdata] = part
        self.held[part] += storage.nbytes()
        self.most_logits = max(self.most_logits, self.held[HEAD])
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        if self.held.total() > self.at_peak.total():
            self.at_peak = self.held.copy()

    def _found_gradient(self, parameter: Tensor) -> None:
        """Move a parameter's new gradient to the gradients, from the part whose backward pass made it."""
        storage: Any = parameter.grad.untyped_storage() if parameter.grad is not None else None
        part = self._parts.get(storage._cdata) if storage is not None else None
        if part is not None:
            self.held[part] -= storage.nbytes()
            self.held[GRADIENTS] += storage.nbytes()
            self._parts[storage._cdata] = GRADIENTS

    def _forget(self, storage: int, size: int) -> None:
        part = self._parts.pop(storage)
        if part is not None:
            self.held[part] -= size


@contextmanager
def _told_where(base: Any, tracker: _Tracker) -> Iterator[None]:
    """While entered, tell the tracker when the head computes: after the layers, until backward reaches them."""

    def enter(backbone: nn.Module, args: Any, output: Any) -> None:
        tracker.part = HEAD
        output.last_hidden_state.register_hook(leave)

    def leave(gradient: Tensor) -> None:
        tracker.part = LAYERS

    hook = base.base_model.register_forward_hook(enter)
    try:
        yield
    finally:
        hook.remove()


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _cloned(layout: Layout) -> Layout:
    """Return a copy, so that the batch is counted as if sent to a device."""
    return Layout(**{name: tensor.clone() for name, tensor in layout.to_dict().items()})
