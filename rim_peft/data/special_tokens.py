"""Special tokens that are spelt in a row's text: read as text, so that no row ends its turn and opens another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

_MARK = "\U0010fffd"  # the last character for private use
_GUARDED = re.compile(f"{_MARK}([0-9]+){_MARK}")


class SpecialTokens:
    """A tokenizer's special tokens, and how a text is encoded that spells some of them.

    A text's spellings are *guarded*, replaced by marks that neither templates nor tokenizers read anything into, before
    it is put into a template. Of what the template then gives, the special tokens that stand there are the template's
    own. Texts that spell none stay as they are, and are encoded as ever.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self._tokens = {str(token): (index, token) for index, token in added.items() if token.special and str(token)}
        # The longest first, as tokenizers find them.
        self._names = [_MARK, *sorted(self._tokens, key=len, reverse=True)]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._spelt = re.compile("|".join(map(re.escape, self._names)))
        # Characters that a tokenizer does not know are unknown tokens wherever they stand.
        self._ids = {index for index, _ in self._tokens.values()} - {tokenizer.unk_token_id}

    def guard(self, text: str) -> str:
        """Return a row's text with marks in place of special tokens' names."""
        return self._spelt.sub(lambda match: f"{_MARK}{self._numbers[match[0]]}{_MARK}", text)

    def restore(self, text: str) -> str:
        """Return a guarded text as it was."""
        return _GUARDED.sub(lambda match: self._names[int(match[1])], text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of what a template gave, without what the tokenizer puts around texts."""
        ids: list[int] = []
        for part, token_id in self._cut(text):
            ids.extend(self._encode_plain(self.restore(part)) if token_id is None else [token_id])
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Return a text's ids with no special token among them."""
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids: list[int] = self._tokenizer(text, **options)["input_ids"]
        if self._ids.isdisjoint(ids):
            return ids
        # Models of whole pieces (Unigram, WordLevel) have the names in their vocabulary: such names are cut in two.
        names = [match.span() for match in self._spelt.finditer(text) if len(match[0]) > 1]
        places = [0, *(sum(span) // 2 for span in names), len(text)]
        if not names:
            return ids
        return [token for start, end in pairwise(places) for token in self._encode_plain(text[start:end])]

    def _cut(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield the parts between a text's own special tokens, and these with their ids."""
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
        """Each special token as a group, with the white space that it swallows."""
        patterns = []
        for name in self._names[1:]:
            _, token = self._tokens[name]
            patterns.append("(" + r"\s*" * token.lstrip + re.escape(name) + r"\s*" * token.rstrip + ")")
        return re.compile("|".join(patterns) or "(?!)")


def is_guarded(text: str) -> bool:
    """Tell whether a text holds marks in place of special tokens' names."""
    return _MARK in text
