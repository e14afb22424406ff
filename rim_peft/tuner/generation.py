"""``generate`` with memory blocks after the prompt: options of a call, and checks of what is unsupported.

:mod:`rim_peft.tuner.insertion` inserts the blocks into the model's inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from rim_peft.sequence import BlockTokens
from rim_peft.tuner.bases import check_cache_name, find_cache, num_cached
from rim_peft.tuner.insertion import PER_TOKEN_INPUTS, BlockInsertion, MixedInsertion, repeated_rows
from rim_peft.tuner.memory_embedding import BASE, MemoryEmbedding

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class BlockGenerator:
    """Replaces ``generate`` of a base with a RiM adapter; ``model`` is the base."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        num_blocks: int | None = None,
        num_begun: int | Sequence[int] = 0,
        **kwargs: Any,
    ) -> Any:
        """Call the base's ``generate`` with blocks after the prompt.

        Arguments and results are those of the base's ``generate``: sequences are prompt and answer, and lengths do not
        count memory. ``scores`` and ``logits`` have one entry per answer token; ``hidden_states``, ``attentions`` and
        ``past_key_values`` include memory. Prompts that already end in memory ids keep them and get no more. With the
        adapter disabled, or without blocks, this is the base's ``generate``. If ``PeftModel.generate`` gets
        ``adapter_names``, each row gets its own adapter's blocks.

        Args:
            inputs: (B, S) prompts, padded on the left; ``input_ids`` is another name for it.
            generation_config: as for the base.
            num_blocks: blocks for this call; the adapter's ``num_blocks`` by default.
            num_begun: how many of a prompt's last tokens are the answer's first (``continue_final_message``), of all
                rows or of each: the blocks come before them, as in training, where the whole answer follows the blocks.
            kwargs: as for the base.

        Raises:
            ValueError: ``num_begun`` leaves no prompt, right padding, prompts without a token, ``inputs_embeds``, a
                cache from an earlier call, a base that takes its cache by another name than transformers gives it,
                decoding other than greedy, sampling and beam search, guidance by a second prompt, or memory ids that
                are not at the end of the prompts (masked ids are padding and may have any value).
        """
        plain_generate = type(self.model).generate
        kwargs["generation_config"] = generation_config
        memory = self.model.get_input_embeddings()
        if not isinstance(memory, MemoryEmbedding):
            raise ValueError(
                f"model: must keep the input embedding that the adapter wraps, got {type(memory).__name__} in its "
                "place, which has no memory rows. Call unload() to go on without blocks, or attach the adapter again."
            )
        adapter_names = memory.current_adapters
        if not adapter_names:
            return plain_generate(self.model, inputs, **kwargs)
        count = None if num_blocks is None else _checked(num_blocks)
        given = kwargs.pop("input_ids", None) if inputs is None else inputs
        prompts = _without_padding_ids(self.model, given, kwargs, memory.first_memory_id)
        begun = _checked_begun(num_begun, prompts, kwargs.get("attention_mask")) if num_begun else []
        output = self._generate(prompts, count, memory, adapter_names, begun, kwargs)
        return output if prompts is given else _with_prompts(given, output)

    def _generate(
        self,
        prompts: Any,
        count: int | None,
        memory: MemoryEmbedding,
        adapter_names: Sequence[str],
        begun: Sequence[int],
        kwargs: dict[str, Any],
    ) -> Any:
        plain_generate = type(self.model).generate
        held = _trailing_memory(prompts, memory.first_memory_id)
        if held and any(begun):
            raise ValueError(
                f"num_begun: must be 0 for input_ids that end in memory ids, got {max(begun)}. Omit the memory ids: "
                "generate inserts the blocks."
            )
        if memory.row_adapters is not None:
            return self._generate_mixed(prompts, count, begun, is_held=bool(held), **kwargs)
        config = self.model.peft_config[adapter_names[0]]
        count = config.num_blocks if count is None else count
        _check_held(held, config.block_tokens)
        block_ids = held or config.block_tokens.ids(count)
        if not block_ids:
            return plain_generate(self.model, prompts, **kwargs)
        _check_call(self.model, prompts, kwargs)
        if held:
            prompts, kwargs = _without_last(len(held), prompts, kwargs)
        insertion = BlockInsertion(self.model, prompt_length=prompts.shape[1], block_ids=block_ids)
        if any(begun):
            _check_moved(kwargs)
            insertion = MixedInsertion(
                self.model, prompts=prompts, block_ids=[block_ids] * len(prompts), num_begun=begun
            )
        output = plain_generate(insertion.attached_to(self.model), prompts, **kwargs)
        return insertion.put_back(output) if held else output

    def _generate_mixed(
        self, prompts: Any, count: int | None, begun: Sequence[int], *, is_held: bool, **kwargs: Any
    ) -> Any:
        """Generate with a different adapter for each row."""
        _check_call(self.model, prompts, kwargs)
        memory = self.model.get_input_embeddings()
        names = memory.row_adapters
        _check_mixed_call(prompts, names, kwargs, is_held=is_held)
        configs = [self.model.peft_config.get(name) for name in names]
        blocks = [
            config.block_tokens.ids(config.num_blocks if count is None else count) if config else []
            for config in configs
        ]
        settings = _effective_config(self.model, kwargs)
        times = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        insertion = MixedInsertion(self.model, prompts=prompts, block_ids=blocks, num_begun=begun)
        with repeated_rows(memory, times):
            return type(self.model).generate(insertion.attached_to(self.model), prompts, **kwargs)


def _check_mixed_call(prompts: Tensor, names: Sequence[str], kwargs: dict[str, Any], *, is_held: bool) -> None:
    """Refuse inputs whose columns cannot be moved."""
    if len(names) != len(prompts):
        raise ValueError(
            f"adapter_names: must name an adapter for each of the batch's {len(prompts)} rows, got {len(names)}. Use "
            f"{BASE!r} for rows without one."
        )
    if is_held or kwargs.get("position_ids") is not None:
        raise ValueError(
            "adapter_names: prompts are moved to make room for blocks of several lengths, got "
            f"{'input_ids with memory ids' if is_held else 'position_ids'}. Omit them: generate appends the blocks and "
            "derives positions from the attention_mask."
        )


def _without_padding_ids(model: Any, prompts: Any, kwargs: dict[str, Any], first_memory_id: int) -> Any:
    """Replace memory ids in masked places of the prompts: these are padding, whose ids have no meaning.

    Raises:
        ValueError: prompts are not (B, S) token ids of at least one token, or unmasked padding has a memory id.
    """
    if prompts is None:
        return None
    if not isinstance(prompts, Tensor) or prompts.dim() != 2 or prompts.numel() == 0:
        got = f"shape {tuple(prompts.shape)}" if isinstance(prompts, Tensor) else type(prompts).__name__
        raise ValueError(
            f"input_ids: must be a (B, S) tensor of at least one prompt of at least one token, got {got}. Omit empty "
            "prompts, or begin them with the tokenizer's BOS token."
        )
    is_memory = prompts >= first_memory_id
    if not bool(is_memory.any()):
        return prompts
    mask, pad_id = kwargs.get("attention_mask"), _effective_config(model, kwargs).pad_token_id
    if mask is None:
        if pad_id is not None and pad_id >= first_memory_id:
            raise ValueError(
                f"pad_token_id: must be below the base's vocabulary of {first_memory_id}, where memory ids begin, or "
                f"come with an attention_mask, got {pad_id}. Pass the tokenizer's attention_mask."
            )
        return prompts
    is_padding = is_memory & (mask == 0) if mask.shape == prompts.shape else torch.zeros_like(is_memory)
    return prompts.masked_fill(is_padding, 0) if bool(is_padding.any()) else prompts


def _with_prompts(prompts: Tensor, output: Any) -> Any:
    """Return the output of ``generate`` with the caller's original prompts."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    sequences[:, : prompts.shape[1]] = prompts.repeat_interleave(len(sequences) // len(prompts), dim=0)
    return output


def _check_moved(kwargs: dict[str, Any]) -> None:
    if kwargs.get("position_ids") is not None:
        raise ValueError(
            "position_ids: must be omitted with num_begun, since blocks are inserted between the tokens, got some. "
            "generate derives them from the attention_mask."
        )


def _checked_begun(num_begun: int | Sequence[int], prompts: Any, mask: Any) -> list[int]:
    """Return the number of begun tokens of each row.

    Raises:
        ValueError: a number is not one of a row's tokens, or leaves no prompt before them.
    """
    if prompts is None:
        return []
    num_rows, length = prompts.shape
    counts: list[Any] = list(num_begun) if isinstance(num_begun, list | tuple) else [num_begun] * num_rows
    is_number = all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
    lengths = [length] * num_rows if mask is None or mask.shape != prompts.shape else (mask != 0).sum(1).tolist()
    if (
        len(counts) != num_rows
        or not is_number
        or not all(0 <= count < size for count, size in zip(counts, lengths, strict=True))
    ):
        raise ValueError(
            "num_begun: must be an integer for all rows or one for each, from 0 to below the tokens of a row, "
            f"{lengths}, got {num_begun!r}. Blocks follow a prompt of at least one token."
        )
    return counts


def _checked(num_blocks: int) -> int:
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 0:
        raise ValueError(
            f"num_blocks: must be an integer of at least 0, got {num_blocks!r}. Omit it for the adapter's own number."
        )
    return num_blocks


def _trailing_memory(prompts: Tensor | None, first_memory_id: int) -> list[int]:
    """Return the memory ids at the end of all prompts, [] if there are none.

    Raises:
        ValueError: prompts contain other memory ids.
    """
    if prompts is None or not bool((is_memory := prompts >= first_memory_id).any()):
        return []
    count = int(is_memory[0].sum())
    if count == prompts.shape[1]:
        raise ValueError(
            f"input_ids: must hold a prompt before memory ids (from {first_memory_id} on), got {count} of them only. "
            "Blocks follow a prompt of at least one token."
        )
    ids = prompts[0, prompts.shape[1] - count :]
    if bool(is_memory[:, :-count].any()) or not torch.equal(prompts[:, -count:], ids.expand(len(prompts), -1)):
        raise ValueError(
            f"input_ids: memory ids (from {first_memory_id} on) must be the same blocks at the end of every prompt, "
            "got them elsewhere. Omit them: generate appends the blocks."
        )
    return [int(token) for token in ids]


def _check_held(held: Sequence[int], tokens: BlockTokens) -> None:
    """Refuse memory ids that do not form whole blocks; their order is free, for experiments."""
    # A tokenizer with more tokens than the base has rows would encode text with memory ids.
    num_blocks = len(held) // tokens.length
    if sorted(held) != sorted(tokens.ids(num_blocks)):
        raise ValueError(
            f"input_ids: must be ids below {tokens.begin}, the number of rows of the base's embedding, and at the end "
            f"of prompts whole blocks at most, got {list(held)[:8]} there. If the tokenizer has more tokens than the "
            "base has rows, resize the base before the adapter is attached."
        )


def _without_last(count: int, prompts: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    cut = {name: kwargs[name][..., :-count] for name in PER_TOKEN_INPUTS if kwargs.get(name) is not None}
    return prompts[:, :-count], {**kwargs, **cut}


def _check_call(model: Any, prompts: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse calls of ``generate`` whose decoding loop does not support blocks."""
    has_embeddings = kwargs.get("inputs_embeds") is not None
    if prompts is None or has_embeddings:
        raise ValueError(
            "input_ids: must be given, since blocks are appended as token ids, got "
            f"{'inputs_embeds' if has_embeddings else 'no prompt'}. Pass only token ids, or num_blocks=0."
        )
    _check_mask(prompts, kwargs.get("attention_mask"))
    name, cache = find_cache(kwargs)
    if (length := num_cached(cache)) > 0:
        raise ValueError(
            f"{name}: must be empty, got {length} tokens: blocks follow each new prompt, so a cache that "
            "contains an earlier call's blocks does not fit. Pass the whole conversation without a cache."
        )
    config = _effective_config(model, kwargs)
    if config.use_cache is not False:
        check_cache_name(model)
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    refused = {
        "custom_generate": kwargs.get("custom_generate"),
        "cache_implementation": "paged" if config.cache_implementation == "paged" else None,
        "token_healing": config.token_healing,
        # Its second pass, over the negative prompt, would have no blocks.
        "guidance_scale": None if config.guidance_scale == 1 else config.guidance_scale,
        "decoding": None if mode in _MODES else mode.value,
    }
    for name, value in refused.items():
        if value is not None and value is not False:  # a guidance of 0 counts as given
            raise ValueError(
                f"{name}: RiM generates by greedy search, sampling and beam search with their usual caches, got "
                f"{value!r}. Omit it, or set num_blocks=0."
            )


def _check_mask(prompts: Tensor, mask: Any) -> None:
    if mask is None:
        return
    if mask.shape != prompts.shape:
        raise ValueError(
            f"attention_mask: must be (B, S), a number for each of the {tuple(prompts.shape)} ids, so that blocks can "
            f"be added, got shape {tuple(mask.shape)}. Pass the tokenizer's own mask."
        )
    hidden = [row for row, is_there in enumerate((mask != 0).any(1).tolist()) if not is_there]
    if hidden:
        raise ValueError(
            f"attention_mask: must keep a token of each prompt, got row {hidden[0]} of {len(prompts)} completely "
            "masked. Omit empty prompts, or begin them with the tokenizer's BOS token."
        )


def _effective_config(model: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    """Merge the model's generation settings, the given configuration and the arguments; later ones win."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    given = kwargs.get("generation_config")
    for settings in ({} if given is None else given.to_dict(), kwargs):
        for name, value in settings.items():
            if value is not None and hasattr(config, name):
                setattr(config, name, value)
    return config
