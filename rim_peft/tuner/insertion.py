"""Insert blocks into a decoding loop that does not know about them, also with a different adapter for each row.

The loop keeps its own view of the sequences, *without* memory: prompt, then answer. The base's
``prepare_inputs_for_generation`` turns this view into the model's input, and the blocks are inserted there::

    the loop's    x  y_1 y_2 ...                 ids, mask, positions, lengths, processors, criteria, streamer, result
    the model's   x  m_1 ... m_K  y_1 y_2 ...    ids, mask, positions, cache

So everything that reads or counts the sequences (penalties and n-gram bans, stop strings, ``max_length``,
``min_length``, streamers, criteria that slice at the prompt's length, beam search, the caller) works as with the base
and never sees a memory id, which is outside the vocabulary.

PEFT's argument ``adapter_names`` names an adapter for each row, or ``__base__``. While a pass or a ``generate`` call
runs, the memory layer stores these names and LoRA's layers receive them.

In ``generate`` each row gets the memory tokens of its own adapter. Prompts are moved to the right until all answers
begin in the same column, as with left padding (``m`` memory, ``_`` padding)::

    the loop's view       the model's view
    x x x x y y           x x x x m m m m y y
    _ x x x y y           _ _ _ x x x m m y y
    _ _ x x y y           _ _ _ _ _ _ x x y y      a row without an adapter

A begun answer ends the prompt in the loop's view; in the model's it follows the blocks, as in training.

So a row's tokens stay contiguous, as in a batch with one adapter, and attention windows cover the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import StaticCache

from rim_peft.tuner.bases import find_cache, num_cached
from rim_peft.tuner.memory_embedding import BASE, MemoryEmbedding

PER_TOKEN_INPUTS = ("attention_mask", "position_ids", "token_type_ids")
"""Inputs besides the ids that have one value per token."""


class BlockInsertion:
    """The memory ids of one ``generate`` call, inserted after column ``prompt_length`` of the loop's sequences."""

    def __init__(self, model: Any, *, prompt_length: int, block_ids: list[int]) -> None:
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and prompt_length + len(block_ids) >= room:
            raise ValueError(
                f"input_ids: prompt ({prompt_length} tokens) and memory ({len(block_ids)}) must leave room for an "
                f"answer in the base's {room} positions. Shorten the prompt or lower num_blocks."
            )
        self.config = model.config
        self.prepare_inputs = model.prepare_inputs_for_generation
        self.prompt_length = prompt_length
        self.ids = torch.tensor(block_ids)
        self.num_columns = len(block_ids)

    def attached_to(self, model: Any) -> Any:
        """Return the model with inputs that include memory.

        It is a shallow copy that shares all modules and weights, so other calls, also in other threads, keep using the
        unchanged model.
        """
        attached = copy.copy(model)
        vars(attached)["prepare_inputs_for_generation"] = self
        return attached

    def __call__(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        *,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        """Replace ``prepare_inputs_for_generation``: translate from the loop's view to the model's."""
        # input_ids are all ids so far, with the number of last ones to run, or one chunk of a long prompt.
        name, cache = find_cache(kwargs)
        start = num_cached(cache) if next_sequence_length is None else 0
        length = start + input_ids.shape[1]
        if is_first_iteration:
            kwargs[name] = self._enlarged(cache)
        if length >= self.prompt_length:
            if is_first_iteration:
                _check_padding(kwargs.get("attention_mask"))
            if next_sequence_length is not None and length - next_sequence_length < self.prompt_length:
                next_sequence_length += self.num_columns
        kwargs = self._with_memory(kwargs, rows=len(input_ids), length=length)
        input_ids = self._insert(input_ids, start=start)
        return self.prepare_inputs(
            input_ids,
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def put_back(self, output: Any) -> Any:
        """Return the output of ``generate`` with the memory ids that the caller's prompts contained."""
        if isinstance(output, Tensor):
            return self._insert(output)
        output.sequences = self._insert(output.sequences)
        return output

    def _insert(self, sequences: Tensor, *, start: int = 0) -> Tensor:
        """Return the model's view of the loop's sequences, which start at column ``start``."""
        column = self.prompt_length - start
        if sequences.shape[1] < column:
            return sequences
        ids = self.ids.to(sequences.device).expand(len(sequences), -1)
        return torch.cat([sequences[:, :column], ids, sequences[:, column:]], dim=1)

    def _with_memory(self, kwargs: dict[str, Any], *, rows: int, length: int) -> dict[str, Any]:
        """Add values for the memory to inputs that cover the last tokens of sequences of ``length``."""
        if length < self.prompt_length:
            return kwargs
        inputs = dict(kwargs)
        for name in PER_TOKEN_INPUTS:
            values = inputs.get(name)
            if values is None:
                continue
            column = self.prompt_length - (length - values.shape[-1])
            prompt, answer = values[..., :column], values[..., column:]
            memory = prompt[..., -1:].expand(*prompt.shape[:-1], len(self.ids))
            if name == "position_ids":
                memory = memory + torch.arange(1, len(self.ids) + 1, device=values.device)
                answer = answer + len(self.ids)
            inputs[name] = torch.cat([prompt, memory, answer], dim=-1)
        return inputs

    def _enlarged(self, cache: Any) -> Any:
        """Make room for the memory in a static cache that ``generate`` created for sequences without it."""
        if not isinstance(cache, StaticCache) or num_cached(cache) > 0:
            return cache
        # Layers with a recurrent part besides attention report no length of their own.
        length = max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)
        return StaticCache(
            config=self.config.get_text_config(decoder=True),
            max_cache_len=length + self.num_columns,
            offloading=cache.offloading,
        )


def _check_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        raise ValueError(
            "attention_mask: prompts must be padded on the left, since the blocks follow the last token, got padding "
            "on the right. Set the tokenizer's padding_side to 'left'."
        )


@contextmanager
def mixed_rows(model: nn.Module, memory: MemoryEmbedding, adapter_names: Sequence[str]) -> Iterator[None]:
    """Let each row of a batch use its adapter from ``adapter_names``."""

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
    """Repeat each row's adapter name ``times`` times consecutively, as beams and samples repeat rows."""
    names = memory.row_adapters or ()
    memory.row_adapters = tuple(name for name in names for _ in range(times))
    try:
        yield
    finally:
        memory.row_adapters = names


def check_mixture(adapter_names: Any, peft_config: dict[str, Any], *, training: bool) -> None:
    """Refuse unknown adapter names, and training.

    Raises:
        ValueError: ``adapter_names`` is not a list of known adapter names, or the model is in training mode.
    """
    known = [*peft_config, BASE]
    if not isinstance(adapter_names, list | tuple) or any(name not in known for name in adapter_names):
        raise ValueError(
            f"adapter_names: must be a list with one of {known} for each row of the batch, got {adapter_names!r}. Load "
            "an adapter before you name it."
        )
    if training:
        raise ValueError(
            "adapter_names: must be omitted in training mode, got "
            f"{list(adapter_names)!r}. Call eval(), or train one adapter after the other."
        )


class MixedInsertion(BlockInsertion):
    """The memory ids of a ``generate`` call whose rows have different blocks, or none, or in different places."""

    def __init__(
        self, model: Any, *, prompts: Tensor, block_ids: Sequence[list[int]], num_begun: Sequence[int] = ()
    ) -> None:
        """Lay out the (B, P) prompts and the B rows' blocks, before the last ``num_begun`` tokens of each row."""
        longest = max(block_ids, key=len)
        super().__init__(model, prompt_length=prompts.shape[1], block_ids=longest)
        # Source of each of the model's columns: a column of the prompt, or P for memory, or P + 1 for padding.
        length = self.prompt_length
        sources, ids = [], []
        begun = num_begun or [0] * len(prompts)
        for prompt, memory_ids, count in zip(prompts, block_ids, begun, strict=True):
            missing, place = len(longest) - len(memory_ids), length - count
            before, behind = list(range(place)), list(range(place, length))
            sources.append([length + 1] * missing + before + [length] * len(memory_ids) + behind)
            parts = (prompt.new_zeros(missing), prompt[:place], prompt.new_tensor(memory_ids), prompt[place:])
            ids.append(torch.cat(parts))
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
        """Return the model's view of the loop's (B, S) values; memory gets the (B, 1) ``memory``, padding gets 0."""
        rows, length = values.shape
        inside = min(length, self.prompt_length)
        prompts = nn.functional.pad(values[:, :inside], (0, self.prompt_length - inside))
        prompts = torch.cat([prompts, memory, torch.zeros_like(memory)], dim=1)
        num_columns = length if length < self.prompt_length else self.trunks.shape[1]
        sources = self._repeated(self.sources, rows)[:, :num_columns]
        return torch.cat([prompts.gather(1, sources), values[:, inside:]], dim=1)

    @staticmethod
    def _repeated(values: Tensor, rows: int) -> Tensor:
        """Repeat the prompts' values for beams and samples that share a prompt."""
        return values.repeat_interleave(rows // len(values), dim=0)
