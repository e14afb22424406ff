"""Special tokens spelt in texts of rows: guarded, so that they are read as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from rim_peft.data.chat_templates import variables_of

_MARK = "\U0010fffd"  # the last private-use character

_GUARDED = re.compile(f"{_MARK}([0-9]+){_MARK}")


class SpecialTokens:
    """A tokenizer's special tokens, and the encoding of texts that spell them.

    Before a text is put into a template, the names of special tokens in it are *guarded*: replaced by marks that mean
    nothing to templates and tokenizers. So the special tokens in the template's output are the template's own. Texts
    without such names are not changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self._tokens = {str(token): (index, token) for index, token in added.items() if token.special and str(token)}
        # Longest first, as tokenizers match them.
        self._names = [_MARK, *sorted(self._tokens, key=len, reverse=True)]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._spelt = re.compile("|".join(map(re.escape, self._names)))
        # The unknown token does not count: unknown characters give it in any text.
        self._ids = {index for index, _ in self._tokens.values()} - {tokenizer.unk_token_id}

    def guard(self, text: str) -> str:
        """Replace the names of special tokens in a row's text by marks."""
        return self._spelt.sub(lambda match: f"{_MARK}{self._numbers[match[0]]}{_MARK}", text)

    def restore(self, text: str) -> str:
        """Undo :meth:`guard`."""
        return _GUARDED.sub(lambda match: self._names[int(match[1])], text)

    def remove(self, text: str) -> str:
        """Return a text without the names of special tokens, as it is decoded."""
        return self._spelt.sub("", text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a template's output, without the tokens that the tokenizer adds around texts."""
        ids: list[int] = []
        for part, token_id in self._cut(text):
            ids.extend(self._encode_plain(self.restore(part)) if token_id is None else [token_id])
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Return a text's ids, none of them a special token."""
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids: list[int] = self._tokenizer(text, **options)["input_ids"]
        if self._ids.isdisjoint(ids):
            return ids
        # Unigram and WordLevel models have the names in their vocabulary, so the names are cut in two.
        names = [match.span() for match in self._spelt.finditer(text) if len(match[0]) > 1]
        places = [0, *(sum(span) // 2 for span in names), len(text)]
        if not names:
            return ids
        return [token for start, end in pairwise(places) for token in self._encode_plain(text[start:end])]

    def _cut(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield a text's own special tokens with their ids, and the parts between them with None."""
        place = 0
        for match in self._own.finditer(text):
            if match.start() > place:
                yield text[place : match.start()], None
            yield match[0], self._tokens[self._names[match.lastindex or 0]][0]
            place = match.end()
        if place < len(text):
            yield text[place:], None

    @cached_property
    def _own(self) -> re.Pattern[str]:
        """A pattern with each special token as a group, with the white space that it absorbs."""
        patterns = []
        for name in self._names[1:]:
            _, token = self._tokens[name]
            patterns.append("(" + r"\s*" * token.lstrip + re.escape(name) + r"\s*" * token.rstrip + ")")
        return re.compile("|".join(patterns) or "(?!)")


def template_variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the names that a tokenizer's chat templates read; none without a template."""
    found: Any = tokenizer.chat_template or {}
    templates = found.values() if isinstance(found, dict) else [found]
    return set().union(*map(variables_of, templates))


def is_guarded(text: str) -> bool:
    """Tell whether a text holds marks for special tokens."""
    return _MARK in text
