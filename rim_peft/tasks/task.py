"""Base classes of tasks: how rows become examples, and how answers are read and compared."""

from __future__ import annotations

import copy
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from inspect import Parameter, signature
from itertools import islice
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from datasets import Dataset, Features, IterableDataset, Value

from rim_peft.data import lines
from rim_peft.data.chats import CHAT_COLUMNS, Chat
from rim_peft.data.examples import ROW_ERROR, Example, Question, RowError, has_content, read_example, require_field
from rim_peft.data.files import Rows, split_name
from rim_peft.data.hashes import source_hash
from rim_peft.data.lines import JSON_COLUMN, ROW_PLACE, parse_object
from rim_peft.data.sources import CONVERSATION, find_splits, question_hash
from rim_peft.tasks import answers, columns, latex, steps, turns
from rim_peft.tasks.steps import split_sentences

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 1 / 15
"""Share of the training questions used as validation if a source has no validation split."""


class Task:
    """Base of all tasks. A task is a frozen dataclass with a name and answer rules; its fields are its options.

    In your own task, override :meth:`read_row` if rows have other fields than ``question``, ``steps``, ``answer``, and
    :meth:`read_answer` and :meth:`is_correct` if no rule of :data:`~rim_peft.tasks.answers.RULES` can read the answers.
    With several rules ``answer_rule`` is an option, and an override must follow it.

    Attributes:
        name: the task's name.
        source: the path to read if none is given.
        answer_rules: names of all rules by which answers are judged; the first is the default.
        answer_rule: name of the deciding rule, for the single verdict in validation and selection.
        selection_split: the split for every choice among weights, blocks and settings; never the test split.
        split_names: names for splits or files of the source that are not the standard ones, by their names there.
        lines_per_row: number of lines of a text file per row.
    """

    name: ClassVar[str]
    source: ClassVar[str | None] = None
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-text",)
    answer_rule: str = "exact-text"
    selection_split: ClassVar[str] = "validation"
    split_names: ClassVar[Mapping[str, str]] = {}
    lines_per_row: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        """Let a class set only one of ``answer_rule`` and ``answer_rules``."""
        super().__init_subclass__()
        own = vars(cls)
        if "answer_rule" in own and "answer_rules" not in own and own["answer_rule"] not in cls.answer_rules:
            cls.answer_rules = (own["answer_rule"],)
        elif "answer_rules" in own and "answer_rule" not in own:
            cls.answer_rule = cls.answer_rules[0]

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                self._check_choice(field, get_args(hint))
        self._check_choice("answer_rule", self.answer_rules)

    def _check_choice(self, field: str, choices: Sequence[object]) -> None:
        if getattr(self, field) not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{field}: must be one of {listed} in task {self.name!r}, got {getattr(self, field)!r}.")

    def load(self, split: str, *, path: str | None = None, streaming: bool = False, whole: bool = False) -> Rows:
        """Return a split's rows, each with ``question``, ``steps`` (None if there are none) and ``answer``.

        An unreadable row keeps its place, with the reason in the column ``row_error``, which training and evaluation
        report. If a source has no ``validation``, a fifteenth of its training questions is used, chosen by a hash of
        the question, so that the two never share one. Test rows are never used for anything else.

        Args:
            split: ``train``, ``validation``, ``test``, or a name from the source.
            path: a file, folder or Hub id as in :func:`~rim_peft.data.sources.find_splits`; the task's source if None.
            streaming: read rows lazily.
            whole: return all rows of ``train``, with those that would be used as ``validation``.

        Raises:
            FileNotFoundError: there is no such path or split; says what there is.
            ValueError: a file is damaged or empty, the split has another name here (``split_names``), or no path is
                given and the task has no source.
            ConnectionError: the Hub cannot be reached.
        """
        path = path if path is not None else self.source
        if path is None:
            raise ValueError(f"path: task {self.name!r} has no default source. Give a file, a folder or a Hub id.")
        # "validation" and "test" are also the package's own names, whatever the source calls so.
        if split in self.split_names and split not in ("validation", "test"):
            here = self.split_names[split]
            raise ValueError(f"split: {split!r} of its source is {here!r} in task {self.name!r}. Use {here!r}.")
        splits = find_splits(
            str(path), prefix=self.name, streaming=streaming, names=self.split_names, lines_per_row=self.lines_per_row
        )
        split = split_name(split)
        is_carved = split in ("train", "validation") and "train" in splits and "validation" not in splits
        if split not in splits and not is_carved:
            raise FileNotFoundError(
                f"split: {path} has no split {split!r} for task {self.name!r}, only {', '.join(sorted(splits))}. "
                "Choose one of them, or add the file; a file not named after a split counts as train."
            )
        if not is_carved or (whole and split == "train"):
            return self._read(splits[split]())
        logger.info("%s has no validation split: 1 in 15 training questions is used, chosen by hash.", path)
        return self._read(splits["train"]()).filter(
            _is_in_split, fn_kwargs={"split": split, "source": source_hash(__name__, question_hash.__module__)}
        )

    def load_whole(self, split: str, *, path: str | None = None) -> Rows:
        """Return all rows of a split as :meth:`load` does with ``whole``; without it, if an override lacks it.

        Raises:
            FileNotFoundError, ValueError, ConnectionError: as for :meth:`load`.
        """
        parameters = signature(self.load).parameters.values()
        if any(one.name == "whole" or one.kind is Parameter.VAR_KEYWORD for one in parameters):
            return self.load(split, path=path, whole=True)
        logger.warning(
            "task %r has its own `load`, which lacks the option `whole`: rows of %s that it keeps for validation are "
            "omitted. Add the option, as in rim_peft.tasks.task.Task.",
            self.name,
            split,
        )
        return self.load(split, path=path)

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row of the task's source.

        Raises:
            RowError: a field is missing or cannot be read.
        """
        return read_example(row)

    @property
    def has_turns(self) -> bool:
        """Whether a row may be a conversation of which several turns are rows, which a split must keep together."""
        return False

    def split_row(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return the rows that a source's row holds: itself, or a row for each turn of a conversation."""
        return [row]

    def read_answer(self, text: str) -> str | None:
        """Return the answer in a generated text by ``answer_rule``; None if there is none.

        Equal answers are equal strings, as far as the rule can tell. Without a rule of
        :data:`~rim_peft.tasks.answers.RULES` it is the text without surrounding white space and a final full stop.
        """
        rule = answers.RULES.get(self.answer_rule)
        return rule.read(text) if rule else answers.exact_text(text)

    def is_correct(self, text: str, gold: str) -> bool:
        """Tell whether a generated text gives the answer ``gold`` by ``answer_rule``.

        Raises:
            ValueError: the rule cannot read ``gold``.
        """
        answer = self.read_answer(text)
        if rule := answers.RULES.get(self.answer_rule):
            return rule.is_right(answer, gold)
        if (wanted := self.read_answer(gold)) is None:
            raise ValueError(f"gold: must give an answer under {self.answer_rule}, got {gold!r}. Correct the row.")
        return answer == wanted

    def judge(self, text: str, gold: str) -> dict[str, bool]:
        """Return every rule's verdict on a generated text, in the order of ``answer_rules``.

        >>> from rim_peft.tasks import get_task
        >>> get_task("gsm8k").judge("18.", "18")
        {'last-number-float': True, 'strict-string': False}

        Raises:
            ValueError: a rule cannot read ``gold``.
        """
        return {rule: self._under(rule).is_correct(text, gold) for rule in self.answer_rules}

    def about(self, question: Question) -> Task:
        """Return the task that judges answers to one question: itself, unless a rule depends on the question."""
        return self

    def _under(self, rule: str) -> Task:
        """Return the task with another deciding rule, itself if it is the same."""
        if rule == self.answer_rule:
            return self
        other = copy.copy(self)
        object.__setattr__(other, "answer_rule", rule)
        return other

    def _read(self, rows: Rows) -> Rows:
        text = Value("string")
        is_chat = has_chats(rows, self)
        kinds: dict[str, Any] = dict.fromkeys(_columns(self, is_chat=is_chat), text)
        kinds |= {"steps": [text], "question": [{"role": text, "content": text}] if is_chat else text}
        readers = [kind.__module__ for kind in type(self).__mro__ if kind is not object]
        rules = [
            Chat.__module__,
            RowError.__module__,
            __name__,
            answers.__name__,
            columns.__name__,
            latex.__name__,
            steps.__name__,
            turns.__name__,
            lines.__name__,
        ]
        source = source_hash(Example.__module__, *readers, *rules)
        kwargs: dict[str, Any] = {} if isinstance(rows, IterableDataset) else {"desc": "Reading rows"}
        read = rows.map(
            read_batch,
            batched=True,
            remove_columns=rows.column_names or list(next(iter(rows), {})),
            features=Features(kinds),
            fn_kwargs={"task": self, "is_chat": is_chat, "source": source},
            **kwargs,
        )
        if isinstance(read, Dataset) and len(read) == 0:
            raise ValueError(f"path: must hold rows for task {self.name!r}, got none. Look at the file.")
        return read


class GeneratedTask(Task, ABC):
    """Base of tasks whose rows are generated, not read."""

    @abstractmethod
    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield a split's rows, each with ``question``, ``steps`` and ``answer``."""

    def load(self, split: str, *, path: str | None = None, streaming: bool = False, whole: bool = False) -> Rows:
        """Return a split's rows.

        Raises:
            ValueError: a path is given, or there is no such split.
        """
        if path is not None:
            raise ValueError(f"path: task {self.name!r} generates its rows, got {path!r}. Omit it.")
        rows = Dataset.from_list(list(self.rows(split_name(split))))
        return rows.to_iterable_dataset() if streaming else rows


def _is_in_split(row: Mapping[str, Any], split: str, source: str) -> bool:
    question = row["question"] if row.get(CONVERSATION) is None else row[CONVERSATION]
    is_validation = question is not None and question_hash(question, salt="validation") < VALIDATION_SHARE
    return is_validation == (split == "validation")


def require_one_of(row: Mapping[str, Any], *names: str) -> Any:
    """Return the first of several fields that a row has.

    Raises:
        RowError: it has none of them; lists its fields.
    """
    name = next((name for name in names if name in row), None)
    return require_field(row, " or ".join(names)) if name is None else row[name]


def require_text(row: Mapping[str, Any], *names: str) -> str:
    """Return the first of several fields that a row has, which must be a text.

    Raises:
        RowError: it has none of them, or the value is empty or not a text.
    """
    value = require_one_of(row, *names)
    if not isinstance(value, str) or not has_content(value):
        raise RowError(f"{' or '.join(names)}: must be a text that is not empty, got {value!r}")
    return value.strip()


def require_number(row: Mapping[str, Any], *names: str) -> str:
    """Return the first of several fields that a row has, which must be a number, as a decimal without an exponent.

    A float is written with enough digits to keep its exact value.

    >>> [require_number({"target": value}, "target") for value in (51.0, -2.0107e-06, "1,050.0")]
    ['51', '-0.0000020107', '1050']

    Raises:
        RowError: it has none of them, or the value is not a finite number.
    """
    value = require_one_of(row, *names)
    rule = f"{' or '.join(names)}: must be a number, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise RowError(rule)
    try:
        number = Decimal(repr(value) if not isinstance(value, str) else value.replace(",", "").strip())
    except InvalidOperation:
        raise RowError(rule) from None
    if not number.is_finite() or not math.isfinite(float(number)) or (number and not float(number)):
        raise RowError(rule)  # not finite, or far too long without an exponent
    text = f"{number:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) if number else "0"


def read_texts(row: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """Return a field that holds a list of texts, or one text, split into sentences; None if it is absent or empty.

    Raises:
        RowError: it holds something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        value = split_sentences(value)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise RowError(f"{name}: must be a text or a list of texts, got {value!r}")
    return tuple(item.strip() for item in value if item.strip()) or None


def read_batch(batch: Mapping[str, Sequence[Any]], task: Task, is_chat: bool, source: str) -> dict[str, list[Any]]:
    """Read a batch of a source's rows, without blank lines. For ``source`` see :func:`source_hash`."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    parts = [part for row in rows if not _is_blank(row) for part in _split(row, task)]
    read = [_read_or_explain(part, task, is_chat=is_chat) for part in parts]
    return {name: [row.get(name) for row in read] for name in _columns(task, is_chat=is_chat)}


def _columns(task: Task, *, is_chat: bool) -> list[str]:
    """Return the columns of a task's rows."""
    of_chats = [*(CHAT_COLUMNS if is_chat else ()), *([CONVERSATION] if task.has_turns else [])]
    return ["question", "steps", "answer", ROW_ERROR, *of_chats]


def _split(row: Mapping[str, Any], task: Task) -> list[Mapping[str, Any]]:
    """Return the rows in a source's row; itself if it cannot be split, whose reading will say why."""
    if not task.has_turns:
        return [row]
    try:
        parts = task.split_row(parse_row(row))
    except RowError:
        return [row]
    if not row.get(ROW_PLACE):
        return list(parts)
    turns = [f" turn {turn}" for turn in range(1, len(parts) + 1)] if len(parts) > 1 else [""]
    return [{**part, ROW_PLACE: f"{row[ROW_PLACE]}{turn}"} for part, turn in zip(parts, turns, strict=True)]


def _read_or_explain(row: Mapping[str, Any], task: Task, *, is_chat: bool) -> dict[str, Any]:
    try:
        example = read_example_of(row, task)
        if isinstance(example.question, str) == is_chat:
            # All questions are in one column, which has one type.
            raise RowError(f"question: must be {'chat messages' if is_chat else 'a text'} as in the first row")
    except RowError as error:
        place = f"{row[ROW_PLACE]}: " if row.get(ROW_PLACE) else ""
        return {ROW_ERROR: place + _one_line(str(error))}
    steps = list(example.steps) if example.steps else None
    read = {"question": example.question, "steps": steps, "answer": example.answer}
    return read | (_chat_columns(example.question) if is_chat else {})


def _chat_columns(messages: Any) -> dict[str, Any]:
    """Return what a row has beside its messages: what its template gets, and what a conversation's turns share."""
    roles = [message["role"] for message in messages]
    # From the user's first message on, so that conversations with the same greeting are not all the same.
    first = roles.index("assistant", roles.index("user")) if "assistant" in roles[roles.index("user") :] else len(roles)
    opening = json.dumps(messages[:first], ensure_ascii=False, sort_keys=True)
    found = {"question": list(messages), CONVERSATION: opening}
    return found | (messages.columns() if isinstance(messages, Chat) else {})


def read_example_of(row: Mapping[str, Any], task: Task) -> Example:
    """Read a source's row with a task.

    Raises:
        RowError: it cannot be read, whatever error the task's reader raises.
    """
    try:
        return task.read_row(parse_row(row))
    except RowError:
        raise
    except Exception as error:  # one bad row must not stop the others from loading
        raise RowError(f"task {task.name!r} cannot read the row: {type(error).__name__}: {error}") from error


def parse_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse a row of a JSON file; other rows are returned without the columns that the file reader added."""
    if row.get(ROW_ERROR) is not None:
        raise RowError(str(row[ROW_ERROR]))
    if ROW_PLACE not in row:
        return row
    fields = {name: value for name, value in row.items() if name not in (ROW_PLACE, ROW_ERROR)}
    return parse_object(fields[JSON_COLUMN]) if set(fields) == {JSON_COLUMN} else fields


def _is_blank(row: Mapping[str, Any]) -> bool:
    """Tell whether a row is a blank line."""
    values = [value for name, value in row.items() if name not in (ROW_PLACE, ROW_ERROR)]
    is_line = len(values) == 1 and isinstance(values[0], str) and row.get(ROW_ERROR) is None
    return is_line and not values[0].strip()


def _one_line(text: str, most: int = 400) -> str:
    """Return a reason as one line of encodable characters, with a limited length."""
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def has_chats(rows: Rows, task: Task) -> bool:
    """Tell whether the questions are chat messages, by the first readable of a hundred rows."""
    for row in islice(rows, 100):
        try:
            return not isinstance(read_example_of(row, task).question, str)
        except RowError:
            continue
    return False
