"""A batch whose rows have different adapters: each row with its own LoRA and its own blocks.

PEFT's argument ``adapter_names`` names an adapter for each row, or ``__base__``. For as long as a pass or a call of
``generate`` runs, the memory layer notes these names, and LoRA's layers are handed them.

In ``generate`` rows get as many memory tokens as their adapters ask for, so prompts are moved to the right until all
answers begin in the same column, as padding on the left does (``m`` memory, ``_`` padding)::

    the loop's view       the model's view
    x x x x y y           x x x x m m m m y y
    _ x x x y y           _ _ _ x x x m m y y
    _ _ x x y y           _ _ _ _ _ _ x x y y      a row of the base alone

So a row's tokens stay side by side, as in a batch of its own, and windows that count columns count the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rim_peft.tuner.insertion import BlockInsertion
from rim_peft.tuner.layer import BASE, MemoryEmbedding


@contextmanager
def mixed_rows(model: nn.Module, memory: MemoryEmbedding, adapter_names: Sequence[str]) -> Iterator[None]:
    """Let each row of a batch use the adapter that ``adapter_names`` names for it."""

    def hand_names_on(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "adapter_names": list(memory.current_adapters)}

    handles = [
        module.register_forward_pre_hook(hand_names_on, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))
    ]
    memory.row_adapters = tuple(adapter_names)
    try:
        yield
    finally:
        memory.row_adapters = None
        for handle in handles:
            handle.remove()


@contextmanager
def repeated_rows(memory: MemoryEmbedding, times: int) -> Iterator[None]:
    """Let a batch hold each of the named rows several times, one after the other, as beams and samples do."""
    names = memory.row_adapters or ()
    memory.row_adapters = tuple(name for name in names for _ in range(times))
    try:
        yield
    finally:
        memory.row_adapters = names


def check_mixture(adapter_names: Any, peft_config: dict[str, Any], *, training: bool) -> None:
    """Refuse names that are not adapters, and training.

    Raises:
        ValueError: ``adapter_names`` is not a list of adapters' names, or the model is in training mode.
    """
    known = [*peft_config, BASE]
    if not isinstance(adapter_names, list | tuple) or any(name not in known for name in adapter_names):
        raise ValueError(
            f"adapter_names: must be a list with one of {known} for each row of the batch, got {adapter_names!r}. Load "
            "an adapter before it is named."
        )
    if training:
        raise ValueError(
            "adapter_names: must be left out in training mode, got "
            f"{list(adapter_names)!r}. Call eval(), or train one adapter after the other."
        )


class MixedInsertion(BlockInsertion):
    """The memory ids of a call of ``generate`` whose rows have different blocks, or none."""

    def __init__(self, model: Any, *, prompts: Tensor, block_ids: Sequence[list[int]]) -> None:
        """Lay the (B, P) prompts and the B rows' blocks out."""
        longest = max(block_ids, key=len)
        super().__init__(model, prompt_length=prompts.shape[1], block_ids=longest)
        # Where the model's columns come from: a column of the prompt, or P for memory, or P + 1 for padding.
        length = self.prompt_length
        sources, ids = [], []
        for prompt, memory_ids in zip(prompts, block_ids, strict=True):
            missing = len(longest) - len(memory_ids)
            sources.append([length + 1] * missing + list(range(length)) + [length] * len(memory_ids))
            ids.append(torch.cat([prompt.new_zeros(missing), prompt, prompt.new_tensor(memory_ids)]))
        self.sources = torch.tensor(sources, device=prompts.device)
        self.trunks = torch.stack(ids)

    def _insert(self, sequences: Tensor, *, start: int = 0) -> Tensor:
        trunks = self._repeated(self.trunks, len(sequences))
        length = start + sequences.shape[1]
        if length < self.prompt_length:
            return trunks[:, start:length]
        return torch.cat([trunks[:, start:], sequences[:, self.prompt_length - start :]], dim=1)

    def _with_memory(self, kwargs: dict[str, Any], *, rows: int, length: int) -> dict[str, Any]:
        mask = kwargs.get("attention_mask")
        mask = self.trunks.new_ones(rows, length) if mask is None else mask
        inputs = {**kwargs, "attention_mask": self._moved(mask, memory=mask.new_ones(rows, 1))}
        if (types := kwargs.get("token_type_ids")) is not None:
            last = min(types.shape[1], self.prompt_length)
            inputs["token_type_ids"] = self._moved(types, memory=types[:, last - 1 : last])
        if kwargs.get("position_ids") is not None:
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        return inputs

    def _moved(self, values: Tensor, *, memory: Tensor) -> Tensor:
        """The model's view of the loop's (B, S) values; memory gets the (B, 1) ``memory``, padding 0."""
        rows, length = values.shape
        inside = min(length, self.prompt_length)
        prompts = nn.functional.pad(values[:, :inside], (0, self.prompt_length - inside))
        prompts = torch.cat([prompts, memory, torch.zeros_like(memory)], dim=1)
        num_columns = length if length < self.prompt_length else self.trunks.shape[1]
        sources = self._repeated(self.sources, rows)[:, :num_columns]
        return torch.cat([prompts.gather(1, sources), values[:, inside:]], dim=1)

    @staticmethod
    def _repeated(values: Tensor, rows: int) -> Tensor:
        """Values of the prompts, for beams and samples that share one."""
        return values.repeat_interleave(rows // len(values), dim=0)
