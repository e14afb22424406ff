"""A tokenizer that appends blocks, and files that older readers understand too."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rim_peft.escaping import json_text
from rim_peft.tuner.tensors import not_finite

_READ_AS_IT_IS = "PreTrainedTokenizerFast"
"""The tokenizer class that uses ``tokenizer.json`` as it is; model-specific classes rebuild the post-processor."""

_KEPT_SETTINGS = ("bos_token_id", "pad_token_id", "suppress_tokens", "max_length", "max_new_tokens")


def save_model(model: PreTrainedModel, folder: Path, *, eos_id: int, max_shard_size: str) -> None:
    """Write weights (safetensors), configuration and generation settings.

    Of the base's generation settings, only special tokens, lengths and suppressed tokens are kept: many bases sample or
    penalise repetition, while the check and the adapter's own evaluation use greedy search. Generation stops at
    ``eos_id``, which ends every trained readout, and wherever the base stopped.

    Raises:
        ValueError: a weight is not finite in the type that is written.
    """
    if (found := not_finite(dict(model.named_parameters()))) is not None:
        raise ValueError(
            f"dtype: weights must be finite in the type that is written, {found} as {model.dtype}. Export with --dtype "
            "bfloat16 or float32, which have a larger range than float16."
        )
    settings = model.generation_config
    if settings is not None:
        known = settings.eos_token_id
        stops = known if isinstance(known, list) else [] if known is None else [known]
        kept = {name: value for name in _KEPT_SETTINGS if (value := getattr(settings, name, None)) is not None}
        kept["eos_token_id"] = known if eos_id in stops else [*stops, eos_id] if stops else eos_id
        model.generation_config = GenerationConfig(**kept)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _edit(folder / "config.json", _add_older_names)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer whose files are read as they are, including by transformers 4."""
    tokenizer.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", _make_plain)


def _make_plain(config: dict[str, Any]) -> None:
    for loaded_how in ("is_local", "local_files_only"):
        config.pop(loaded_how, None)
    config.update(tokenizer_class=_READ_AS_IT_IS, model_input_names=["input_ids", "attention_mask"])


def _add_older_names(config: dict[str, Any]) -> None:
    """Add the names that transformers 4 and compatible engines read, such as ``rope_theta`` and ``torch_dtype``.

    Without them, such readers would silently use another rotary frequency.
    """
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        if "dtype" in part:
            part.setdefault("torch_dtype", part["dtype"])
        ropes: dict[str, Any] = part.get("rope_parameters") or {}
        rope: dict[str, Any] = ropes.get("full_attention", ropes)  # some models have one for each kind of layer
        if "rope_theta" in rope:
            part.setdefault("rope_theta", rope["rope_theta"])
            if rope.get("rope_type", "default") != "default":
                part.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
        if "sliding_attention" in ropes:
            part.setdefault("rope_local_base_freq", ropes["sliding_attention"]["rope_theta"])


def _edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")


APPEND_TO = ("auto", "prompt", "chat", "none")
"""What the tokenizer appends blocks to: texts plus chats if it has a chat template, texts, chats, or nothing."""

_NAMES = ("<|rim_begin{}|>", "<|rim_memory{}|>", "<|rim_end{}|>")


@dataclass(frozen=True)
class MemoryTokens:
    """The memory tokens of an exported adapter: three of the tokenizer's, and their sequence after a prompt.

    An adapter without blocks has none.

    Attributes:
        names: names of ``<b>``, ``<m>`` and ``</b>`` in the tokenizer.
        ids: their ids.
        num_blocks: blocks after a prompt.
        block_size: memory tokens of a block between its begin and end.
    """

    names: list[str]
    ids: list[int]
    num_blocks: int
    block_size: int

    @property
    def block_names(self) -> list[str]:
        """The blocks as token names."""
        if not self.num_blocks:
            return []
        begin, memory, end = self.names
        return [begin, *[memory] * self.block_size, end] * self.num_blocks

    @property
    def block_ids(self) -> list[int]:
        """The blocks as ids."""
        ids = dict(zip(self.names, self.ids, strict=True))
        return [ids[name] for name in self.block_names]

    @property
    def block_text(self) -> str:
        """The blocks as text for the tokenizer."""
        return "".join(self.block_names)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def add_memory_tokens(
    tokenizer: PreTrainedTokenizerBase, *, num_blocks: int, block_size: int
) -> tuple[PreTrainedTokenizerBase, MemoryTokens]:
    """Return a copy of a tokenizer with three more special tokens after its own, and the tokens; none without blocks.

    Raises:
        ValueError: the tokenizer is not from the ``tokenizers`` library, the only one whose files can append blocks, or
            its ids have gaps, so that the library would give the new tokens ids of others.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            "tokenizer: must be a fast one, whose tokenizer.json can append blocks, got "
            f"{type(tokenizer).__name__}. Convert it first, or export with a fast one beside the adapter."
        )
    extended = copy.deepcopy(tokenizer)
    if num_blocks == 0:
        return extended, MemoryTokens([], [], num_blocks, block_size)
    size, largest = len(extended), max(extended.get_vocab().values(), default=-1)
    if largest >= size:
        raise ValueError(
            f"tokenizer: must have ids without gaps, so that new tokens come after its last one, got {size} tokens "
            f"with ids up to {largest}. Add tokens for the ids between them, or use another tokenizer."
        )
    names = _free_names(extended)
    extended.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids: Any = extended.convert_tokens_to_ids(names)
    return extended, MemoryTokens(names, ids, num_blocks, block_size)


def with_tokens_of(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with the tokens that another one has after these.

    Raises:
        ValueError: the other one does not begin with the same tokens.
    """
    extended = copy.deepcopy(tokenizer)
    own, there = extended.get_vocab(), other.get_vocab()
    more = sorted(there.keys() - own.keys(), key=lambda name: there[name])
    extended.add_tokens([AddedToken(name, special=True, normalized=False) for name in more], special_tokens=True)
    if extended.get_vocab() == there:
        return extended
    name = min((name for name in own if there.get(name) != own[name]), key=lambda name: own[name])
    raise ValueError(
        "tokenizer: must have the tokens of the one beside the extended base, to which memory tokens were added, got "
        f"{name!r} with id {own[name]}, which is {there.get(name, 'missing')} there. Export this adapter into another "
        "folder."
    )


def set_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
    """Make a chat template use the training's variables where a call gives none, in place."""
    if not variables or not tokenizer.chat_template:
        return
    lines = (f"{{% set {name} = {name} if {name} is defined else {value!r} %}}\n" for name, value in variables.items())
    head = "".join(lines)  # the newlines after tags are not written
    templates = tokenizer.chat_template
    is_named = isinstance(templates, dict)
    tokenizer.chat_template = (
        {name: head + template for name, template in templates.items()} if is_named else head + templates
    )


def append_blocks(tokenizer: PreTrainedTokenizerBase, memory: MemoryTokens, append_to: str = "auto") -> dict[str, bool]:
    """Make a tokenizer append blocks, in place, and return to what: ``{"prompt": ..., "chat": ...}``.

    The post-processor appends them to a text when special tokens are added, the chat template to a chat when the
    assistant's turn is opened. ``apply_chat_template`` adds no special tokens, so blocks come only once.

    Raises:
        ValueError: ``append_to`` is not one of ``APPEND_TO``, or needs a missing chat template.
    """
    if append_to not in APPEND_TO:
        raise ValueError(f"append_to: must be one of {', '.join(APPEND_TO)}, got {append_to!r}.")
    has_template = bool(tokenizer.chat_template)
    if append_to == "chat" and not has_template:
        raise ValueError(
            "append_to: must not be 'chat' for a tokenizer without chat template. Set tokenizer.chat_template, or use "
            "'prompt'."
        )
    places = {"prompt": append_to in ("auto", "prompt"), "chat": append_to in ("auto", "chat") and has_template}
    if places["prompt"]:
        _append_to_texts(tokenizer, memory)
    if places["chat"] and memory.num_blocks:
        templates = tokenizer.chat_template
        tokenizer.chat_template = (
            {name: _with_blocks(template, memory) for name, template in templates.items()}
            if isinstance(templates, dict)
            else _with_blocks(templates, memory)
        )
    tokenizer.padding_side = "left"  # the answer follows the blocks
    return places


def tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names of the special tokens that a tokenizer puts before a text, such as BOS.

    Raises:
        ValueError: its additions cannot be told from the text.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return [str(name) for name in tokenizer.convert_ids_to_tokens(full[:start])]
    raise ValueError(
        f"tokenizer: special tokens must come before or after a text, but those of {type(tokenizer).__name__} change "
        "it. Use append_to='none', and write the blocks after prompts."
    )


def _free_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    known = tokenizer.get_vocab()
    number = 1
    while True:
        names = [name.format("" if number == 1 else f"_{number}") for name in _NAMES]
        if not known.keys() & set(names):
            return names
        number += 1


def _append_to_texts(tokenizer: Any, memory: MemoryTokens) -> None:
    """Replace the post-processor: tokens before a text stay, tokens after it are replaced by the blocks.

    The library runs only one template, so the old one cannot be kept.
    """
    before = tokens_before(tokenizer)
    used = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in [*before, *memory.names]}
    blocks = memory.block_names
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *blocks],
        pair=[*before, "$A", "$B", *blocks],
        special_tokens=list(used.items()),
    )


def _with_blocks(template: str, memory: MemoryTokens) -> str:
    """Append the blocks where a chat template opens the assistant's turn."""
    # An expression, since a block tag would strip the space before it. Jinja strips a final newline, which would no
    # longer be final: strip it here.
    body = template[:-1] if template.endswith("\n") else template
    return f"{body}{{{{ '{memory.block_text}' if add_generation_prompt else '' }}}}"
