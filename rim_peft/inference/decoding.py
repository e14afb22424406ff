"""Prompts → answers, after the last block or after all blocks at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rim_peft.data.examples import QuestionError
from rim_peft.inference.passes import (
    AnswerRows,
    CompiledPasses,
    Passes,
    PromptCache,
    holds_memory,
    lay_out_answers,
)
from rim_peft.tuner.bases import CACHE, check_architecture, check_layers, evaluation_mode, input_device, num_positions
from rim_peft.tuner.config import active_config
from rim_peft.tuner.layers import check_uncompiled
from rim_peft.values import check_integer

PROMPT_MULTIPLE = 64
"""Compiled passes exist for prompt lengths that are multiples of this; shorter prompts are padded."""


@dataclass(frozen=True)
class Decoded:
    """Answers after R blocks of B prompts.

    Attributes:
        token_ids: the answer's tokens for each prompt and block, EOS included if reached.
        log_probs: the natural logarithm of each token's probability.
        states: (B, R, H) float32 on the CPU: the last layer's state at the block's end, the input of the head.
    """

    token_ids: list[list[list[int]]]
    log_probs: list[list[list[float]]]
    states: Tensor


def can_decode(model: PeftModel) -> bool:
    """Tell whether a decoder can answer after the last block; otherwise use ``generate``.

    It cannot with recurrent layers, attention by index instead of position, or a disabled adapter, which has no blocks.
    """
    base: Any = model.get_base_model()
    try:
        check_layers(base.config)
    except ValueError:
        return False
    return not missing_inputs(base) and base.get_input_embeddings().current_adapter is not None


def missing_inputs(base: Any) -> list[str]:
    """Return the inputs that decoding needs but a base's ``forward`` does not take."""
    parameters = inspect.signature(base.forward).parameters
    return [name for name in ("position_ids", CACHE, "logits_to_keep") if name not in parameters]


class BlockDecoder:
    """Decodes answers greedily from token ids: after the last block, or after all blocks at once.

    It appends the blocks of the adapter that is active on creation. Answers after all blocks take as many passes as
    one answer. Prompts with finished answers leave the batch once they are half of it.

    ``compiled`` removes Python from the passes, and uses CUDA graphs on a GPU. The first call with prompts of up to 64
    tokens compiles, as does the first with up to 128, and so on; this takes a while, and later calls reuse the result.
    Each of these lengths keeps a cache, and the decoder belongs to one thread. Merging the adapter compiles again;
    after any other change of the model (modules, dtypes, attention implementation) create a new decoder.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        eos_id: int | None,
        pad_id: int,
        num_blocks: int | None = None,
        every_block: bool = False,
        max_new_tokens: int = 64,
        compiled: bool = False,
        batch_size: int = 1,
    ) -> None:
        """Create a decoder for one kind of call.

        Args:
            num_blocks: blocks after each prompt; the adapter's own number by default.
            every_block: decode an answer after every block, not only after the last.
            max_new_tokens: most tokens of an answer, EOS included.
            batch_size: prompts in a compiled pass; smaller batches are filled up. Ignored if not compiled.

        Raises:
            ValueError: the model has no active RIM adapter, a number is out of range, the base cannot run branching
                rows, which ``every_block`` and ``compiled`` need, or ``compiled`` is set although the adapter's blocks
                change the inputs of layers.
        """
        config = active_config(model)
        self.num_blocks = config.num_blocks if num_blocks is None else num_blocks
        check_integer("num_blocks", self.num_blocks, least=0)
        check_integer("max_new_tokens", max_new_tokens, least=1)
        check_integer("batch_size", batch_size, least=1)
        if every_block and self.num_blocks < 1:
            raise ValueError(f"num_blocks: reading blocks out needs at least one, got {num_blocks}. Omit it.")
        base: Any = model.get_base_model()
        if every_block or compiled:
            check_architecture(base)
            if missing := missing_inputs(base):
                raise ValueError(
                    f"model: {type(base).__name__} takes no {', '.join(missing)}, which decoding with a cache needs. "
                    "Use generate instead, or use another base."
                )
        if compiled:
            check_uncompiled("compiled", config)
        self.model = model
        self.adapter = model.active_adapter
        self.blocks = config.block_tokens
        self.every_block = every_block
        self.max_new_tokens = max_new_tokens
        self.eos_id = -1 if eos_id is None else eos_id  # no token is -1
        self.pad_id = pad_id
        self.compiled_size = batch_size if compiled else None
        self._passes = CompiledPasses(base) if compiled else Passes(base)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], *, on_token: Callable[[], None] | None = None) -> Decoded:
        """Decode a batch of prompts.

        Args:
            prompts: token ids of each prompt, without blocks.
            on_token: called after each new token of all unfinished answers, for measurements.

        Raises:
            ValueError: there are no prompts, a prompt is empty, a prompt leaves no room for its answer in the base's
                positions, or there are more prompts than a compiled batch holds.
        """
        rows = self._checked_rows(prompts)
        with evaluation_mode(self.model):
            return self._decode(rows, len(prompts), on_token)

    @torch.no_grad()
    def stream(self, prompt: Sequence[int], kept: PromptCache) -> Iterator[int]:
        """Yield an answer's tokens, EOS included if reached, as soon as each is known.

        Args:
            prompt: token ids, without blocks or with blocks and a begun answer.
            kept: the keys and values of an earlier prompt, of which the common prefix is used; in the end, this
                prompt's.

        Raises:
            ValueError: as for calls, or the decoder is compiled.
        """
        passes = self._passes
        if not isinstance(passes, Passes):
            raise ValueError("compiled: must be False for streams, got True. Create another decoder.")
        rows = self._checked_rows([prompt])
        num_plain = next((place for place, token in enumerate(prompt) if token >= self.blocks.begin), len(prompt))
        plain = prompt[:num_plain]
        # Something must be left to compute, the end of which predicts.
        start = kept.keep_prefix(plain if num_plain < len(prompt) or self.num_blocks else plain[:-1])
        with evaluation_mode(self.model):
            found = passes.finish_trunk(rows, kept.cache, start)
        kept.keep(plain)
        try:
            for step in range(self.max_new_tokens):
                if step > 0:
                    with evaluation_mode(self.model):
                        found = passes.extend(rows, kept.cache, found.tokens, step - 1)
                token = int(found.tokens[0, 0])
                yield token
                if token == self.eos_id:
                    return
        finally:
            kept.crop()

    def _checked_rows(self, prompts: Sequence[Sequence[int]]) -> AnswerRows:
        """Check prompts and model, and lay out the rows on the model's device."""
        check_prompts(prompts)
        check_room(self.model.config, prompts, self.num_memory, self.max_new_tokens, memory_from=self.blocks.begin)
        if self.model.active_adapter != self.adapter or not can_decode(self.model):
            raise ValueError(
                f"model: must have the adapter active that the decoder was made for, {self.adapter!r}, got "
                f"{self.model.active_adapter!r}, or it is disabled. Activate it, or create another decoder."
            )
        if self.every_block and any(holds_memory(prompt, self.blocks.begin) for prompt in prompts):
            raise ValueError("prompts: must not hold blocks where every block is read out. Omit begun answers.")
        return self._lay_out(prompts).to(input_device(self.model))

    @property
    def num_memory(self) -> int:
        """Number of block tokens after a prompt."""
        return self.num_blocks * self.blocks.length

    def _lay_out(self, prompts: Sequence[Sequence[int]]) -> AnswerRows:
        size = self.compiled_size
        if size is not None and len(prompts) > size:
            raise ValueError(f"prompts: a compiled batch holds batch_size={size} at most, got {len(prompts)}.")
        filling = [] if size is None else [prompts[0]] * (size - len(prompts))
        return lay_out_answers(
            [*prompts, *filling],
            self.blocks,
            num_blocks=self.num_blocks,
            every_block=self.every_block,
            max_new_tokens=self.max_new_tokens,
            pad_id=self.pad_id,
            prompt_multiple=1 if size is None else PROMPT_MULTIPLE,
        )

    def _decode(self, rows: AnswerRows, num_prompts: int, on_token: Callable[[], None] | None) -> Decoded:
        """Run the passes and collect predictions; row ``i`` of the current batch is row ``kept[i]`` of the result."""
        cache = self._passes.new_cache(rows)
        found = self._passes.read_trunk(rows, cache)
        states = found.states
        token_ids = found.tokens.new_full((*found.tokens.shape, self.max_new_tokens), self.eos_id)
        log_probs = torch.zeros_like(token_ids, dtype=torch.float32)
        kept = torch.arange(len(token_ids), device=token_ids.device)
        is_done = (kept >= num_prompts)[:, None].expand_as(found.tokens)
        for step in range(self.max_new_tokens):
            if step > 0:
                found = self._passes.extend(rows, cache, found.tokens, step - 1)
            token_ids[kept, :, step], log_probs[kept, :, step] = found.tokens, found.log_probs
            if on_token is not None:
                on_token()
            is_done = is_done | (found.tokens == self.eos_id)
            left = torch.tensor([row for row, done in enumerate(is_done.all(1).tolist()) if not done])
            if not len(left):
                break
            if self.compiled_size is None and 2 * len(left) <= len(is_done):
                cache.batch_select_indices(left)
                rows, kept, is_done = rows.select(left), kept[left], is_done[left]
                found = found._replace(tokens=found.tokens[left])
        return _cut(token_ids[:num_prompts], log_probs[:num_prompts], states[:num_prompts], self.eos_id)


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Refuse an empty batch, and empty prompts, which blocks cannot follow."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"prompts: must be at least one, each of at least one token, got {[len(prompt) for prompt in prompts]} "
            "tokens. Omit empty ones."
        )


def check_room(
    config: Any,
    prompts: Sequence[Sequence[int]],
    num_between: int,
    max_new_tokens: int,
    *,
    between: str | None = "blocks",
    name: str = "prompts",
    memory_from: int | None = None,
) -> None:
    """Refuse prompts that leave no room for their answers in a model's positions.

    Args:
        num_between: tokens or states between a prompt and its answer.
        between: name of what is between them, for the error; None where it is part of the prompt.
        memory_from: the first memory id; prompts that hold memory, before a begun answer, count as they are.

    Raises:
        QuestionError: a prompt leaves no room; the error contains its index.
    """
    room = num_positions(config)
    parts = "and blocks ({} tokens)" if between is None else f"({{}} tokens), {between} ({num_between})"
    remedy = "lower max_new_tokens or num_blocks" if between == "blocks" else "lower max_new_tokens"
    for index, prompt in enumerate(prompts):
        is_begun = memory_from is not None and holds_memory(prompt, memory_from)
        length = len(prompt) - num_between if is_begun else len(prompt)
        if room is not None and length + num_between + max_new_tokens > room:
            raise QuestionError(
                index,
                f"prompt {parts.format(length)} and answer ({max_new_tokens}) must fit into the base's {room} "
                "positions (max_position_embeddings; with longrope original_max_position_embeddings). Omit the "
                f"question, or {remedy}.",
                name,
            )


def _cut(token_ids: Tensor, log_probs: Tensor, states: Tensor, eos_id: int) -> Decoded:
    """Cut (B, R, T) answers after EOS."""
    ids, scores = token_ids.tolist(), log_probs.tolist()
    for row, row_scores in zip(ids, scores, strict=True):
        for answer, answer_scores in zip(row, row_scores, strict=True):
            if eos_id in answer:
                del answer[answer.index(eos_id) + 1 :]
            del answer_scores[len(answer) :]
    return Decoded(ids, scores, states.cpu())
