"""Answers with changed memory: blocks of another question, memory ids in any order, or random rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from rim_peft.data.examples import Question, Templates
from rim_peft.inference.block_answerer import BlockAnswerer
from rim_peft.inference.decoding import BlockDecoder, Decoded, can_decode
from rim_peft.inference.passes import AnswerRows, Passes, Prediction, holds_memory, predict
from rim_peft.tuner.bases import input_device
from rim_peft.tuner.config import active_config
from rim_peft.tuner.memory_embedding import MemoryEmbedding, initial_rows
from rim_peft.values import check_integer


class SwappingDecoder(BlockDecoder):
    """Decodes answers after the last block, with the first blocks taken from other prompts.

    The trunks of a prompt and of its donor are computed. In every layer the donor's keys and values replace those of
    the first ``num_swapped`` blocks, and the blocks after them are computed again. If all blocks are swapped, only the
    last ``</b>`` is computed again, since the answer's first token is predicted from its state: it sees the prompt and
    the donor's memory. So only the keys and values of a donor's blocks affect the answer.
    """

    def swap(
        self, prompts: Sequence[Sequence[int]], donors: Sequence[Sequence[int]], *, num_swapped: int | None = None
    ) -> Decoded:
        """Decode a batch of prompts; ``states`` of the result is empty.

        Args:
            prompts: token ids without blocks.
            donors: one per prompt and of equal length, since keys contain their positions.
            num_swapped: number of first blocks taken from the donor; all by default.

        Raises:
            ValueError: prompts and donors differ in number or length, or ``num_swapped`` is out of range.
        """
        count = self.num_blocks if num_swapped is None else num_swapped
        check_integer("num_swapped", count, least=1)
        if count > self.num_blocks:
            raise ValueError(f"num_swapped: must be at most the number of blocks, {self.num_blocks}, got {count}.")
        lengths, others = [len(prompt) for prompt in prompts], [len(donor) for donor in donors]
        if lengths != others:
            raise ValueError(
                f"donors: must be as many and as long as the prompts, {lengths} tokens, got {others}. Pair questions "
                "of equal length."
            )
        if any(holds_memory(ids, self.blocks.begin) for ids in (*prompts, *donors)):
            raise ValueError("prompts: must hold no blocks, of which others are inserted. Omit begun answers.")
        if not donors:
            return self(prompts)  # refuses an empty batch
        memory = self.num_blocks * self.blocks.length
        num_computed = memory - min(count * self.blocks.length, memory - 1)
        rows = self._lay_out(donors).to(input_device(self.model))
        plain = self._passes
        try:
            self._passes = _SwappingPasses(plain.base, rows, num_memory=memory, num_computed=num_computed)
            return self(prompts)
        finally:
            self._passes = plain


class _SwappingPasses(Passes):
    """Passes whose trunk has donors' keys and values in some of its memory columns.

    The last ``num_memory`` columns of a trunk are memory; the last ``num_computed`` of these are computed again.
    """

    def __init__(self, base: Any, donors: AnswerRows, *, num_memory: int, num_computed: int) -> None:
        super().__init__(base)
        self.donors = donors
        self.num_memory = num_memory
        self.num_computed = num_computed

    def read_trunk(self, rows: AnswerRows, cache: Cache) -> Prediction:
        """Compute both trunks, swap, and predict the first token of every answer."""
        donors = self.new_cache(self.donors)
        super().read_trunk(self.donors, donors)
        super().read_trunk(rows, cache)
        first = len(rows.trunk) - self.num_memory
        start = len(rows.trunk) - self.num_computed
        cache.crop(-self.num_computed)
        layers: Any = zip(cache.layers, donors.layers, strict=True)
        for layer, donor in layers:
            if layer.is_initialized:  # otherwise it uses another layer's keys and values
                layer.keys = torch.cat([layer.keys[..., :first, :], donor.keys[..., first:start, :]], dim=-2)
                layer.values = torch.cat([layer.values[..., :first, :], donor.values[..., first:start, :]], dim=-2)
        places = (rows.trunk[start:], rows.trunk)
        found = predict(self.base, rows.layout, cache, rows.trunk_ids[:, start:], places, branches=False)
        return Prediction(found.tokens[:, -1:], found.log_probs[:, -1:], found.states)


class SwappingAnswerer(BlockAnswerer):
    """Answers questions with other questions' blocks in the cache; see :class:`SwappingDecoder`.

    Raises:
        ValueError: as for :class:`BlockAnswerer`, or :func:`check_swaps` refuses the model.
    """

    decoder: SwappingDecoder
    decoder_class: ClassVar[type[BlockDecoder]] = SwappingDecoder

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        check_swaps(model)
        super().__init__(model, tokenizer, **options)

    def answer_swapped(
        self,
        questions: Sequence[Question],
        donors: Sequence[Question],
        *,
        num_swapped: int | None = None,
        batch_size: int = 8,
    ) -> Iterator[str]:
        """Yield the questions' answers.

        Args:
            donors: questions whose blocks are inserted; as many, with prompts of the same number of tokens.
            num_swapped: number of first blocks taken from the donor; all by default.
            batch_size: questions answered at a time; it does not change the answers.

        Raises:
            ValueError: as for :meth:`answer`, or a donor's prompt has another length.
        """
        check_integer("batch_size", batch_size, least=1)
        prompts, others = self.encode(questions), self.encode(donors, name="donors")
        for start in range(0, max(len(prompts), len(others)), batch_size):
            batch = slice(start, start + batch_size)
            decoded = self.decoder.swap(prompts[batch], others[batch], num_swapped=num_swapped)
            yield from (self.read(answer) for (answer,) in decoded.token_ids)


class MemoryAnswerer(BlockAnswerer):
    """Answers questions after any sequence of memory ids instead of the blocks.

    The ids are treated as part of the prompts: a trunk has the positions and masks of a plain sequence.

    Raises:
        ValueError: as for :class:`BlockAnswerer`, or :func:`check_swaps` refuses the model.
    """

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, memory_ids: Sequence[int], **options: Any
    ) -> None:
        check_swaps(model)
        super().__init__(model, tokenizer, num_blocks=0, **options)
        self.memory_ids = list(memory_ids)

    @property
    def num_between(self) -> int:
        """Number of the ids."""
        return len(self.memory_ids)

    def _followed(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        first = self.decoder.blocks.begin
        return [list(prompt) if holds_memory(prompt, first) else [*prompt, *self.memory_ids] for prompt in prompts]

    def _between_ids(self) -> list[int]:
        return self.memory_ids


def answer_with_swapped_blocks(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    donors: Sequence[Question],
    *,
    num_swapped: int | None = None,
    templates: Templates | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> Iterator[str]:
    """Answer questions with other questions' blocks in the cache; see :class:`SwappingAnswerer`."""
    answerer = SwappingAnswerer(model, tokenizer, templates=templates, max_new_tokens=max_new_tokens)
    return answerer.answer_swapped(questions, donors, num_swapped=num_swapped, batch_size=batch_size)


def answer_with_memory_ids(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    memory_ids: Sequence[int],
    *,
    templates: Templates | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> Iterator[str]:
    """Answer questions after any memory ids instead of the blocks; see :class:`MemoryAnswerer`."""
    answerer = MemoryAnswerer(model, tokenizer, memory_ids, templates=templates, max_new_tokens=max_new_tokens)
    return answerer.answer(questions, batch_size=batch_size)


@contextmanager
def random_rows(model: PeftModel, *, seed: int) -> Iterator[None]:
    """Temporarily replace the active adapter's memory rows by random ones with the vocabulary's mean and spread.

    ``init_memory="vocabulary"`` starts a training from rows like these. On exit, also after an error, the adapter's
    own rows are restored; torch's random state does not change.

    Raises:
        ValueError: the model has no active RIM adapter.
    """
    active_config(model)
    base: Any = model.get_base_model()
    memory: MemoryEmbedding = base.get_input_embeddings()
    rows = memory.rows(str(model.active_adapter))
    own = rows.detach().clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with memory.readable_weight() as weight:
            drawn = initial_rows(weight.detach(), "vocabulary", 0.0)
    try:
        with torch.no_grad():
            rows.copy_(drawn)
        yield
    finally:
        with torch.no_grad():
            rows.copy_(own)


def check_swaps(model: PeftModel) -> None:
    """Refuse a model whose blocks cannot be exchanged in its cache.

    Raises:
        ValueError: it has no active RIM adapter, no blocks, or layers that store more than keys and values.
    """
    check_integer("num_blocks", active_config(model).num_blocks, least=1)
    if not can_decode(model):
        base: Any = model.get_base_model()
        raise ValueError(
            f"model: exchanging memory needs layers that store only keys and values, and an enabled adapter, got "
            f"{type(base).__name__}. Use a base with full or sliding attention in every layer, and enable the adapter."
        )
