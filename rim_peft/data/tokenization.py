"""Convert examples to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rim_peft.data.chat_templates import variables_of
from rim_peft.data.chats import Chat, as_chat, begun_of
from rim_peft.data.examples import Example, Question, QuestionError, RowError, Templates, check_question
from rim_peft.data.special_tokens import SpecialTokens, is_guarded, template_variables


class TokenizedExample(TypedDict):
    """Token ids of one example; each step and the answer end with EOS."""

    prompt_ids: list[int]
    step_ids: list[list[int]]
    answer_ids: list[int]


def tokenize_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates | None = None,
    *,
    vocab_size: int | None = None,
) -> TokenizedExample:
    """Return an example's token ids.

    The prompt starts with the tokens that the tokenizer puts before a text. Each readout is encoded alone and ends with
    EOS.

    Args:
        vocab_size: rows of the base's embedding, V; ids from V on belong to memory tokens. None: not checked.

    Raises:
        ValueError: the tokenizer has no EOS token, has no chat template for a question that is a chat, or gives ids
            beyond the base's embedding.
        RowError: the chat template refuses the messages, a prompt has no tokens, or a readout holds EOS before its end.
    """
    encoder = Encoder(tokenizer, templates or Templates())
    (tokenized,) = encoder.encode([encoder.write(example)])
    encoder.check(tokenized)
    check_vocabulary(all_ids(tokenized), tokenizer, vocab_size, where="example")
    return tokenized


def tokenize_prompts(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates | None = None,
    *,
    vocab_size: int | None = None,
    name: str = "questions",
) -> list[list[int]]:
    """Return the prompt ids of questions, the same as those of :func:`tokenize_example`.

    Raises:
        ValueError: as for :func:`tokenize_example`.
        QuestionError: a question is empty, invalid, or refused by the chat template; says which.
    """
    encoder = Encoder(tokenizer, templates or Templates())
    prompts = []
    for index, question in enumerate(questions):
        try:
            check_question(question)
            prompts.append(encoder.write_prompt(question))
        except RowError as error:
            raise QuestionError(index, str(error), name) from None
    check_vocabulary([encoder.tokenizer.eos_token_id], tokenizer, vocab_size, where="tokenizer.eos_token")
    rows = encoder.encode_prompts(prompts)
    for index, ids in enumerate(rows):
        check_vocabulary(ids, tokenizer, vocab_size, where=f"{name}[{index}]")
    return rows


def all_ids(row: TokenizedExample) -> list[int]:
    """Return all ids of a tokenised row: prompt, steps, answer."""
    return [token for part in (row["prompt_ids"], *row["step_ids"], row["answer_ids"]) for token in part]


def check_vocabulary(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocab_size: int | None, *, where: str
) -> None:
    """Refuse ids beyond the base's embedding, which would be taken for memory tokens.

    A tokenizer may have more tokens than the base has rows, as long as no text uses them.

    Args:
        ids: a text's token ids.
        vocab_size: rows of the base's embedding; None: not checked.
        where: the place of the text, for the error.

    Raises:
        ValueError: an id is too large.
    """
    if vocab_size is None or not ids or (largest := max(ids)) < vocab_size:
        return
    raise ValueError(
        f"{where}: tokens must have ids below {vocab_size}, the number of rows of the base's embedding, got {largest} "
        f"({tokenizer.convert_ids_to_tokens(largest)!r}). Resize the base before the adapter is attached "
        "(base.resize_token_embeddings(len(tokenizer))), or use the base's own tokenizer."
    )


def padding_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """Return the padding id; EOS if there is no padding token or the base has no row for it (padding is masked)."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    return int(eos if pad is None or (vocab_size is not None and pad >= vocab_size) else pad)


def tokenize_separator(
    tokenizer: PreTrainedTokenizerBase, separator: str, *, vocab_size: int | None = None
) -> list[int]:
    """Return the token ids of the separator after each step of a written chain of thought.

    Raises:
        ValueError: the tokenizer has no tokens for it, or the base no rows for them.
    """
    ids: list[int] = tokenizer(separator, add_special_tokens=False)["input_ids"]
    read_back = str(tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
    if not ids or (separator.strip() or separator) not in (read_back.strip() or read_back):
        raise ValueError(
            f"step_separator: must be a text that the tokenizer can encode, got {separator!r}, which it decodes as "
            f"{read_back!r}. Choose another."
        )
    check_vocabulary(ids, tokenizer, vocab_size, where="step_separator")
    return ids


@dataclass(frozen=True)
class WrittenPrompt:
    """A prompt as text, with guarded special tokens; a chat's text includes the tokens at its beginning."""

    text: str
    is_chat: bool


@dataclass(frozen=True)
class Written:
    """An example as texts; the last readout is the answer."""

    prompt: WrittenPrompt
    readouts: list[str]


@dataclass(frozen=True)
class Encoder:
    """Convert examples to texts, and texts to token ids."""

    tokenizer: PreTrainedTokenizerBase
    templates: Templates

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer: must have an EOS token, which ends every readout, got none. Set tokenizer.eos_token to the "
                "token at which the model stops."
            )
        self._check_variables()

    def _check_variables(self) -> None:
        """Refuse variables that no chat template reads, such as mistyped ones."""
        if not self.templates.chat_template_kwargs:
            return
        known = template_variables(self.tokenizer)
        for name in self.templates.chat_template_kwargs:
            if name not in known:
                has = f"reads {', '.join(sorted(known))}" if known else "does not exist"
                raise ValueError(
                    f"chat_template_kwargs.{name}: must be a variable of the tokenizer's chat template, which {has}. "
                    "Correct it or omit it."
                )

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The tokenizer's special tokens."""
        return SpecialTokens(self.tokenizer)

    def guard(self, text: str) -> str:
        """Guard the special tokens spelt in a row's text, unless they are allowed."""
        return text if self.templates.allow_special_tokens else self.special_tokens.guard(text)

    def guard_chat(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Return chat messages with guarded contents."""
        return [{**message, "content": self.guard(message["content"])} for message in messages]

    @cached_property
    def _answer_words(self) -> tuple[str, str]:
        """The answer template's words before and after an answer, without special tokens."""
        template = self.special_tokens.remove(self.templates.answer.format(answer="\0"))
        before, _, after = template.strip().partition("\0")
        return before, after

    @cached_property
    def _decoded_words(self) -> tuple[str, str]:
        """The same words as the tokenizer decodes them."""
        before, after = self.read_back(self._answer_words)
        return before, after

    def answer_alone(self, text: str) -> str:
        """Return a decoded answer without the words of the answer template; a text without them stays as it is."""
        before, after = self._decoded_words
        rest = text.removeprefix(before)
        goes_on = self._answer_words[0][-1:].isspace() and rest and not rest[0].isspace()  # "A" is no start of "Apple"
        if not (before or after) or not text.startswith(before) or goes_on:
            return text
        return rest.strip().removesuffix(after).strip()

    def as_said(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """Return a chat in which the assistant's turns have the words of the answer template.

        A model says its answers with these words, and so do the messages of a conversation with it. Rows have their
        answers without; what has the words already is not changed.
        """
        before, after = self._answer_words
        is_asked, said = False, []
        for message in messages:
            is_asked = is_asked or message["role"] == "user"  # a greeting answers nothing
            text = message["content"]
            is_answer = is_asked and message["role"] == "assistant"
            is_said = not is_answer or (text.startswith(before) and text.endswith(after))
            said.append(message if is_said else {**message, "content": f"{before}{text}{after}"})
        return said

    def _guard_all(self, value: Any) -> Any:
        """Guard all texts in a value of a row."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, Mapping):
            return {name: self._guard_all(item) for name, item in value.items()}
        return [self._guard_all(item) for item in value] if isinstance(value, list | tuple) else value

    def spells_tokens(self, question: Question) -> bool:
        """Tell whether a question spells special tokens, which are read as text."""
        contents = [question] if isinstance(question, str) else [message["content"] for message in question]
        return any(is_guarded(self.guard(text)) for text in contents)

    def write(self, example: Example) -> Written:
        """Fill in the templates."""
        readouts = [self.templates.step.format(step=self.guard(step)) for step in example.steps or ()]
        readouts.append(self.templates.answer.format(answer=self.guard(example.answer)))
        return Written(self.write_prompt(example.question), readouts)

    def write_prompt(self, question: Question) -> WrittenPrompt:
        """Fill in the prompt template, or the tokenizer's chat template for a chat."""
        if isinstance(question, str):
            return WrittenPrompt(self.templates.prompt.format(question=self.guard(question)), is_chat=False)
        return WrittenPrompt(self._render(question), is_chat=True)

    def encode(self, written: Sequence[Written]) -> list[TokenizedExample]:
        """Encode many examples at once, since fast tokenizers encode a list in parallel."""
        prompts = self.encode_prompts([item.prompt for item in written])
        ids = iter(self._encode([text for item in written for text in item.readouts]))
        rows: list[TokenizedExample] = []
        for item, prompt in zip(written, prompts, strict=True):
            *steps, answer = [self._close(next(ids)) for _ in item.readouts]
            rows.append({"prompt_ids": prompt, "step_ids": steps, "answer_ids": answer})
        return rows

    def encode_prompts(self, prompts: Sequence[WrittenPrompt]) -> list[list[int]]:
        """Encode prompts, each with the tokens that the tokenizer puts before a text."""
        ids = self._encode([prompt.text for prompt in prompts])
        texts = [(item.text, row) for item, row in zip(prompts, ids, strict=True) if row and not item.is_chat]
        plain: list[tuple[str | None, list[int]]] = [(text, row) for text, row in texts if not is_guarded(text)]
        begin = self._begin(*next(iter(plain), (None, []))) if texts else []
        return [row if prompt.is_chat else begin + row for prompt, row in zip(prompts, ids, strict=True)]

    def read_back(self, texts: Sequence[str]) -> list[str]:
        """Encode texts and decode them again, as generated answers are decoded."""
        return self._decoded([self.guard(text) for text in texts])

    def read_back_steps(self, steps: Sequence[str]) -> list[str]:
        """Return the texts of readouts that were trained on these steps, as generated ones are decoded."""
        return self._decoded([self.templates.step.format(step=self.guard(step)) for step in steps])

    def _decoded(self, texts: list[str]) -> list[str]:
        rows = self._encode(texts)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in rows]

    def check(self, row: TokenizedExample) -> None:
        """Check that prompt and readouts have tokens, and that EOS is only at the end of readouts."""
        if not row["prompt_ids"]:
            raise RowError("question: gives no tokens")
        for readout in (*row["step_ids"], row["answer_ids"]):
            if len(readout) == 1:
                raise RowError("a step or the answer gives no tokens")
            if self.tokenizer.eos_token_id in readout[:-1]:
                raise RowError(f"a step or the answer holds the EOS token {self.tokenizer.eos_token!r} before its end")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        plain = [text for text in texts if not is_guarded(text)]
        # `verbose` would warn about texts longer than the model's limit; these are reported as bad rows.
        options: dict[str, Any] = {
            "add_special_tokens": False,
            "truncation": False,
            "return_attention_mask": False,
            "return_token_type_ids": False,
            "verbose": False,
        }
        rows = iter(self.tokenizer(plain, **options)["input_ids"] if plain else [])
        return [self.special_tokens.encode(text) if is_guarded(text) else next(rows) for text in texts]

    def encode_guarded(self, text: str, *, begins: bool) -> list[int]:
        """Encode a text with guarded parts; with ``begins``, put the tokenizer's own tokens before it."""
        return [*(self._begin(None, []) if begins else ()), *self.special_tokens.encode(text)]

    def _begin(self, text: str | None, bare: list[int]) -> list[int]:
        """Return the tokens that the tokenizer puts before a text.

        Those that some put after it are dropped: EOS would end the prompt.

        Args:
            text: a text without guarded parts; None for any.
            bare: its ids without added tokens.
        """
        if text is None:
            text, (bare,) = "a", self._encode(["a"])
        full = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        raise ValueError(
            "tokenizer: special tokens must come before or after a text, but those of "
            f"{type(self.tokenizer).__name__} change {text[:40]!r}. Use another tokenizer."
        )

    def _close(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def encode_begun(self, question: Question) -> list[int]:
        """Return the ids of a question's begun answer, the first of a readout's."""
        (ids,) = self._encode([self.guard(begun_of(question))])
        return ids

    def _render(self, question: Question) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "tokenizer: must have a chat template to render a question of chat messages, got none. Set "
                "tokenizer.chat_template, or give questions as texts."
            )
        chat = as_chat(question)
        options = {**self.templates.chat_template_kwargs, **self._guard_all(chat.chat_template_kwargs)}
        if chat.tools:
            options["tools"] = self._guard_tools(chat)
        try:
            messages = self.guard_chat(self.as_said(chat.asked))
            options.update(add_generation_prompt=True, tokenize=False)
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise RowError(f"question: the chat template refuses the messages: {error}") from None
        except (TypeError, AttributeError) as error:
            if not options.keys() - {"add_generation_prompt", "tokenize"}:
                raise
            raise RowError(f"chat_template_kwargs: the chat template fails with {options}: {error}") from None

    def _guard_tools(self, chat: Chat) -> list[Any]:
        """Return a chat's tools with guarded texts.

        Raises:
            RowError: the chat template does not use tools.
        """
        template = self.tokenizer.get_chat_template(tools=[dict(tool) for tool in chat.tools])
        if "tools" not in variables_of(template):
            raise RowError(
                "tools: must be empty, since the tokenizer's chat template does not use tools, got "
                f"{len(chat.tools)}. Omit the column, or choose a base whose template does"
            )
        tools: list[Any] = self._guard_all(chat.tools)
        return tools
