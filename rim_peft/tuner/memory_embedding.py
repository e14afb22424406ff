"""Memory rows, looked up by virtual token ids in a layer around the base's input embedding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rim_peft.tuner.config import NUM_ROWS, RiMConfig

BASE = "__base__"
"""PEFT's name for no adapter in ``adapter_names``."""

_ROWS_PER_CHUNK = 8192
_TOKEN_NOISE = 0.1
"""Noise on rows copied from tokens, in units of the vocabulary's spread: enough to make equal rows differ."""


class MemoryEmbedding(nn.Module, BaseTunerLayer):
    """The base's input embedding plus, for each adapter, three memory rows with the ids ``V``, ``V + 1``, ``V + 2``.

    The rows are (3, H) float32, whatever the base's dtype, in the units of the base's embedding matrix: a lookup gives
    exactly what the base would give if the row were in its matrix, including scaling (Gemma) and dtype. The matrix
    itself, and a head tied to it, do not change, so the model can never emit a memory token.
    """

    adapter_layer_names = ("lora_rim_memory",)
    other_param_names = ()
    row_adapters: Sequence[str] | None = None
    """Each row's adapter, or ``__base__``, while a batch with several adapters runs."""
    has_trained = False
    """Whether a training pass with memory was seen; until then :meth:`forward` looks for passes without memory."""

    def __init__(self, base_layer: nn.Module, first_memory_id: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.first_memory_id = first_memory_id
        self.lora_rim_memory = nn.ModuleDict({})
        self.scaling: dict[str, float] = {}  # PEFT sets this in all layers when it swaps adapters; rows do not use it
        self.merged_adapters: list[str] = []
        self.num_blocks: dict[str, int] = {}

    def add_adapter(self, adapter_name: str, config: RiMConfig, *, initializer_range: float) -> None:
        """Add an adapter's rows, initialised by ``config.init_memory`` with torch's random numbers."""
        self.num_blocks[adapter_name] = config.num_blocks
        with self.readable_weight() as weight:
            rows = nn.Embedding(NUM_ROWS, weight.shape[1], dtype=torch.float32)
            self.lora_rim_memory[adapter_name] = rows
            self.scaling[adapter_name] = 1.0
            if config.init_lora_weights == "eva" and rows.weight.is_meta and not weight.is_meta:
                rows.to_empty(device=weight.device)  # PEFT initialises only LoRA after this, not the rows
            if not rows.weight.is_meta:  # otherwise the values are loaded later
                with torch.no_grad():
                    if weight.is_meta:  # no vocabulary to start from: NaN shows if nothing is loaded later
                        rows.weight.fill_(math.nan)
                    else:
                        rows.weight.copy_(initial_rows(weight.detach(), config.init_memory, initializer_range))
                        rows.to(weight.device)
        self.set_adapter(self.active_adapters)

    @contextmanager
    def readable_weight(self) -> Iterator[Tensor]:
        """Yield the base's (V, H) embedding matrix, even if accelerate keeps it on disk or in CPU memory.

        Raises:
            ValueError: it is offloaded in an unreadable way.
        """
        with align_module_device(self.base_layer):
            if self.weight.is_meta and hasattr(self.base_layer, "_hf_hook"):
                raise ValueError(
                    "device_map: must keep the input embedding readable, since memory rows start from it, got "
                    f"{type(self.base_layer._hf_hook).__name__} without its values. Place it on a device."
                )
            yield self.weight

    def rows(self, adapter_name: str) -> nn.Parameter:
        """Return an adapter's memory rows, (3, H) float32, in the units of the base's embedding matrix."""
        weight = self.lora_rim_memory[adapter_name].weight
        if not isinstance(weight, nn.Parameter):
            raise TypeError(
                f"memory rows of adapter {adapter_name!r}: must be a parameter, got {type(weight).__name__}."
            )
        return weight

    @property
    def current_adapters(self) -> Sequence[str]:
        """The adapters in use: one for all rows of a batch, or one for each row; empty if disabled."""
        if self.row_adapters is not None and not self.disable_adapters:
            return self.row_adapters
        return [] if self.current_adapter is None else [self.current_adapter]

    @property
    def current_adapter(self) -> str | None:
        """The adapter whose rows are looked up; None without an adapter or if adapters are disabled."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.lora_rim_memory), None)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed (B, S) token ids, virtual ones included, to (B, S, H) in the base embedding's dtype.

        Raises:
            ValueError: there are virtual ids but no adapter for them, ids beyond them, a wrong number of
                ``row_adapters``, or training passes without the adapter's blocks.
        """
        names = self.current_adapters
        if not names:
            self._refuse_virtual_ids(input_ids)
            return self.base_layer(input_ids)
        if self.row_adapters is not None:
            self._check_rows(input_ids, names)
        self._refuse_ids_beyond(input_ids)
        is_memory = input_ids >= self.first_memory_id
        if self.training and not self.has_trained and torch.is_grad_enabled():
            self._check_trained(is_memory, names[0])
        embedded = self.base_layer(input_ids.masked_fill(is_memory, 0))
        rows = self.look_up(input_ids, names, dtype=embedded.dtype)
        return torch.where(is_memory.unsqueeze(-1), rows.to(embedded.device), embedded)

    def look_up(self, input_ids: Tensor, adapter_names: Sequence[str], *, dtype: torch.dtype) -> Tensor:
        """Embed memory ids.

        Args:
            input_ids: (B, S) token ids.
            adapter_names: whose rows to use: one adapter for all, or one for each of the B rows.
            dtype: the base embedding's dtype.

        Returns:
            (B, S, H) in ``dtype``, on the rows' device; undefined where ids are not memory.
        """
        kinds = (input_ids - self.first_memory_id).clamp(min=0)
        if len(adapter_names) == 1 and adapter_names[0] != BASE:
            rows: Tensor = self.lora_rim_memory[adapter_names[0]](kinds)
        else:
            rows = torch.zeros(*kinds.shape, self.weight.shape[1], dtype=torch.float32, device=kinds.device)
            for name in set(adapter_names) - {BASE}:
                own = [row for row, other in enumerate(adapter_names) if other == name]
                rows[own] = self.lora_rim_memory[name](kinds[own])
        rows = rows.to(dtype)
        scale = self._get_embed_scale()
        if scale is not None:
            rows = rows * scale.to(device=rows.device, dtype=rows.dtype)
        return rows

    def _check_trained(self, is_memory: Tensor, adapter_name: str) -> None:
        """Refuse to train an adapter with blocks on passes without any; stop checking after the first with blocks."""
        if torch.compiler.is_compiling() or is_memory.is_meta or isinstance(is_memory, FakeTensor):
            return
        if not (self.num_blocks[adapter_name] and self.rows(adapter_name).requires_grad):
            return
        if not bool(is_memory.any()):
            raise ValueError(
                f"input_ids: must hold memory ids (from {self.first_memory_id} on) where an adapter with num_blocks="
                f"{self.num_blocks[adapter_name]} is trained, got none: unlike generate, forward appends no blocks, so "
                "LoRA would learn to answer without them. Train with GroundingTrainer and RefinementTrainer; attach "
                "the adapter with num_blocks=0 to train without blocks with any other trainer (SFTTrainer, "
                "DPOTrainer, GRPOTrainer)."
            )
        self.has_trained = True

    def _refuse_virtual_ids(self, input_ids: Tensor) -> None:
        if torch.compiler.is_compiling() or input_ids.is_meta:
            return
        if bool((input_ids >= self.first_memory_id).any()):
            raise ValueError(
                f"input_ids: memory ids (from {self.first_memory_id} on) need an enabled RiM adapter, got some with "
                f"the adapter disabled or deleted, or in rows of {BASE!r}. Omit the blocks, or enable the adapter."
            )

    def _refuse_ids_beyond(self, input_ids: Tensor) -> None:
        """Explain ids that are too large, which the CPU's index error does not."""
        # Not on a GPU: it raises an index error too, and a check would make it wait.
        is_simulated = type(input_ids) is not Tensor
        if torch.compiler.is_compiling() or is_simulated or input_ids.device.type != "cpu" or not input_ids.numel():
            return
        largest = int(input_ids.max())
        if largest >= self.first_memory_id + NUM_ROWS:
            raise ValueError(
                f"input_ids: ids must be below {self.first_memory_id}, the number of rows of the base's embedding, or "
                f"one of the {NUM_ROWS} memory ids that follow, got {largest}. If the tokenizer has more tokens than "
                "the base has rows, resize the base before you attach the adapter."
            )

    def _check_rows(self, input_ids: Tensor, names: Sequence[str]) -> None:
        if len(names) != len(input_ids):
            raise ValueError(
                f"adapter_names: must name an adapter for each of the batch's {len(input_ids)} rows, got {len(names)}. "
                f"Use {BASE!r} for rows without one."
            )
        without = [row for row, name in enumerate(names) if name == BASE]
        if without:
            self._refuse_virtual_ids(input_ids[without])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Raises:
            ValueError: several adapters at once, since memory rows cannot be combined.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"adapter_names: RiM has one active adapter at a time, got {adapter_names!r}. Name one.")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Mark adapters as merged; rows have no weight to merge into and are still looked up."""
        self.merged_adapters.extend(check_adapters_to_merge(self, adapter_names))

    def unmerge(self) -> None:
        """Undo ``merge``."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the rows without PEFT's cast to the base's dtype: they stay float32."""
        if adapter_name not in self.lora_rim_memory or self.rows(adapter_name).is_meta:
            return
        if device is None and not self.weight.is_meta:  # an offloaded matrix does not tell where it is used
            device = self.weight.device
        if device is not None:
            self.lora_rim_memory[adapter_name].to(device)

    def __repr__(self) -> str:
        return "rim." + super().__repr__()


def initial_rows(vocabulary: Tensor, init_memory: str | list[int], initializer_range: float) -> Tensor:
    """Return three starting rows, (3, H) float32, from the (V, H) embedding matrix and torch's random numbers."""
    noise = torch.randn(NUM_ROWS, vocabulary.shape[1]).to(vocabulary.device)
    if init_memory == "random":
        return initializer_range * noise
    mean, spread = _mean_and_spread(vocabulary)
    if init_memory == "vocabulary":
        return mean + spread * noise
    token_ids = [int(init_memory[row % len(init_memory)]) for row in range(NUM_ROWS)]
    return vocabulary[token_ids].float() + _TOKEN_NOISE * spread * noise


def _mean_and_spread(vocabulary: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per dimension, (H) float32 each, without a float32 copy of the matrix."""
    chunks = vocabulary.split(_ROWS_PER_CHUNK)
    mean = torch.stack([chunk.float().sum(0) for chunk in chunks]).sum(0) / len(vocabulary)
    squares = torch.stack([(chunk.float() - mean).square().sum(0) for chunk in chunks]).sum(0)
    return mean, (squares / len(vocabulary)).sqrt()
