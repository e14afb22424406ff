"""The memory of a training step, found without weights and without computing: tensors have shapes and no data."""

from __future__ import annotations

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer.utils import add_fused_lm_head

from rim_peft.sequence import Layout
from rim_peft.training.attachment import is_8_bit
from rim_peft.training.gpu_kernels import gpu_kernels
from rim_peft.training.head import FUSED_OUTPUTS, Head, score_labels
from rim_peft.training.losses import label_weights, readout_loss

LAYERS, HEAD, GRADIENTS = "activations", "logits", "gradients"


@dataclass(frozen=True)
class StepMemory:
    """Bytes that training holds, but for the optimiser's state.

    Attributes:
        weights: of the base, with its buffers and what quantised weights need besides.
        adapter: of memory rows and LoRA.
        gradients: of the adapter, as far as they are there at the step's peak.
        activations: of the layers: what backward needs, and what is held for a moment.
        logits: of the output head, on supervised positions.
        most_logits: what the head holds at most, which with checkpointing is rarely when the step is at its peak.
    """

    weights: int
    adapter: int
    gradients: int
    activations: int
    logits: int
    most_logits: int

    @property
    def step(self) -> int:
        """Bytes that a step takes at its peak, on top of what is held between steps."""
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
    """Run forward and backward of a stage's loss on tensors without data, and add up what is held.

    Every operation is dispatched as in a real step and makes outputs of the real shapes and types, so that the figure
    is that of a CPU's allocator, but for what kernels use inside themselves.

    Args:
        model: the base with a RIM adapter on the device ``meta``, its layers those of bitsandbytes if it is to be
            quantised; it is of no use afterwards.
        layout: the batch's rows as a stage arranges them, on the CPU.
        weights: (D, K) loss weights of the readouts.
        checkpointing: whether layers are computed again in backward, as ``gradient_checkpointing`` does.
        reentrant: which kind of checkpointing; None for the one that :func:`checkpoint_for` would choose.
        autocast: type of mixed precision, None for none.
        accumulates: whether the gradients of a batch before are there already, as with ``gradient_accumulation_steps``.
        on_gpu: whether kernels hold what a GPU's do (:mod:`rim_peft.training.gpu_kernels`).
        head: what scores labels.

    Returns:
        What the step holds at its peak. The optimiser's own step is not in it; it holds less than backward does but in
        very small batches.
    """
    base: Any = model.get_base_model()
    labels = layout.labels()
    tracker = _Tracker()
    # Row indices and labels are real: which places are picked, and how many, decides shapes.
    with FakeTensorMode(allow_non_fake_inputs=True):
        states = _make_fake(model)
        add_fused_lm_head(base, outputs=FUSED_OUTPUTS)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": is_8_bit(base) if reentrant is None else reentrant})
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
    """Adds up the storages that operations make and that are still held, by the part of the model that made them."""

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
        """Count the gradients of a model's parameters by themselves; ``accumulates`` if they are there already."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._found_gradient)
                if accumulates:
                    parameter.grad = torch.empty_like(parameter)
                    self._count(parameter.grad.untyped_storage(), GRADIENTS)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made; a view makes nothing."""
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
        """Move what backward made of a parameter's gradient from the part that made it."""
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


def _make_fake(model: nn.Module) -> list[Tensor]:
    """Give a model on the device ``meta`` weights that say they lie on the CPU, in place; tied ones stay tied.

    Returns:
        Tensors that quantised weights need besides.
    """
    made: dict[Tensor, nn.Parameter] = {}
    states: list[Tensor] = []
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and type(module).__name__ in _QUANTIZED:
            states += _QUANTIZED[type(module).__name__](module)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                empty = torch.empty_like(parameter, device="cpu")
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    return states


def _make_4bit(layer: Any) -> list[Tensor]:
    """Give a ``bitsandbytes.nn.Linear4bit`` a packed weight, as loading it would; return its scales."""
    from bitsandbytes.functional import QuantState

    weight, shape = layer.weight, layer.weight.shape
    num_scales = -(-weight.numel() // weight.blocksize)
    scales = torch.empty(num_scales, dtype=torch.uint8 if weight.compress_statistics else torch.float32)
    tensors = [scales, torch.empty(16)]
    nested: dict[str, Any] = {}
    if weight.compress_statistics:  # the scales are quantised once more
        tensors += [torch.empty(()), torch.empty(-(-num_scales // _NESTED_BLOCK)), torch.empty(256)]
        inner = QuantState(absmax=tensors[3], code=tensors[4], blocksize=_NESTED_BLOCK, dtype=torch.float32)
        nested = {"offset": tensors[2], "state2": inner}
    packed: Any = nn.Parameter(torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = QuantState(
        absmax=scales,
        shape=shape,
        code=tensors[1],
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
        dtype=layer.compute_dtype or weight.dtype,
        **nested,
    )
    packed.bnb_quantized, packed.module = True, layer
    layer._parameters["weight"] = packed
    return tensors + _fake_bias(layer)


def _make_8bit(layer: Any) -> list[Tensor]:
    """Give a ``bitsandbytes.nn.Linear8bitLt`` its int8 weight; return its scales."""
    weight: Any = nn.Parameter(torch.empty(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    scales = torch.empty(layer.weight.shape[0])
    weight.CB, weight.SCB, weight.has_fp16_weights = weight.data, scales, False
    layer._parameters["weight"] = weight
    layer.state.CB, layer.state.SCB = weight.data, scales
    return [scales, *_fake_bias(layer)]


def _fake_bias(layer: nn.Module) -> list[Tensor]:
    bias = layer._parameters["bias"]
    if bias is not None:
        layer._parameters["bias"] = nn.Parameter(torch.empty_like(bias, device="cpu"), requires_grad=False)
    return []


_QUANTIZED = {"Linear4bit": _make_4bit, "Linear8bitLt": _make_8bit}
"""What fills a layer of bitsandbytes, by its class."""
_NESTED_BLOCK = 256
"""Scales that share one scale where they are quantised themselves: bitsandbytes' own number."""


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _cloned(layout: Layout) -> Layout:
    """Return a copy, which like a batch that was sent to a device is counted."""
    return Layout(**{name: tensor.clone() for name, tensor in layout.to_dict().items()})
