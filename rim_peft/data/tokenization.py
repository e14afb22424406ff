"""Examples → token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Question, RowError, Templates, check_question


class TokenizedExample(TypedDict):
    """Token ids of one example; each step and the answer end with EOS."""

    prompt_ids: list[int]
    step_ids: list[list[int]]
    answer_ids: list[int]


def tokenize_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, templates: Templates | None = None
) -> TokenizedExample:
    """Return an example's token ids: the prompt as the tokenizer begins a text, each readout alone and closed by EOS.

    Raises:
        ValueError: the tokenizer has no EOS token, or no chat template although the question is a chat.
        RowError: the chat template refuses the messages, a prompt has no tokens, or a readout holds EOS before its end.
    """
    encoder = Encoder(tokenizer, templates or Templates())
    (tokenized,) = encoder.encode([encoder.write(example)])
    encoder.check(tokenized)
    return tokenized


def tokenize_prompts(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, templates: Templates | None = None
) -> list[list[int]]:
    """Return the prompts' token ids of questions alone, as :func:`tokenize_example` has them.

    Raises:
        ValueError: as for :func:`tokenize_example`.
        RowError: a question is empty or no question.
    """
    encoder = Encoder(tokenizer, templates or Templates())
    for question in questions:
        check_question(question)
    return encoder.encode_prompts([encoder.write_prompt(question) for question in questions])


def tokenize_separator(tokenizer: PreTrainedTokenizerBase, separator: str) -> list[int]:
    """Return the token ids of what stands behind each step of a written chain of thought.

    Raises:
        ValueError: the tokenizer has no tokens for it.
    """
    ids: list[int] = tokenizer(separator, add_special_tokens=False)["input_ids"]
    read_back = str(tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
    if not ids or (separator.strip() or separator) not in (read_back.strip() or read_back):
        raise ValueError(
            f"step_separator: must be a text that the tokenizer can write, got {separator!r}, which it reads back as "
            f"{read_back!r}. Choose another."
        )
    return ids


@dataclass(frozen=True)
class WrittenPrompt:
    """A prompt as text; a chat's holds its special tokens."""

    text: str
    is_chat: bool


@dataclass(frozen=True)
class Written:
    """An example as texts; the last readout is the answer."""

    prompt: WrittenPrompt
    readouts: list[str]


@dataclass(frozen=True)
class Encoder:
    """Examples → texts → token ids."""

    tokenizer: PreTrainedTokenizerBase
    templates: Templates

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer: must have an EOS token, which ends every readout, got none. Set tokenizer.eos_token to the "
                "token at which the model stops."
            )

    def write(self, example: Example) -> Written:
        """Fill in the templates."""
        readouts = [self.templates.step.format(step=step) for step in example.steps or ()]
        readouts.append(self.templates.answer.format(answer=example.answer))
        return Written(self.write_prompt(example.question), readouts)

    def write_prompt(self, question: Question) -> WrittenPrompt:
        """Fill in the prompt's template, or the tokenizer's for a chat."""
        if isinstance(question, str):
            return WrittenPrompt(self.templates.prompt.format(question=question), is_chat=False)
        return WrittenPrompt(self._render(question), is_chat=True)

    def encode(self, written: Sequence[Written]) -> list[TokenizedExample]:
        """Encode many examples at once, because fast tokenizers work through a list in parallel."""
        prompts = self.encode_prompts([item.prompt for item in written])
        ids = iter(self._encode([text for item in written for text in item.readouts]))
        rows: list[TokenizedExample] = []
        for item, prompt in zip(written, prompts, strict=True):
            *steps, answer = [self._close(next(ids)) for _ in item.readouts]
            rows.append({"prompt_ids": prompt, "step_ids": steps, "answer_ids": answer})
        return rows

    def encode_prompts(self, prompts: Sequence[WrittenPrompt]) -> list[list[int]]:
        """Encode prompts, each text begun as the tokenizer begins texts."""
        ids = self._encode([prompt.text for prompt in prompts])
        plain = next(
            ((prompt, row) for prompt, row in zip(prompts, ids, strict=True) if row and not prompt.is_chat), None
        )
        begin = self._begin(plain[0].text, plain[1]) if plain else []
        return [row if prompt.is_chat else begin + row for prompt, row in zip(prompts, ids, strict=True)]

    def check(self, row: TokenizedExample) -> None:
        """Check that prompt and readouts have tokens, and that readouts stop at their end only."""
        if not row["prompt_ids"]:
            raise RowError("question: gives no tokens")
        for readout in (*row["step_ids"], row["answer_ids"]):
            if len(readout) == 1:
                raise RowError("a step or the answer gives no tokens")
            if self.tokenizer.eos_token_id in readout[:-1]:
                raise RowError(f"a step or the answer holds the EOS token {self.tokenizer.eos_token!r} before its end")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # `verbose` would warn of texts beyond the model's length; those are reported as bad rows.
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _begin(self, text: str, bare: list[int]) -> list[int]:
        """Return what the tokenizer puts before a text; what some put behind it, EOS, would end the prompt."""
        full = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        raise ValueError(
            "tokenizer: special tokens must stand before or behind a text, but those of "
            f"{type(self.tokenizer).__name__} change {text[:40]!r}. Use another tokenizer."
        )

    def _close(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "tokenizer: must have a chat template to render a question of chat messages, got none. Set "
                "tokenizer.chat_template, or give questions as texts."
            )
        try:
            chat = [dict(message) for message in messages]
            return str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            raise RowError(f"question: the chat template refuses the messages: {error}") from None
