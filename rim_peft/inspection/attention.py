"""Which words of the prompt each block attends to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from rim_peft.inspection.document import BlockAttention, LayerGroup, Word
from rim_peft.tuner.bases import CACHE, attention_of, evaluation_mode, input_device
from rim_peft.tuner.config import active_config

_LONGEST_WORD = 24
"""Most characters of a word: languages without spaces are cut at a token."""

_ROUNDING = 0.02
"""Most that a row of rounded weights differs from 1."""


def split_words(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[Word, ...]:
    """Cut a prompt into words at white space, by the tokenizer's offsets.

    Of a prompt that the tokenizer does not read back as the same ids, such as one that spells special tokens, a token's
    text is what it adds to the text before it.
    """
    added: Any = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    words: list[Word] = []
    for text, token_id in zip(_texts(ids, tokenizer), ids, strict=True):
        is_special = token_id in special
        last = words[-1] if words else None
        # A part of a character that several tokens share has no text.
        begins = is_special or last is None or last.is_special or (text[:1].isspace() and not last.text.isspace())
        if last is None or begins or len(last.text) + len(text) > _LONGEST_WORD:
            words.append(Word(text, 1, is_special))
        else:
            words[-1] = Word(last.text + text, last.num_tokens + 1, False)
    return tuple(words)


def _texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return each token's text with the white space before it; joined they are the prompt."""
    whole = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    if tokenizer.is_fast:
        found: Any = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if found["input_ids"] == list(ids):
            ends = [end for _, end in found["offset_mapping"]]
            starts = [0, *ends[:-1]]
            texts = [whole[start:end] for start, end in zip(starts, ends, strict=True)]
            return [*texts[:-1], texts[-1] + whole[ends[-1] :]]
    texts, read = [], ""
    for end in range(1, len(ids) + 1):
        so_far = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        is_part = so_far.endswith("\ufffd") or not so_far.startswith(read)  # of a character
        texts.append("" if is_part else so_far[len(read) :])
        read = read if is_part else so_far
    return [*texts[:-1], texts[-1] + whole[len(read) :]]


def group_layers(first: int, last: int) -> tuple[LayerGroup, ...]:
    """Return the group of all layers from ``first`` to ``last`` and, if they are three or more, their thirds."""
    groups = [LayerGroup("all layers", first, last)]
    count = last - first + 1
    if count >= 3:
        bounds = [first + count * part // 3 for part in range(4)]
        for name, start, end in zip(("lower third", "middle third", "upper third"), bounds, bounds[1:], strict=False):
            groups.append(LayerGroup(name, start, end - 1))
    return tuple(groups)


def read_attention(
    model: PeftModel,
    prompt: Sequence[int],
    words: Sequence[Word],
    *,
    num_blocks: int,
    groups: Sequence[LayerGroup],
) -> tuple[BlockAttention, ...]:
    """Return where each block looks, for each group of layers.

    Args:
        words: the same prompt in words.

    Raises:
        ValueError: the base returns no attention weights.
    """
    weights = attention_weights(model, prompt, num_blocks=num_blocks)
    length = active_config(model).block_tokens.length
    found = []
    for group in groups:
        by_block = weights[group.first - 1 : group.last].mean(0).unflatten(0, (num_blocks, length)).mean(1)
        for block, row in enumerate(by_block, start=1):
            shares = [float(part.sum()) for part in row[: len(prompt)].split([word.num_tokens for word in words])]
            start = len(prompt) + (block - 1) * length
            earlier, own = float(row[len(prompt) : start].sum()), float(row[start : start + length].sum())
            elsewhere = max(0.0, 1.0 - sum(shares) - earlier - own)
            found.append(BlockAttention(1, block, group.name, tuple(shares), earlier, own, elsewhere))
    return tuple(found)


@torch.no_grad()
def attention_weights(model: PeftModel, prompt: Sequence[int], *, num_blocks: int) -> Tensor:
    """Return the attention of the blocks' tokens, averaged over heads: (L, Q, S) float32 for Q of the S tokens.

    The prompt is computed first, in the base's own way; then the blocks, by eager attention. So only their rows of
    weights are held.

    Raises:
        ValueError: the base returns no attention weights.
    """
    base: Any = model.get_base_model()
    memory = active_config(model).block_tokens.ids(num_blocks)
    ids = torch.tensor([[*prompt, *memory]], device=input_device(base))
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    # Without sliding layers, as in decoding: these drop keys by index.
    cache = DynamicCache()
    options: dict[str, Any] = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    size = len(prompt)
    with evaluation_mode(base):
        base(
            input_ids=ids[:, :size],
            attention_mask=torch.ones_like(ids[:, :size]),
            position_ids=positions[:, :size],
            **options,
        )
        with _eager(base):
            output = base(
                input_ids=ids[:, size:],
                attention_mask=torch.ones_like(ids),
                position_ids=positions[:, size:],
                output_attentions=True,
                **options,
            )
    found = output.attentions
    if not found or any(part is None or part.shape[-1] != ids.shape[1] for part in found):
        raise ValueError(
            f"attention: {type(base).__name__} returns no weights of all its layers. Use another base to see them."
        )
    weights = torch.stack([part[0].float().mean(0).cpu() for part in found])
    total = weights.sum(-1, keepdim=True)
    # Half precision rounds each weight; a total far from 1 is what a base gives to no token.
    return torch.where((total - 1).abs() < _ROUNDING, weights / total, weights)


@contextmanager
def _eager(base: Any) -> Iterator[None]:
    """Let a base compute its attention eagerly, since other implementations return no weights."""
    own = attention_of(base.config)
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(own)
