"""Answerers: a model with its tokenizer, prompt templates and a length limit for answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from rim_peft.data.chats import Chat, begun_of
from rim_peft.data.examples import Question, QuestionError, RowError, Templates
from rim_peft.data.tokenization import Encoder, check_vocabulary, padding_id, tokenize_prompts
from rim_peft.inference.conversation import Conversation
from rim_peft.inference.decoding import check_room
from rim_peft.inference.passes import PromptCache
from rim_peft.tuner.config import active_config
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
    def ends(self) -> list[int]:
        """The tokens that end an answer: EOS."""
        return [] if self.eos_id is None else [self.eos_id]

    def has_ended(self, token_ids: Sequence[int]) -> bool:
        """Tell whether an answer ended by itself, and was not cut."""
        return not set(token_ids).isdisjoint(self.ends)

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
                if on_cut is not None and not self.has_ended(token_ids):
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
