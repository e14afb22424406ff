"""Multiple choice: LogiQA, CommonsenseQA, ARC and AQuA-RAT. Options are written ``A. ...``; the answer is a letter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rim_peft.data.examples import Example, RowError, require_field
from rim_peft.data.lines import parse_object
from rim_peft.tasks.task import Task, read_texts, require_one_of, require_text

LETTERS = "ABCDEFG"

_LETTER = re.compile(r"\s*\(?([A-Ga-g])\s*(?:([.,:)?])|\s(?=\S))\s*")


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
        """Read a row in any of the formats above."""
        if set(row) == {"text"}:
            row = _read_lines(row["text"])
        context, question = require_text(row, "context", "text"), require_text(row, "question", "query")
        options = _read_options(row, 4)
        letter = _read_letter(require_one_of(row, "answer", "correct_option", "label"))
        return Example(_write(f"{context}\n{question}", options), answer=letter, steps=read_texts(row, "steps"))


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


def _write(question: str, options: Sequence[str]) -> str:
    """Write a question and its options as one text."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))])


def _read_options(row: Mapping[str, Any], count: int) -> list[str]:
    """Return the texts of the field ``options``, without letters before them."""
    options = require_field(row, "options")
    is_list = isinstance(options, Sequence) and not isinstance(options, str)
    if not is_list or len(options) != count or not all(isinstance(option, str) for option in options):
        raise RowError(f"options: must be {count} texts, got {options!r}")
    return _order(options)


def _read_letter(value: object) -> str:
    if isinstance(value, str) and value.strip() in ("0", "1", "2", "3"):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 4:
        return LETTERS[value]
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip().upper() in LETTERS[:4]:
        return value.strip().upper()
    raise RowError(f"answer: must be a letter A to D or an index 0 to 3, got {value!r}")


def _order(options: Sequence[str]) -> list[str]:
    """Return the options' texts in the order of their written letters, else of their positions."""
    matches = [_LETTER.match(option) for option in options]
    written = [match[1].upper() if match else "" for match in matches]
    texts = [option[match.end() :] if match else option for option, match in zip(options, matches, strict=True)]
    letters = LETTERS[: len(options)]
    if sorted(written) == list(letters):
        return [text.strip() for _, text in sorted(zip(written, texts, strict=True))]
    # Without a punctuation mark after it, "A" may be a word.
    is_mark = [
        bool(match and match[2] and match[1].upper() == letter) for letter, match in zip(letters, matches, strict=True)
    ]
    return [(text if mark else option).strip() for mark, text, option in zip(is_mark, texts, options, strict=True)]


@dataclass(frozen=True)
class ChoiceTask(Task):
    """Base of tasks in the form of the Allen Institute: labelled choices, and the right label; there are no steps.

    Supported formats:

    * the Hub's: ``question``, ``choices`` (``{"label": ["A", ...], "text": [...]}``) and ``answerKey``;
    * the authors' JSON lines: ``question`` (``{"stem": ..., "choices": [{"label": "A", "text": ...}, ...]}``) and
      ``answerKey``.

    Labels become the letters from A in the order of the choices, whatever they are in the row.
    """

    answer_rules: ClassVar[tuple[str, ...]] = ("leading-letter",)

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row in either format."""
        asked = require_field(row, "question")
        fields = {"stem": asked, "choices": row.get("choices")} if isinstance(asked, str) else asked
        if not isinstance(fields, Mapping):
            raise RowError(f"question: must be a text, or an object with stem and choices, got {asked!r}")
        stem, choices = require_text(fields, "stem"), _read_choices(fields.get("choices"))
        labels = [label for label, _ in choices]
        key = require_field(row, "answerKey")
        if key not in labels:
            raise RowError(f"answerKey: must be one of the labels {', '.join(labels)}, got {key!r}")
        return Example(_write(stem, [text for _, text in choices]), answer=LETTERS[labels.index(key)])


def _read_choices(choices: object) -> list[tuple[str, str]]:
    """Return the labels and texts of the choices, in either format."""
    pairs: list[Any] = []
    if isinstance(choices, Mapping):
        columns: list[Any] = [choices.get(name) for name in ("label", "text")]
        if all(isinstance(column, list) for column in columns) and len(columns[0]) == len(columns[1]):
            pairs = list(zip(*columns, strict=True))
    elif isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        pairs = [(choice.get("label"), choice.get("text")) for choice in choices]
    is_text = all(isinstance(part, str) and part.strip() for pair in pairs for part in pair)
    if not 2 <= len(pairs) <= len(LETTERS) or not is_text or len({label for label, _ in pairs}) < len(pairs):
        raise RowError(f"choices: must be 2 to {len(LETTERS)} texts with different labels, got {choices!r}")
    return [(label, text.strip()) for label, text in pairs]


@dataclass(frozen=True)
class CommonsenseQA(ChoiceTask):
    """CommonsenseQA: everyday knowledge, five choices.

    The answers of the published test set are not public, and papers report accuracy on the validation set (``dev`` in
    the authors' files). So that set is the split ``test`` here, and never used for selection; ``validation`` is a
    fifteenth of the training questions. The published test rows are the split ``unanswered``, each a bad row.

    Source: Talmor et al., "CommonsenseQA: A Question Answering Challenge Targeting Commonsense Knowledge", arXiv
    1811.00937.
    """

    name: ClassVar[str] = "commonsenseqa"
    source: ClassVar[str | None] = "tau/commonsense_qa"
    split_names: ClassVar[Mapping[str, str]] = {"validation": "test", "dev": "test", "test": "unanswered"}


@dataclass(frozen=True)
class ARCEasy(ChoiceTask):
    """ARC's easy questions: science at school, mostly four choices; some rows have labels 1 to 4, or 3 or 5 choices.

    Source: Clark et al., "Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge", arXiv
    1803.05457.
    """

    name: ClassVar[str] = "arc-easy"
    source: ClassVar[str | None] = "allenai/ai2_arc:ARC-Easy"


@dataclass(frozen=True)
class ARCChallenge(ChoiceTask):
    """ARC's hard questions: those that retrieval and word co-occurrence answer wrongly."""

    name: ClassVar[str] = "arc-challenge"
    source: ClassVar[str | None] = "allenai/ai2_arc:ARC-Challenge"


# fmt: off
_ANSWER_WORDS = frozenset((
    "the", "so", "hence", "thus", "therefore", "correct", "right", "answer", "ans", "option", "choice",
    "is", "be", "will",
))
# fmt: on


@dataclass(frozen=True)
class AQuARAT(Task):
    """AQuA-RAT: algebraic word problems with five options and a written solution.

    Rows are as in the authors' files (JSON lines despite the suffix ``.json``) and on the Hub: ``question``,
    ``options`` (``"A)125"``), ``rationale`` and ``correct`` (a letter). Steps are the lines of the solution; a last
    line that only names the letter, such as "Answer: B", is no step.

    Source: Ling et al., "Program Induction by Rationale Generation: Learning to Solve and Explain Algebraic Word
    Problems", arXiv 1705.04146.
    """

    name: ClassVar[str] = "aqua-rat"
    source: ClassVar[str | None] = "deepmind/aqua_rat:raw"
    answer_rules: ClassVar[tuple[str, ...]] = ("leading-letter",)

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row."""
        question, letter = require_text(row, "question"), require_text(row, "correct").upper()
        if letter not in tuple(LETTERS[:5]):
            raise RowError(f"correct: must be a letter A to E, got {letter!r}")
        lines = [line.strip() for line in require_text(row, "rationale").split("\n") if line.strip()]
        if _only_names_letter(lines[-1]):
            lines.pop()
        return Example(_write(question, _read_options(row, 5)), answer=letter, steps=tuple(lines) or None)


def _only_names_letter(line: str) -> bool:
    """Tell whether a line of a solution only says which option is right.

    >>> [_only_names_letter(line) for line in ("ANSWER:B", "Hence (A) is the correct answer.", "x = 5. Answer B")]
    [True, True, False]
    """
    words = re.findall(r"[^\W_]+", line.lower())
    return all(word in _ANSWER_WORDS or word in tuple(LETTERS[:5].lower()) for word in words)
