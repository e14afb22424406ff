"""Token ids of a base that no text uses: where an unmodified base has room for memory tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from rim_peft.export.tokens import MemoryTokens, add_memory_tokens
from rim_peft.tuner.config import NUM_ROWS

_RESERVED = re.compile(r"[<\[>].*(reserved|unused|placeholder|place▁holder|control_|extra_).*[>\]<]", re.IGNORECASE)
"""Names that tokenizers give to tokens that are kept for later."""

_ROLES = re.compile("system|user|assistant|tool|function|observation|developer|human|bot|think", re.IGNORECASE)
"""Parts of names that chat templates put together, so that the whole name is not in their text."""

_USED_NAMES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


def find_spare_ids(tokenizer: PreTrainedTokenizerBase, base: Any, given: Sequence[int] | None = None) -> list[int]:
    """Return three ids below the number of a base's embedding rows that no text uses.

    In this order: the last tokens with reserved names, the first rows after the tokenizer's last token, the last
    special tokens that neither the tokenizer's settings nor its chat template use.

    Args:
        given: ids to take instead, checked by the same rules except for their names.

    Raises:
        ValueError: the base has no such ids, or those given are used or out of range.
    """
    num_rows = int(base.get_input_embeddings().weight.shape[0])
    used = _used_ids(tokenizer, base)
    has_gaps = max(tokenizer.get_vocab().values(), default=-1) >= len(tokenizer)  # then a new token's id may be taken
    after_last = range(0) if has_gaps else range(len(tokenizer), num_rows)
    if given is not None:
        _check_given(list(given), used, size=len(tokenizer), num_rows=num_rows)
        return list(given)
    names = {index: name for name, index in tokenizer.get_vocab().items() if index < num_rows and index not in used}
    reserved = sorted(index for index, name in names.items() if _RESERVED.fullmatch(name))
    added = {index: token for index, token in _added(tokenizer).items() if index in names and token.special}
    special = sorted(index for index, token in added.items() if not _ROLES.search(token.content))
    for found in (reserved[-NUM_ROWS:], list(after_last[:NUM_ROWS]), special[-NUM_ROWS:]):
        if len(found) == NUM_ROWS:
            return found
    raise ValueError(
        f"base: must have {NUM_ROWS} token ids that no text uses (reserved names, rows after the tokenizer's last "
        f"token, or special tokens without a use), got {len(reserved)}, {len(after_last)} and {len(special)} of these "
        "kinds. Use --format peft-lora, which adds rows to a copy of the base, or name ids that you know to be free "
        "(--spare-ids)."
    )


def name_spare_ids(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, num_blocks: int, block_size: int
) -> tuple[PreTrainedTokenizerBase, MemoryTokens]:
    """Return a copy of a tokenizer that reads the ids' names as special tokens, and the memory tokens.

    Args:
        ids: ids of ``<b>``, ``<m>`` and ``</b>``; those after the tokenizer's last token get names.

    Raises:
        ValueError: the tokenizer is not from the ``tokenizers`` library.
    """
    extended, _ = add_memory_tokens(tokenizer, num_blocks=0, block_size=block_size)
    names: Any = extended.convert_ids_to_tokens(list(ids))
    if None in names:
        return add_memory_tokens(tokenizer, num_blocks=num_blocks, block_size=block_size)
    added = _added(extended)
    new = [name for index, name in zip(ids, names, strict=True) if index not in added]
    extended.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
    return extended, MemoryTokens(names, list(ids), num_blocks, block_size)


def check_unused(memory: MemoryTokens, texts: Iterable[Sequence[int]]) -> None:
    """Check that token ids of texts are none of the memory tokens'.

    Raises:
        ValueError: one is.
    """
    if found := sorted({token for ids in texts for token in ids} & set(memory.ids)):
        names = dict(zip(memory.ids, memory.names, strict=True))
        raise ValueError(
            f"spare_ids: must be ids that no text uses, but the checked prompts or their answers have {found[0]} "
            f"({names[found[0]]}). Name others (--spare-ids)."
        )


def _used_ids(tokenizer: PreTrainedTokenizerBase, base: Any) -> set[int]:
    """Return the ids that the tokenizer's settings, its chat template or the base's generation settings use."""
    named = [getattr(tokenizer, f"{name}_token_id", None) for name in _USED_NAMES]
    for settings in (base.config.get_text_config(), base.generation_config):
        for name in _USED_NAMES:
            value = getattr(settings, f"{name}_token_id", None)
            named.extend(value if isinstance(value, list) else [value])
    template = str(tokenizer.chat_template or "")
    in_template = [index for index, token in _added(tokenizer).items() if token.content in template]
    return {int(index) for index in [*named, *in_template] if index is not None}


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = getattr(tokenizer, "added_tokens_decoder", {})
    return added


def _check_given(ids: list[int], used: set[int], *, size: int, num_rows: int) -> None:
    if len(set(ids)) != NUM_ROWS or len(ids) != NUM_ROWS:
        rule = f"must be {NUM_ROWS} different ids"
    elif not all(0 <= index < num_rows for index in ids):
        rule = f"must be ids from 0 to {num_rows - 1}, for which the base has rows"
    elif max(ids) >= size and ids != list(range(size, size + NUM_ROWS)):
        rule = f"must be ids of the tokenizer (below {size}) or the {NUM_ROWS} after its last one"
    elif taken := sorted(set(ids) & used):
        rule = f"must not be used by the tokenizer, its chat template or the generation settings, as {taken[0]} is"
    else:
        return
    raise ValueError(f"spare_ids: {rule}, got {ids}. Omit them, so that the export looks for some.")
