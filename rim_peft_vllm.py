"""Plugin of vLLM: requests for a RiM adapter get their blocks, whatever endpoint they come by.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). It wraps the one method
that every request passes with its token ids and its adapter, after the chat template and before the engine. An adapter
is RiM's if ``rim-peft export`` wrote its folder (formats ``embedding-lora`` and ``peft-lora``).

This module is outside the package because importing that imports PEFT, which vLLM does not have: here nothing is
imported but the standard library and vLLM.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RECORD = "rim_export.json"
MOST_BLOCKS = 4096
_FORBIDDEN = -100.0
_MOST_BIASES = 1000
_CONTINUES = "rim_continues"
"""Key that marks the request of a chat whose last message is to be continued."""


class Blocks(NamedTuple):
    """Blocks of an adapter: ids of ``<b>``, ``<m>`` and ``</b>``, blocks after a prompt, memory tokens of a block.

    ``written`` is when the export's record was written (nanoseconds), which tells two exports in one place apart.
    """

    ids: tuple[int, int, int]
    num_blocks: int
    block_size: int
    written: int = 0

    def after(self, prompt: list[int], num_blocks: int | None = None) -> list[int]:
        """Return a prompt's ids with blocks at its end; those that it ends with already stay as they are.

        Raises:
            ValueError: memory tokens are elsewhere in the prompt, or ``num_blocks`` is out of range.
        """
        number: Any = self.num_blocks if num_blocks is None else num_blocks
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MOST_BLOCKS:
            raise ValueError(f"num_blocks: must be an integer from 0 to {MOST_BLOCKS}, got {number!r}.")
        begin, memory, end = self.ids
        block = [begin, *[memory] * self.block_size, end]
        text, given = prompt, 0
        while text[-len(block) :] == block:
            text, given = text[: -len(block)], given + 1
        if found := set(text) & set(self.ids):
            raise ValueError(
                f"prompt: must have memory tokens only as blocks at its end, got id {min(found)} elsewhere. Remove the "
                "names of special tokens from it."
            )
        return prompt if given else [*prompt, *block * number]


def find_blocks(folder: Path) -> Blocks | None:
    """Return the blocks of an adapter's folder; None if no export with blocks wrote it.

    Raises:
        ValueError: its record is damaged.
    """
    own, shared = folder / RECORD, folder.parent.parent / RECORD
    if own.is_file():
        return _read(own, own.stat().st_mtime_ns, None)
    if folder.parent.name == "adapters" and shared.is_file():
        return _read(shared, shared.stat().st_mtime_ns, folder.name)
    return None


@functools.lru_cache(maxsize=1024)
def _read(path: Path, changed: int, name: str | None) -> Blocks | None:
    """Read a record, again only once it has changed."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != ("embedding-lora" if name is None else "peft-lora"):
            return None
        entry = record if name is None else record["adapters"].get(name)
        if entry is None:
            return None
        memory = entry["memory"]
        begin, middle, end = map(int, memory["ids"])
        return Blocks((begin, middle, end), int(memory["num_blocks"]), int(memory["block_size"]), changed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: must be the record of an export, but is not ({type(error).__name__}: {error}). Copy the export "
            "again."
        ) from error


def add_blocks(request: Any, blocks: Blocks, *, most_tokens: int, forbid: bool = True) -> None:
    """Append blocks to a request that the engine is about to get, in place.

    Args:
        request: vLLM's ``EngineCoreRequest``.
        blocks: its adapter's blocks; a request's ``vllm_xargs`` may have another ``num_blocks``.
        most_tokens: length of the model's context.
        forbid: forbid memory tokens in the answer, by ``logit_bias``.

    Raises:
        ValueError: the request has no token ids, comes in parts, continues an answer, spells memory tokens, or has no
            room for blocks and an answer.
    """
    params = request.sampling_params
    if params is None:  # asks for an embedding, not for an answer
        return
    if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
        raise ValueError(
            "prompt: must be a text, a chat or token ids in one piece for a RiM adapter, got another kind."
        )
    options = params.extra_args or {}
    if options.get(_CONTINUES):
        raise ValueError(
            "messages: must end where the assistant's turn is opened for a RiM adapter, whose blocks follow. Omit "
            "continue_final_message and add_generation_prompt."
        )
    ids = blocks.after(list(request.prompt_token_ids), options.get("num_blocks"))
    if len(ids) >= most_tokens:
        raise ValueError(
            f"prompt: prompt and blocks ({len(ids)} tokens) must leave room for an answer in {most_tokens} tokens. "
            "Shorten the prompt, or ask for fewer blocks (vllm_xargs: num_blocks)."
        )
    request.prompt_token_ids = ids
    # vLLM keeps what it computed of prompts by the adapter's name and path, where another adapter may be by now.
    request.cache_salt = f"{request.cache_salt or ''}{blocks.written}"
    if params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, most_tokens - len(ids))
    given = params.logit_bias or {}
    if len(given) > _MOST_BIASES:
        raise ValueError(f"logit_bias: must have at most {_MOST_BIASES} entries for a RiM adapter, got {len(given)}.")
    if forbid:
        params.logit_bias = {**dict.fromkeys(blocks.ids, _FORBIDDEN), **given}


def register() -> None:
    """Wrap vLLM's methods; safe to repeat.

    Raises:
        RuntimeError: this vLLM has other ones, so that adapters would answer without their blocks.
    """
    try:
        from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
        from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.exceptions import VLLMValidationError
        from vllm.lora.utils import get_adapter_absolute_path
        from vllm.v1.engine.input_processor import InputProcessor
    except ImportError as error:
        raise RuntimeError(
            f"rim-peft: this vLLM must be near version 0.32, whose requests the plugin knows, but {error}. Uninstall "
            "rim-peft here, or set VLLM_PLUGINS to other plugins, and send blocks with the prompt."
        ) from error
    known: dict[int, Blocks | None] = {}

    @functools.lru_cache(maxsize=1024)
    def folder_of(path: str, number: int) -> Path:
        """Return an adapter's folder, on the Hub looked up once each time that vLLM loads it under another number."""
        return Path(get_adapter_absolute_path(path))

    def blocks_of(adapter: Any) -> Blocks | None:
        if adapter is None:
            return None
        folder, number = folder_of(adapter.lora_path, adapter.lora_int_id), adapter.lora_int_id
        if folder.is_dir():
            known[number] = find_blocks(folder)
        return known.get(number)  # of a folder that was deleted vLLM still has the weights

    def process_inputs(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(processor, *args, **kwargs)
        blocks = blocks_of(request.lora_request)
        if blocks is not None:
            try:
                most, speculates = processor.model_config.max_model_len, processor.vllm_config.speculative_config
                # vLLM takes no biases while it speculates: there sampling, not greedy search, may write a memory token.
                add_blocks(request, blocks, most_tokens=most, forbid=speculates is None)
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error
        return request

    def to_sampling_params(original: Callable[..., Any], chat: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(chat, *args, **kwargs)
        if chat.continue_final_message or not chat.add_generation_prompt:
            params.extra_args = {**(params.extra_args or {}), _CONTINUES: True}
        return params

    def beam_search(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        adapters = kwargs.get("lora_request")
        if any(map(blocks_of, adapters if isinstance(adapters, list) else [adapters])):
            raise VLLMValidationError(
                "use_beam_search: must be off for a RiM adapter, since vLLM sends each beam as a new prompt."
            )
        return original(*args, **kwargs)

    _wrap(InputProcessor, "process_inputs", process_inputs)
    _wrap(ChatCompletionRequest, "to_sampling_params", to_sampling_params)
    for owner in (BeamSearchOnlineMixin, BeamSearchOfflineMixin):
        _wrap(owner, "beam_search", beam_search)


def _wrap(owner: type, name: str, function: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    original = getattr(original, "_before_rim", original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    vars(call)["_before_rim"] = original
    setattr(owner, name, call)
