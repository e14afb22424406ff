"""Answers after the last block, and readouts of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Question, Templates
from rim_peft.inference.answerer import Answerer
from rim_peft.inference.decoding import BlockDecoder, can_decode
from rim_peft.inference.greedy import generate_greedily
from rim_peft.inference.passes import PromptCache, holds_memory
from rim_peft.inference.readout import Readout


class BlockAnswerer(Answerer):
    """Answers after the last block, and reads out every block.

    Attributes:
        decoder: decodes if the model can branch or all of its layers store only keys and values; otherwise the
            model's own ``generate`` does.
    """

    decoder_class: ClassVar[type[BlockDecoder]] = BlockDecoder

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        templates: Templates | None = None,
        num_blocks: int | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Create an answerer.

        Args:
            num_blocks: blocks after each prompt; the adapter's own number by default.

        Raises:
            ValueError: the model has no active RIM adapter, or a number is out of range.
        """
        super().__init__(model, tokenizer, templates=templates, max_new_tokens=max_new_tokens)
        self.decoder = self._make_decoder(num_blocks=num_blocks)

    def _between_ids(self) -> list[int]:
        return self.decoder.blocks.ids(self.num_blocks)

    def _make_decoder(self, **options: Any) -> BlockDecoder:
        return self.decoder_class(
            self.model, eos_id=self.eos_id, pad_id=self.pad_id, max_new_tokens=self.max_new_tokens, **options
        )

    @property
    def num_blocks(self) -> int:
        """Blocks after each prompt."""
        return self.decoder.num_blocks

    @property
    def num_between(self) -> int:
        """Number of block tokens."""
        return self.decoder.num_memory

    def decode(
        self, prompts: Sequence[Sequence[int]], *, on_token: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """Decode a batch after the last block."""
        if can_decode(self.model):
            decoded = self.decoder(self._followed(prompts), on_token=on_token)
            return [answer for (answer,) in decoded.token_ids]
        return self.generate(prompts, on_token=on_token)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, on_token: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """Decode a batch with the model's own ``generate``, which gives the same answers."""
        first = self.decoder.blocks.begin
        rows, num_begun = self._followed(prompts), []
        if any(holds_memory(prompt, first) for prompt in prompts):  # before begun answers; generate inserts it again
            ends = [max((place for place, token in enumerate(row) if token >= first), default=-1) for row in rows]
            num_begun = [len(row) - 1 - end if end >= 0 else 0 for row, end in zip(rows, ends, strict=True)]
            rows = [[token for token in row if token < first] for row in rows]
        options: dict[str, Any] = {"num_begun": num_begun} if num_begun else {}
        return generate_greedily(
            self.model,
            rows,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            max_new_tokens=self.max_new_tokens,
            on_token=on_token,
            num_blocks=self.num_blocks,
            **options,
        )

    def stream(self, prompt: Sequence[int], kept: PromptCache) -> Iterator[int]:
        """Yield the tokens of one prompt's answer, each as soon as it is known.

        Where only the model's own ``generate`` can decode, they come all at once, from a fresh prompt.
        """
        if not can_decode(self.model):
            yield from super().stream(prompt, kept)
            return
        (row,) = self._followed([prompt])
        yield from self.decoder.stream(row, kept)

    def _followed(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return the prompts with what else comes before the blocks."""
        return prompts

    def read_blocks(self, questions: Sequence[Question]) -> list[list[Readout]]:
        """Read out every block of every question in one batch; see :class:`BlockDecoder`.

        Returns:
            The readouts of each question, block 1 first.

        Raises:
            ValueError: as for :meth:`encode`, or there are no blocks, or the base cannot run branching rows.
        """
        decoder = self._make_decoder(num_blocks=self.num_blocks, every_block=True)
        prompts = self.encode(questions)
        if not prompts:
            return []
        decoded = decoder(prompts)
        return [
            [
                Readout(k, self.read(ids), ids, token_log_probs=scores, hidden_state=state)
                for k, (ids, scores, state) in enumerate(zip(*parts, strict=True), start=1)
            ]
            for parts in zip(decoded.token_ids, decoded.log_probs, decoded.states, strict=True)
        ]


def answer_questions(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    templates: Templates | None = None,
    num_blocks: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    on_cut: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Answer questions greedily after the last block, one text per question, in their order.

    Args:
        templates: prompt templates; use those that the adapter was trained with.
        num_blocks: blocks after each prompt; the adapter's own number by default.
        max_new_tokens: most tokens of an answer, EOS included.
        batch_size: questions answered at a time; it does not change the answers.
        on_cut: called with each answer that did not end within ``max_new_tokens``.

    Raises:
        ValueError: the model has no active RIM adapter, a number is out of range, or a question leaves no room for its
            answer in the base's positions.
    """
    options: dict[str, Any] = {"templates": templates, "num_blocks": num_blocks, "max_new_tokens": max_new_tokens}
    return BlockAnswerer(model, tokenizer, **options).answer(questions, batch_size=batch_size, on_cut=on_cut)


def read_blocks(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    templates: Templates | None = None,
    num_blocks: int | None = None,
    max_new_tokens: int = 64,
) -> list[list[Readout]]:
    """Decode the readout of every block of every question, greedily and all at once.

    Each forward pass extends all readouts by one token, with one cache of the trunk. Each readout sees exactly what it
    sees in training and in ``generate(num_blocks=k)``; see :class:`BlockDecoder`.

    Args:
        questions: texts or chats; they form one batch.
        num_blocks: blocks after each prompt, at least 1; the adapter's own number by default.
        max_new_tokens: most tokens of a readout, EOS included.

    Returns:
        The readouts of each question, block 1 first.

    Raises:
        ValueError: the model has no active RIM adapter, the base cannot run branching rows, a number is out of range,
            or a question leaves no room for its answer in the base's positions.
    """
    options: dict[str, Any] = {"templates": templates, "num_blocks": num_blocks, "max_new_tokens": max_new_tokens}
    return BlockAnswerer(model, tokenizer, **options).read_blocks(questions)
