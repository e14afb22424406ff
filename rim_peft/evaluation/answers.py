"""Answers in generated texts, and gold answers as a tokenizer can write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Question, Templates
from rim_peft.data.tokenization import Encoder
from rim_peft.tasks import Task


def answer_of(text: str, separator: str | None, *, num_inside: int = 0) -> str:
    """Return the text after the last separator; all of it without a separator.

    >>> answer_of("2*3=6, 6+1=7, 7", ", "), answer_of("(3,4)=p, (3,4)", ", "), answer_of("a , b", ", ")
    ('7', '(3,4)', 'b')
    >>> answer_of("sort, 3, 4", ", ", num_inside=1)
    '3, 4'

    Args:
        num_inside: how many of the last separators belong to the answer.
    """
    return text if separator is None else text[answer_start(text, separator, num_inside=num_inside) :].strip()


def answer_start(text: str, separator: str, *, num_inside: int = 0) -> int:
    """Return the index after the last separator of a text that is not in the answer; 0 if there is none.

    Some tokenizers change the white space around a separator. If it is not found as written, its mark with white space
    on one side counts.

    >>> [answer_start(text, ", ") for text in ("a=1, 7", "a=1 , 7", "1,234")]
    [5, 6, 0]
    """
    parts = text.rsplit(separator, num_inside + 1)
    if len(parts) > num_inside + 1:
        return len(parts[0]) + len(separator)
    mark = re.escape(separator.strip())
    ends = [match.end() for match in re.finditer(rf"\s{mark}\s*|{mark}\s+", text)] if mark else []
    return ends[-1 - num_inside] if len(ends) > num_inside else 0


class AnswerReader:
    """Takes an answer out of a generated text: behind written steps, and without the words of the answer template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, templates: Templates | None, separator: str | None = None
    ) -> None:
        """Prepare.

        Args:
            templates: templates of the training.
            separator: what ends each step where a method writes its steps out; None if it does not.
        """
        self.encoder = Encoder(tokenizer, templates or Templates())
        self.separator = separator

    def __call__(self, text: str, gold: str = "") -> str:
        """Return the answer in a text; ``gold`` tells how many separators a right answer itself holds."""
        return self.encoder.answer_alone(answer_of(text, self.separator, num_inside=self.num_inside(gold)))

    def num_inside(self, gold: str) -> int:
        """Return how many separators a right answer itself holds."""
        written = self.encoder.templates.answer.format(answer=gold).strip()
        return written.count(self.separator) if self.separator else 0

    def each(self, texts: Sequence[str], examples: Sequence[Example]) -> list[str]:
        """Return the answers in texts that were generated for these examples."""
        return [self(text, example.answer) for text, example in zip(texts, examples, strict=True)]


def with_writable_answers(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: Task, templates: Templates | None = None
) -> list[Example]:
    """Replace gold answers that the tokenizer cannot write.

    Some tokenizers normalise texts or lack a character, so that even a perfect readout differs from the row's answer.
    Where the task would judge it wrong for this, the answer becomes what the tokenizer makes of it.
    """

    def is_right(text: str, gold: str, question: Question) -> bool:
        try:
            return task.about(question).is_correct(text, gold)
        except ValueError:  # the rule cannot read the gold answer
            return False

    written = Encoder(tokenizer, templates or Templates()).read_back([example.answer for example in examples])
    return [
        example
        if text == example.answer.strip()
        or is_right(text, example.answer, example.question)
        or not is_right(text, text, example.question)
        else replace(example, answer=text)
        for example, text in zip(examples, written, strict=True)
    ]
