"""Answerers: a model with its tokenizer, prompt templates and a length limit for answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.data.chats import Chat, begun_of
from rim_peft.data.examples import Question, QuestionError, RowError, Templates
from rim_peft.data.tokenization import Encoder, check_vocabulary, padding_id, tokenize_prompts
from rim_peft.inference.coconut import decode_with_thoughts
from rim_peft.inference.conversation import Conversation
from rim_peft.inference.decoding import BlockDecoder, can_decode, check_room, generate_greedily
from rim_peft.inference.passes import PromptCache, holds_memory
from rim_peft.inference.readout import Readout
from rim_peft.tuner.config import active_config
from rim_peft.tuner.thoughts import check_thinks
from rim_peft.values import check_integer


class Answerer(ABC):
    """Answers questions greedily: questions → prompts → tokens → texts.

    A subclass defines what is between a prompt and its answer, and how to decode; the rest is shared.

    Attributes:
        model: the model.
        tokenizer: its tokenizer, whose EOS ends an answer.
        templates: prompt templates; use those of the training.
        max_new_tokens: most tokens of an answer, EOS included.
    """

    between: ClassVar[str | None] = "blocks"
    """Name of what is between prompt and answer, for errors; None where it is part of the prompt."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        templates: Templates | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        check_integer("max_new_tokens", max_new_tokens, least=1)
        self.model = model
        self.tokenizer = tokenizer
        self.templates = templates or Templates()
        self.max_new_tokens = max_new_tokens

    @property
    def num_rows(self) -> int:
        """Number of rows of the base's embedding: all ids in prompts are smaller."""
        return active_config(self.model).block_tokens.begin

    @property
    def eos_id(self) -> int | None:
        """The token that ends an answer."""
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    @property
    def pad_id(self) -> int:
        """An id for padding."""
        return padding_id(self.tokenizer, self.num_rows)

    @property
    def num_blocks(self) -> int:
        """Blocks after each prompt."""
        return 0

    @property
    @abstractmethod
    def num_between(self) -> int:
        """Tokens or states between a prompt and its answer."""

    @abstractmethod
    def decode(
        self, prompts: Sequence[Sequence[int]], *, on_token: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """Decode a batch of prompts.

        Args:
            prompts: token ids, as returned by :meth:`encode`.
            on_token: called after each new token of all unfinished answers, for measurements.

        Returns:
            Each answer's tokens, EOS included if reached.
        """

    def tokenize(self, questions: Sequence[Question], *, name: str = "questions") -> list[list[int]]:
        """Return the prompts' token ids, whether there is room for their answers or not.

        Args:
            name: name of the questions in errors.

        Raises:
            ValueError: as for :func:`~rim_peft.data.tokenization.tokenize_prompts`.
        """
        prompts = self._tokenize_prompts(questions, name)
        for index, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
            if begun_of(question):
                begun = Encoder(self.tokenizer, self.templates).encode_begun(question)
                check_vocabulary(begun, self.tokenizer, self.num_rows, where=f"{name}[{index}]")
                try:
                    prompt.extend([*self._between_ids(), *begun])
                except RowError as error:
                    raise QuestionError(index, str(error), name) from None
        return prompts

    def _tokenize_prompts(self, questions: Sequence[Question], name: str) -> list[list[int]]:
        """Return the prompts' token ids without begun answers."""
        return tokenize_prompts(questions, self.tokenizer, self.templates, vocab_size=self.num_rows, name=name)

    def _between_ids(self) -> list[int]:
        """Return the ids between a prompt and a begun answer."""
        return []

    def encode(self, questions: Sequence[Question], *, name: str = "questions") -> list[list[int]]:
        """Return the prompts' token ids.

        Raises:
            ValueError: as for :meth:`tokenize`.
            QuestionError: a question leaves no room for its answer in the model's positions.
        """
        prompts = self.tokenize(questions, name=name)
        self.check_room(prompts, name=name)
        return prompts

    def check_room(self, prompts: Sequence[Sequence[int]], *, name: str = "prompts") -> None:
        """Refuse prompts that leave no room for their answers in the model's positions."""
        check_room(
            self.model.config,
            prompts,
            self.num_between,
            self.max_new_tokens,
            between=self.between,
            name=name,
            memory_from=self.num_rows,
        )

    def answer(
        self, questions: Sequence[Question], *, batch_size: int = 8, on_cut: Callable[[str], None] | None = None
    ) -> Iterator[str]:
        """Yield the questions' answers as texts, in their order.

        Args:
            batch_size: questions answered at a time; it does not change the answers.
            on_cut: called with each answer that did not end within ``max_new_tokens``.

        Raises:
            ValueError: as for :meth:`encode`, or ``batch_size`` is out of range.
        """
        check_integer("batch_size", batch_size, least=1)
        yield from self.answer_prompts(self.encode(questions), batch_size=batch_size, on_cut=on_cut)

    def answer_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int,
        on_cut: Callable[[str], None] | None = None,
    ) -> Iterator[str]:
        """Yield the answers to prompts given as token ids; otherwise like :meth:`answer`."""
        for start in range(0, len(prompts), batch_size):
            for token_ids in self.decode(prompts[start : start + batch_size]):
                text = self.read(token_ids)
                if on_cut is not None and self.eos_id not in token_ids:
                    on_cut(text)
                yield text

    def stream(self, prompt: Sequence[int], kept: PromptCache) -> Iterator[int]:
        """Yield the tokens of one prompt's answer, EOS included if reached.

        Here they come all at once, from a fresh prompt; a subclass may yield each as soon as it is known, and keep the
        prompt's keys and values for the next one.

        Args:
            prompt: token ids, as returned by :meth:`encode`.
            kept: what is kept of an earlier prompt.
        """
        (answer,) = self.decode([prompt])
        yield from answer

    def conversation(
        self, messages: Sequence[Mapping[str, str]] = (), *, tools: object = None, chat_template_kwargs: object = None
    ) -> Conversation:
        """Begin a conversation, which keeps its keys and values from turn to turn; see :class:`Conversation`.

        Args:
            messages: what was said before, such as the system's message.
            tools: JSON schemas of tools, for chat templates that use them.
            chat_template_kwargs: variables of the chat template, which come before those of the training.

        Raises:
            RowError: tools or variables have another form.
        """
        return Conversation(self, Chat(messages, tools=tools, chat_template_kwargs=chat_template_kwargs))

    def read(self, token_ids: Sequence[int]) -> str:
        """Return an answer as text, without EOS and surrounding white space."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


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


class ThoughtAnswerer(Answerer):
    """Answers after continuous thoughts (Coconut), a baseline for RiM."""

    between: ClassVar[str | None] = "thoughts and the tokens around them"

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_thoughts: int,
        templates: Templates | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Create an answerer.

        Args:
            model: a model with an active RIM adapter, trained by ``CoconutTrainer``.
            num_thoughts: thoughts after each prompt: ``CoconutConfig.num_thoughts`` of the training.

        Raises:
            ValueError: the model does not support thoughts (:func:`~rim_peft.tuner.thoughts.check_thinks`), or a
                number is out of range.
        """
        super().__init__(model, tokenizer, templates=templates, max_new_tokens=max_new_tokens)
        check_integer("num_thoughts", num_thoughts, least=0)
        check_thinks(model)
        self.num_thoughts = num_thoughts

    @property
    def num_between(self) -> int:
        """Number of thoughts plus ``<b>`` and ``</b>``."""
        return self.num_thoughts + 2

    def _between_ids(self) -> list[int]:
        raise RowError(
            "must end with the user's message where continuous thoughts follow the prompt, got a begun answer "
            "(continue_final_message). Omit it."
        )

    def decode(
        self, prompts: Sequence[Sequence[int]], *, on_token: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """Decode a batch after the prompts' thoughts."""
        return decode_with_thoughts(
            self.model,
            prompts,
            num_thoughts=self.num_thoughts,
            eos_id=self.eos_id,
            max_new_tokens=self.max_new_tokens,
            on_token=on_token,
        )


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


def answer_with_thoughts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    num_thoughts: int,
    templates: Templates | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    on_cut: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Answer questions greedily after continuous thoughts; see :class:`ThoughtAnswerer` and :func:`answer_questions`.

    Raises:
        ValueError: the model does not support thoughts (:func:`~rim_peft.tuner.thoughts.check_thinks`), a number is
            out of range, or a question leaves no room for its answer in the base's positions.
    """
    answerer = ThoughtAnswerer(
        model, tokenizer, num_thoughts=num_thoughts, templates=templates, max_new_tokens=max_new_tokens
    )
    return answerer.answer(questions, batch_size=batch_size, on_cut=on_cut)
