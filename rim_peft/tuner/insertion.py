"""How blocks get into a decoding loop that does not know of them.

The loop keeps its own view of the sequences, *without* memory: prompt, then answer. The blocks are put in where that
view becomes the model's input, in the base's ``prepare_inputs_for_generation``::

    the loop's    x  y_1 y_2 ...                 ids, mask, positions, lengths, processors, criteria, streamer, result
    the model's   x  m_1 ... m_K  y_1 y_2 ...    ids, mask, positions, cache

So everything that reads or counts the sequences (penalties and n-gram bans, stop strings, ``max_length``,
``min_length``, streamers, criteria that slice at the prompt's length, beam search, the caller) works as with the base
and never meets a memory id, which lies outside the vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

PER_TOKEN_INPUTS = ("attention_mask", "position_ids", "token_type_ids")
"""Inputs beside the ids that have a value for each token."""


class BlockInsertion:
    """The memory ids of one call of ``generate``, put in after column ``prompt_length`` of the loop's sequences."""

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
        """Return the model with its inputs made of sequences with memory.

        It is a shallow copy, which shares all modules and weights: other calls, in other threads too, go on with the
        model as it is.
        """
        attached = copy.copy(model)
        vars(attached)["prepare_inputs_for_generation"] = self
        return attached

    def __call__(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        *,
        past_key_values: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        """Stand in for ``prepare_inputs_for_generation``: translate from the loop's view to the model's."""
        # All ids so far come with the number of last ones to run, if not all; a chunk of a long prompt comes alone.
        start = 0
        if next_sequence_length is None and past_key_values is not None:
            start = int(past_key_values.get_seq_length())
        length = start + input_ids.shape[1]
        if is_first_iteration:
            past_key_values = self._enlarged(past_key_values)
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
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def put_back(self, output: Any) -> Any:
        """The output of ``generate`` with the memory ids that the caller's prompts held, as its prompts."""
        if isinstance(output, Tensor):
            return self._insert(output)
        output.sequences = self._insert(output.sequences)
        return output

    def _insert(self, sequences: Tensor, *, start: int = 0) -> Tensor:
        """The model's view of the loop's sequences, which come from column ``start`` on."""
        column = self.prompt_length - start
        if sequences.shape[1] < column:
            return sequences
        ids = self.ids.to(sequences.device).expand(len(sequences), -1)
        return torch.cat([sequences[:, :column], ids, sequences[:, column:]], dim=1)

    def _with_memory(self, kwargs: dict[str, Any], *, rows: int, length: int) -> dict[str, Any]:
        """Inputs that have values for the last tokens of sequences of ``length``, with values for the memory."""
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
        """A static cache, which ``generate`` made for sequences without memory, with room for it."""
        if not isinstance(cache, StaticCache) or int(cache.get_seq_length()) > 0:
            return cache
        return StaticCache(
            config=self.config.get_text_config(decoder=True),
            max_cache_len=cache.get_max_length() + self.num_columns,
            offloading=cache.offloading,
        )


def _check_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
        raise ValueError(
            "attention_mask: prompts must be padded on the left, since the blocks follow the last token, got padding "
            "on the right. Set the tokenizer's padding_side to 'left'."
        )
