"""Reasoning in words: LogiQA, StrategyQA and ProsQA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example, RowError
from rim_peft.data.lines import parse_object
from rim_peft.tasks.task import Task, read_texts, require_one_of, require_text

LETTERS = "ABCD"

_LETTER = re.compile(r"\s*\(?([A-Da-d])\s*(?:([.,:)?])|\s(?=\S))\s*")


@dataclass(frozen=True)
class LogiQA(Task):
    """LogiQA: which of four options follows from a text. An answer is the letter at the start of the generated text.

    Supported formats:

    * the authors' ``Train.txt``, ``Eval.txt`` and ``Test.txt``, eight lines per problem: an empty one, the right
      letter, the text, the question, four options;
    * columns, or one JSON object per line, as on the Hub: the text as ``context`` or ``text``, the question as
      ``question`` or ``query``, ``options`` (four), and the right one as ``answer``, ``correct_option`` or ``label``:
      a letter, or its index from 0. The data have no steps, so that only stage 2 can be trained; add your own in a
      column ``steps``.

    The options are written ``A. ...`` to ``D. ...``. If all four options of a row have their own letters, these count:
    in 19 problems of ``Test.txt`` C comes before B, and the right letter refers to the written letters. (Readers that
    go by an option's position, such as the Hub's, get another right option there.)

    Source: Liu et al., "LogiQA: A Challenge Dataset for Machine Reading Comprehension with Logical Reasoning", arXiv
    2007.08124.
    """

    name: ClassVar[str] = "logiqa"
    source: ClassVar[str | None] = "lucasmccabe/logiqa"
    answer_rules: ClassVar[tuple[str, ...]] = ("leading-letter",)
    lines_per_row: ClassVar[int] = 8

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row in any of the formats above.

        Raises:
            RowError: a line or field is missing or invalid.
        """
        if set(row) == {"text"}:
            row = _read_lines(row["text"])
        context, question = require_text(row, "context", "text"), require_text(row, "question", "query")
        options = require_one_of(row, "options")
        is_list = isinstance(options, Sequence) and not isinstance(options, str)
        if not is_list or len(options) != 4 or not all(isinstance(option, str) for option in options):
            raise RowError(f"options: must be four texts, got {options!r}")
        letter = _read_letter(require_one_of(row, "answer", "correct_option", "label"))
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, _order(options), strict=True)]
        steps = read_texts(row, "steps")
        return Example("\n".join([context, question, *lines]), answer=letter, steps=steps)


def _read_lines(text: object) -> Mapping[str, Any]:
    """Read a problem from its eight lines, or from one line of JSON."""
    if not isinstance(text, str):
        raise RowError(f"text: must be a text, got {text!r}")
    if text.lstrip().startswith("{"):
        return parse_object(text)
    lines = [line.strip() for line in text.split("\n")]
    if len(lines) != 8 or lines[0] or not all(lines[1:]):
        rule = "must be eight lines: an empty one, the letter, the text, the question, four options"
        raise RowError(f"{rule}, got {len(lines)} starting with {text[:60]!r}")
    return {"answer": lines[1], "context": lines[2], "question": lines[3], "options": lines[4:]}


def _read_letter(value: object) -> str:
    if isinstance(value, str) and value.strip() in ("0", "1", "2", "3"):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 4:
        return LETTERS[value]
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip().upper() in LETTERS:
        return value.strip().upper()
    raise RowError(f"answer: must be a letter A to D or an index 0 to 3, got {value!r}")


def _order(options: Sequence[str]) -> list[str]:
    """Return the options' texts in the order of their written letters, else of their positions."""
    matches = [_LETTER.match(option) for option in options]
    written = [match[1].upper() if match else "" for match in matches]
    texts = [option[match.end() :] if match else option for option, match in zip(options, matches, strict=True)]
    if sorted(written) == list(LETTERS):
        return [text.strip() for _, text in sorted(zip(written, texts, strict=True))]
    # Without a punctuation mark after it, "A" may be a word.
    is_mark = [
        bool(match and match[2] and match[1].upper() == letter) for letter, match in zip(LETTERS, matches, strict=True)
    ]
    return [(text if mark else option).strip() for mark, text, option in zip(is_mark, texts, options, strict=True)]


@dataclass(frozen=True)
class StrategyQA(Task):
    """StrategyQA: yes-or-no questions whose reasoning steps are implicit.

    Rows are as in the authors' files and on the Hub: ``question``, ``answer`` (true or false), ``facts`` and
    ``decomposition`` (lists, or one text that is split into sentences).

    The labels of the authors' test set are not public, and papers report accuracy on ``dev.json`` (229 rows, 53 % of
    the answers are no). So ``dev.json`` is the split ``test`` here, and is never used for selection; asking for a split
    ``dev`` is an error that says so. ``validation`` is a fifteenth of ``train.json`` (2,061 rows), by a hash of the
    question.

    Source: Geva et al., "Did Aristotle Use a Laptop?", arXiv 2101.02235.
    """

    name: ClassVar[str] = "strategyqa"
    source: ClassVar[str | None] = "ChilleD/StrategyQA"
    split_names: ClassVar[Mapping[str, str]] = {"dev": "test"}
    answer_rules: ClassVar[tuple[str, ...]] = ("yes-no",)

    steps: Literal["facts", "decomposition"] = "facts"
    """The column with the steps: statements, or the questions that lead to the answer."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row; the answer becomes ``yes`` or ``no``.

        Raises:
            RowError: a field is missing or of the wrong type, or the row has only the other kind of steps.
        """
        question, answer = require_text(row, "question"), require_one_of(row, "answer")
        if not isinstance(answer, bool):
            raise RowError(f"answer: must be true or false, got {answer!r}")
        if self.steps not in row and {"facts", "decomposition"} & set(row):
            there = ", ".join(row)
            raise RowError(f"{self.steps}: the row has no such field; its fields: {there}. Set the option steps")
        return Example(question, answer="yes" if answer else "no", steps=read_texts(row, self.steps))


@dataclass(frozen=True)
class ProsQA(Task):
    """ProsQA: which of two properties follows through a chain of made-up kinds.

    The files ``prosqa_train.json``, ``prosqa_valid.json`` and ``prosqa_test.json`` are in Coconut's repository, with
    ``question``, ``steps`` and ``answer`` (and the graph, which is not read). Answers are compared as whole sentences
    (rule ``exact-text``: without surrounding white space and a final full stop). Coconut compares the text after the
    last ``#`` of its output, without commas, in the same way; our readout is only the answer.

    Source: Hao et al., "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769.
    """

    name: ClassVar[str] = "prosqa"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-text",)
