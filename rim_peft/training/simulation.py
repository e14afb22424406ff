"""The memory of a training step, found without weights and without computing: tensors have shapes and no data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer.utils import add_fused_lm_head

from rim_peft.sequence import Layout
from rim_peft.training.head import FUSED_OUTPUTS, score_labels
from rim_peft.training.losses import label_weights, readout_loss

LAYERS, HEAD = "activations", "logits"


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step holds at its peak, beside weights and optimiser.

    Attributes:
        activations: of the layers: what backward needs, gradients, and what is held for a moment.
        logits: of the output head, on supervised positions.
    """

    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.activations + self.logits


def simulate_step(
    model: PeftModel,
    layout: Layout,
    weights: Tensor,
    *,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> StepMemory:
    """Run forward and backward of a stage's loss on tensors without data, and add up what is held.

    Every operation is dispatched as in a real step and makes outputs of the real shapes and types, so that the figure
    is that of a CPU's allocator, but for what kernels use inside themselves. A GPU's attention kernels keep about as
    much.

    Args:
        model: the base with a RIM adapter on the device ``meta``; it is of no use afterwards.
        layout: the batch's rows as a stage arranges them, on the CPU.
        weights: (D, K) loss weights of the readouts.
        checkpointing: whether layers are computed again in backward, as ``gradient_checkpointing`` does.
        autocast: type of mixed precision, None for none.

    Returns:
        What the step holds at its peak. The optimiser's own step is not in it; it holds less than backward does but in
        very small batches.
    """
    base: Any = model.get_base_model()
    labels = layout.labels()
    tracker = _Tracker()
    # Row indices and labels are real: which places are picked, and how many, decides shapes.
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        add_fused_lm_head(base, outputs=FUSED_OUTPUTS)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        model.train()
        tracker.leave_out(*model.parameters(), *model.buffers())
        mixed = torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext()
        with tracker, _told_where(base, tracker):
            with mixed:
                outputs = score_labels(model, base, _cloned(layout), labels)
                loss = readout_loss(outputs.log_probs[0], label_weights(weights, labels), num_samples=len(weights))
            loss.backward()
    return StepMemory(tracker.at_peak[LAYERS], tracker.at_peak[HEAD])


class _Tracker(TorchDispatchMode):
    """Adds up the storages that operations make and that are still held, by the part of the model that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.part = LAYERS
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._known: set[int] = set()

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count these tensors' storages."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made; a view makes nothing."""
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.held[self.part] += storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata, self.part, storage.nbytes())
        if self.held.total() > self.at_peak.total():
            self.at_peak = self.held.copy()

    def _forget(self, storage: int, part: str, size: int) -> None:
        self._known.discard(storage)
        self.held[part] -= size


@contextmanager
def _told_where(base: Any, tracker: _Tracker) -> Iterator[None]:
    """While entered, the tracker knows when the head computes: behind the layers, until backward reaches them."""

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


def _make_fake(model: nn.Module) -> None:
    """Give a model on the device ``meta`` weights that say they lie on the CPU, in place; tied ones stay tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                empty = torch.empty_like(parameter, device="cpu")
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _cloned(layout: Layout) -> Layout:
    """Return a copy, which like a batch that was sent to a device is counted."""
    return Layout(**{name: tensor.clone() for name, tensor in layout.to_dict().items()})
