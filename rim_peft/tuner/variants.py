"""Variants of a forward pass: blocks that enter at a middle layer, and blocks whose tokens attend to one another.

Both change only the inputs of the decoder layers, so they are hooks before the layers, the same for training,
``generate`` and readouts. A hook before the decoder finds memory from the token ids and passes this on in the decoder's
keyword arguments. The layers' hooks edit the mask and, at the insertion layer, the hidden states. An adapter with
neither option leaves no hook.

The only state between passes is stored on the cache: which of its columns contain memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rim_peft.sequence.masks import causal_mask, hide_memory, join_blocks, number_blocks
from rim_peft.tuner.bases import CACHE, CACHE_NAMES
from rim_peft.tuner.config import RiMConfig
from rim_peft.tuner.layers import Arguments, check_implementation, find_layers, parameter_names
from rim_peft.tuner.memory_embedding import BASE, MemoryEmbedding

_ARGUMENT = "rim_memory_pass"
_NUMBERS = "rim_block_numbers"


class BlockHooks:
    """Hooks on a base's decoder and its layers; they act while an active adapter needs them."""

    def __init__(self, model: Any) -> None:
        """Install the hooks on a causal language model with a :class:`MemoryEmbedding`."""
        self.model = model
        decoder, layers = find_layers(model)
        names = parameter_names(decoder)
        self._handles = [decoder.register_forward_pre_hook(partial(self._before_decoder, names), with_kwargs=True)]
        for index, layer in enumerate(layers):
            hook = partial(self._before_layer, index, parameter_names(layer))
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _active(self) -> RiMConfig | None:
        """Return the config of an active adapter that changes the layers, or None."""
        memory = self.model.get_input_embeddings()
        names = memory.current_adapters if isinstance(memory, MemoryEmbedding) else []
        configs = [self.model.peft_config[name] for name in names if name != BASE]
        return next((config for config in configs if config.changes_layers), None)

    def _before_decoder(self, names: list[str], decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        if (config := self._active()) is None:
            return None
        check_implementation(config, decoder.config)
        input_ids = Arguments(names, args, kwargs).get("input_ids")
        if input_ids is None:
            raise ValueError(
                f"input_ids: must be given with {config.describe_variants()}, since they tell where blocks are, got "
                "only embeddings. Pass token ids."
            )
        ids = _without_padding(input_ids, Arguments(names, args, kwargs).get("attention_mask"))
        return args, {**kwargs, _ARGUMENT: MemoryPass(ids, self.model, config.describe_variants())}

    def _before_layer(self, index: int, names: list[str], layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if _ARGUMENT not in kwargs:
            if (config := self._active()) is None:
                return None
            raise ValueError(
                f"model: must pass keyword arguments on to its layers with {config.describe_variants()}, got "
                f"{type(self.model).__name__}, whose layer {index} gets no information on blocks. Use another base, "
                "or omit these options."
            )
        call = Arguments(names, args, kwargs)
        call.kwargs.pop(_ARGUMENT).enter(index, call)
        return tuple(call.args), call.kwargs


class MemoryPass:
    """Memory positions of one forward pass, and the masks that follow from them.

    A mask is edited once for all layers that share it.
    """

    # The layers get this object among their arguments, so a layer that runs again under gradient checkpointing finds
    # the right pass.

    def __init__(self, input_ids: Tensor, model: Any, variants: str) -> None:
        self.variants = variants
        self.input_ids = input_ids.reshape(-1, input_ids.shape[-1])
        self.memory: MemoryEmbedding = model.get_input_embeddings()
        self.names = list(self.memory.current_adapters)
        # One adapter for all rows, or one per row; a row without an adapter has no blocks, so any options will do.
        configs = [model.peft_config.get(name) for name in self.names]
        self.insertion_layers = [config.insertion_layer if config else 0 for config in configs]
        self.bidirectional = [config is not None and config.bidirectional_blocks for config in configs]
        self._numbers: Tensor | None = None
        self._masks: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}

    def enter(self, index: int, call: Arguments) -> None:
        """Change the arguments of a layer's call as this layer requires."""
        hidden_states, cache, mask = call.get("hidden_states"), call.get(*CACHE_NAMES), call.get("attention_mask")
        if self._numbers is None:
            self._numbers = self._number_columns(cache)
        num_queries = self.input_ids.shape[1]
        hidden = [index < layer for layer in self.insertion_layers]
        # A single token is the last of its block so far, so causal attention is correct.
        joined = [
            flag and num_queries > 1 and not below for flag, below in zip(self.bidirectional, hidden, strict=True)
        ]
        if any(hidden) or any(joined):
            num_keys = num_queries
            if mask is not None:
                num_keys = mask.shape[-1]
            elif cache is not None:
                num_keys, _ = cache.get_mask_sizes(num_queries, index)
            edited = self._edited(mask, hidden, joined, num_keys=int(num_keys), like=hidden_states)
            call.put("attention_mask", edited)
        entering = [index == layer > 0 for layer in self.insertion_layers]
        if any(entering):
            call.put("hidden_states", self._insert(hidden_states, entering))

    def _number_columns(self, cache: Any) -> Tensor:
        """Number the blocks in all columns, cached and new, and store the numbers on the cache."""
        first = self.memory.first_memory_id
        if cache is None:
            return number_blocks(self.input_ids, first)
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"cache_implementation: must be a cache that grows with {self.variants}, got "
                f"{type(cache).__name__} of a fixed length. Omit it, or use 'dynamic'."
            )
        seen = int(cache.get_seq_length())
        numbers = _of_rows(getattr(cache, _NUMBERS, None) if seen else None, self.input_ids, seen)
        numbers = torch.cat([numbers, number_blocks(self.input_ids, first, before=numbers)], dim=1)
        setattr(cache, _NUMBERS, numbers)
        return numbers

    def _edited(self, mask: Any, hidden: list[bool], joined: list[bool], *, num_keys: int, like: Tensor) -> Tensor:
        """Return a layer's mask, edited; only its last columns if a layer with a window keeps no others."""
        key = (id(mask), tuple(hidden), tuple(joined), num_keys, like.device)
        if key not in self._masks:
            if self._numbers is None or num_keys > self._numbers.shape[1]:
                raise ValueError(
                    f"attention_mask: must have a column for each token so far, got {num_keys}. Omit it, or pass one "
                    "for all given and cached tokens."
                )
            numbers = self._numbers[:, self._numbers.shape[1] - num_keys :]
            numbers = numbers.to(like.device if mask is None else mask.device)
            edited = causal_mask(numbers, self.input_ids.shape[1]) if mask is None else mask
            if any(hidden):
                edited = hide_memory(edited, _only(hidden, numbers))
            if any(joined):
                edited = join_blocks(edited, _only(joined, numbers))
            # Keep the given mask with the edited one, so that its id is not reused.
            self._masks[key] = (edited, mask)
        return self._masks[key][0]

    def _insert(self, hidden_states: Tensor, entering: list[bool]) -> Tensor:
        """Replace the hidden states at memory positions by what the input embedding would give for their ids."""
        rows = self.memory.look_up(self.input_ids, self.names, dtype=hidden_states.dtype)
        is_memory = _only(entering, self.input_ids >= self.memory.first_memory_id)[..., None]
        return torch.where(is_memory.to(hidden_states.device), rows.to(hidden_states.device), hidden_states)


def _without_padding(input_ids: Tensor, mask: Any) -> Tensor:
    """Set the (B, S) ids to 0 where a (B, S) or longer mask hides them: padding is never memory, whatever its id."""
    num_tokens = input_ids.shape[-1]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < num_tokens:
        return input_ids
    is_hidden = mask[:, mask.shape[1] - num_tokens :] == 0
    return input_ids.masked_fill(is_hidden.to(input_ids.device), 0)


def _only(chosen: list[bool], values: Tensor) -> Tensor:
    """Keep the (B, K) values of chosen rows and set others to 0; a single choice applies to all rows."""
    if all(chosen):
        return values
    return values.masked_fill(~torch.tensor(chosen, device=values.device)[:, None], 0)


def _of_rows(numbers: Tensor | None, input_ids: Tensor, seen: int) -> Tensor:
    """Return the (B, P) block numbers of ``seen`` cached tokens for a batch's rows; a cache may have dropped rows."""
    # Rows are identified only by their order, which a cache changes when it reorders beams. This is harmless if blocks
    # are in the same columns of every row, as in generate and decoders.
    if seen == 0:
        return input_ids.new_zeros(len(input_ids), 0)
    if numbers is None or numbers.shape[1] < seen:
        known = 0 if numbers is None else numbers.shape[1]
        raise ValueError(
            f"{CACHE}: must hold tokens that this model computed, got {seen} of which {known} are known: "
            "insertion_layer and bidirectional_blocks need to know which of them are memory. Start with an empty "
            "cache."
        )
    numbers = numbers[:, :seen]  # the cache may have been cropped
    if len(numbers) == len(input_ids):
        return numbers
    if bool((numbers != numbers[:1]).any()):
        raise ValueError(
            f"{CACHE}: must keep its {len(numbers)} rows, whose blocks are in different columns, got "
            f"{len(input_ids)} rows of input_ids. Pad prompts on the left."
        )
    return numbers[:1].expand(len(input_ids), -1)
