"""The task ``rows``: any rows, by the names of their columns and the form of their texts (docs/your-data.md)."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal

from datasets import Dataset

from rim_peft.data.chats import CHAT_COLUMNS
from rim_peft.data.examples import ROW_ERROR, Example, RowError, has_content, read_example, require_field
from rim_peft.data.files import Rows
from rim_peft.data.lines import parse_json
from rim_peft.tasks.columns import (
    ABSENT,
    INSTRUCTION,
    OWN,
    Columns,
    check_columns,
    choose_columns,
    is_filled,
    look_up,
    odd_cells,
    unread,
    write_cells,
)
from rim_peft.tasks.latex import check_math_verify
from rim_peft.tasks.steps import (
    NO_MATCH,
    PATTERN,
    check_cut,
    check_reading,
    cut_steps,
    find_answer,
    take_thought,
)
from rim_peft.tasks.task import Task, parse_row, require_number
from rim_peft.tasks.turns import assistant_turns, check_answer, count_continuing, is_left_out

logger = logging.getLogger(__name__)

LOOKED_AT = 1000
"""Rows from the start of a split by which columns are chosen."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Parts of a chat message that hold the reasoning before its content."""

_LISTED = re.compile(r"""\s*\[\s*["'].*["']\s*\]\s*""", re.DOTALL)
"""A list of texts as a table's cell has it: as JSON, or as Python prints it."""


@dataclass(frozen=True)
class OwnRows(Task):
    r"""Rows of any kind: the task of a recipe that gives only ``data.path``.

    Columns with usual names are found (:data:`~rim_peft.tasks.columns.USUAL`); texts and chat messages are read as TRL
    reads its formats ``prompt`` and ``completion``, ``messages``, and ``prompt``, ``completions`` and ``labels``.

    >>> task = OwnRows(split_steps="lines", answer_from="after:####")
    >>> task.read_row({"problem": "2 * 3 + 1?", "output": "2*3=6\n6+1=7\n#### 7"})
    Example(question='2 * 3 + 1?', answer='7', steps=('2*3=6', '6+1=7'))
    """

    name: ClassVar[str] = "rows"

    columns: dict[str, Any] = field(default_factory=dict)
    """Columns of ``question``, ``steps`` and ``answer``, with dotted paths into nested ones; those not given are found
    by their usual names. Several columns of a question, as a list, are joined by newlines."""
    split_steps: str | None = None
    """How a text becomes steps: ``lines``, ``sentences``, ``equations``, ``numbered``, or ``regex:PATTERN``. A list of
    texts is taken as it is. If not given, such a text is a bad row."""
    answer_from: str | None = None
    """Where the answer is in the text of its column: ``boxed``, ``last-number``, or ``after:TEXT``; if not given, it is
    the whole text. The rest of the text becomes the steps if there are no others and ``split_steps`` is given."""
    answer_rule: Literal[
        "exact-text",
        "last-number-float",
        "abs-1e-3",
        "strict-string",
        "yes-no",
        "leading-letter",
        "exact-digits",
        "boxed-string",
        "math-verify",
    ] = "exact-text"
    """How answers are compared (docs/tasks.md)."""
    turns: Literal["last", "all"] = "last"
    """Which of the assistant's turns in a conversation (``messages``) are answered from memory: the last, or all, each
    as a row whose question is the conversation so far."""

    _found: ClassVar[Columns | None] = None
    _odd: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer_rules", (self.answer_rule,))
        object.__setattr__(self, "columns", {role: names for role, names in self.columns.items() if names is not None})
        check_columns(self.columns)
        if self.split_steps is not None:
            check_cut(self.split_steps)
        if self.answer_from is not None:
            check_reading(self.answer_from)
        super().__post_init__()
        if self.answer_rule == "math-verify":
            check_math_verify()

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row.

        Raises:
            RowError: a column is missing or has another form than the options say, or a step is labelled as wrong.
        """
        row = write_cells(row, self._odd)
        columns = self._found if self._found is not None else self._choose([row])
        if columns == OWN and self.split_steps is self.answer_from is None:
            # Rows in this package's own form are taken as they are, tags in their texts included.
            steps = self._cut(_read_steps(row, OWN))
            example = read_example({**row, "steps": steps, "answer": _read_answer(row, OWN)[0]})
        else:
            answer, steps = self._read_answer_and_steps(row, columns)
            beside = {name: row[name] for name in CHAT_COLUMNS if name in row}
            question = self._as_answered(_read_question(row, columns))
            example = read_example({"question": question, "steps": steps, "answer": answer, **beside})
        if self.answer_rule not in ("exact-text", "math-verify"):
            try:
                self.is_correct(example.answer, example.answer)
            except ValueError as error:
                raise RowError(f"answer: cannot be read by answer_rule {self.answer_rule!r}: {error}") from None
        return example

    @property
    def has_turns(self) -> bool:
        """Whether conversations are split into turns."""
        return self.turns == "all"

    def split_row(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return a row for each turn of the assistant in a conversation, which ends with this turn.

        >>> chat = [{"role": role, "content": "..."} for role in ("user", "assistant", "user", "assistant")]
        >>> [len(part["messages"]) for part in OwnRows(turns="all").split_row({"messages": chat})]
        [2, 4]
        """
        columns = self._found if self._found is not None else self._choose([row])
        messages = _conversation(row, columns)
        trained = [index for index in assistant_turns(messages) if not is_left_out(messages[index])]
        ends = [index for index in trained if index < len(messages) - 1]
        (name,) = columns["answer"] or ("",)
        # A column of steps beside the messages is about the whole row, which is its last turn.
        last = [path for path in (*columns["steps"], "labels") if path != name and not path.startswith(f"{name}.")]
        earlier = {**row, **dict.fromkeys(last)} if ends else {}
        parts = [{**earlier, name: messages[: end + 1]} for end in ends]
        # A conversation that does not end with the assistant, or has no turn to train on, keeps its end, which is then
        # reported.
        return parts if parts and is_left_out(messages[-1]) else [*parts, row]

    def _read(self, rows: Rows) -> Rows:
        task = self._at(rows)
        read = super(OwnRows, task)._read(rows)
        if (self.split_steps or "").startswith(PATTERN):
            _check_matches(read)
        return read

    def _at(self, rows: Rows) -> OwnRows:
        """Return the task with the columns of these rows."""
        odd = odd_cells(rows.features)
        readable = [write_cells(row, odd) for row in _readable(islice(rows, LOOKED_AT))]
        if not readable:  # the bad rows will say why
            return self
        found = self._choose(readable)
        if any(columns not in ((), (role,)) and role not in self.columns for role, columns in found.items()):
            logger.info("columns by their usual names: %s. Others: data.options.columns.", self._describe(found))
        if others := unread(readable, found):
            logger.info("columns that are not read: %s. A question may have several: data.options.columns.", others)
        num_longer = sum(len(assistant_turns(_conversation(row, found))) > 1 for row in readable)
        if num_longer and self.turns == "last":
            logger.info(
                "%d of the first %d conversations have several turns of the assistant: only the last is answered, the "
                "others are part of the question. data.options.turns=all takes all.",
                num_longer,
                len(readable),
            )
        task = copy.copy(self)
        object.__setattr__(task, "_found", found)
        object.__setattr__(task, "_odd", odd)
        num_continuing = 0 if self.has_turns else count_continuing(_chats(readable, found))
        if num_continuing:
            logger.warning(
                "%d of the first %d rows continue the conversation of another row, so one conversation may be in both "
                "training and validation. To keep it in one split, set data.options.turns=all.",
                num_continuing,
                len(readable),
            )
        return task

    def _describe(self, columns: Columns) -> str:
        where = {role: f"{role} from {' + '.join(names)}" if names else f"no {role}" for role, names in columns.items()}
        if not columns["answer"]:
            where["answer"] = f"answer in the text of {columns['steps'][0]}"
        elif not columns["steps"] and self.split_steps is not None:
            where["steps"] = f"steps in the text of {columns['answer'][0]}"
        return ", ".join(where.values())

    def _choose(self, rows: Sequence[Mapping[str, Any]]) -> Columns:
        return choose_columns(rows, self.columns, may_lack_answer=self.answer_from is not None)

    def _read_answer_and_steps(self, row: Mapping[str, Any], columns: Columns) -> tuple[Any, Sequence[str] | None]:
        steps = _read_steps(row, columns)
        if not columns["answer"]:
            if isinstance(steps, str):
                return self.read_text(steps)
            return self._read_last(steps)
        text, reasoning = _read_answer(row, columns)
        if not isinstance(text, str):
            return text, self._cut(steps)
        named = {" + ".join(columns["steps"]): steps, f"the reasoning of {columns['answer'][0]}": reasoning}
        return self.read_text(text, {name: chain for name, chain in named.items() if is_filled(chain)})

    def _as_answered(self, question: Any) -> Any:
        """Return a question in which each earlier turn of the assistant is its answer alone.

        That is what a model trained on these rows says, so that its own turns look like those of the training.
        """
        if not isinstance(question, list):
            return question
        turns = assistant_turns(question)
        return [self._answer_alone(part) if index in turns else part for index, part in enumerate(question)]

    def _answer_alone(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a message without reasoning; a message whose answer cannot be found is returned as it is."""
        content = message.get("content")
        if not isinstance(content, str):
            return message
        try:
            _, answer = take_thought(content)
            answer = answer if self.answer_from is None else find_answer(answer, self.answer_from)[0]
        except RowError:
            return message
        return {**message, "content": answer} if has_content(answer) else message

    def _read_last(self, steps: Sequence[Any] | None) -> tuple[Any, Sequence[Any] | None]:
        """Read rows whose answer is, or is in, the last of the steps."""
        if not steps or not isinstance(steps[-1], str):
            raise RowError(f"answer: must be the last of the steps, got {steps!r}")
        if self.answer_from is None:
            return steps[-1], steps[:-1]
        answer, rest = find_answer(steps[-1], self.answer_from)
        return answer, [*steps[:-1], *([rest] if rest else [])]

    def read_text(self, text: str, chains: Mapping[str, Any] | None = None) -> tuple[str, Sequence[str] | None]:
        r"""Return the answer and the steps of a text with both, by ``answer_from`` and ``split_steps``.

        >>> OwnRows(split_steps="lines", answer_from="after:####").read_text("2*3=6\n6+1=7\n#### 7")
        ('7', ['2*3=6', '6+1=7'])

        Args:
            chains: chains of thought that were found elsewhere, by their place.

        Raises:
            RowError: there is no answer, or a regular expression matches nothing.
        """
        chains = dict(chains or {})
        thought, answer = take_thought(text)
        if thought:
            chains["<think>"] = thought
        if len(chains) > 1 and "steps" not in self.columns:
            listed = " and in ".join(chains)
            raise RowError(f"steps: must be in one place, but are in {listed}; choose with data.options.columns.steps")
        rest = None
        if self.answer_from is not None:
            answer, rest = find_answer(answer, self.answer_from)
        if chains:
            return answer, self._cut(next(iter(chains.values())))
        if not rest or self.split_steps is None:
            return answer, None
        steps = self._cut(rest)
        if steps and steps[-1].strip("$. ") == answer.strip("$. "):
            steps = steps[:-1]  # no step, only the answer
        return answer, steps

    def _cut(self, chain: Any) -> Any:
        """Return a chain's steps; what is no text is left to the check of steps."""
        if not isinstance(chain, str):
            return chain
        if _LISTED.fullmatch(chain):
            return _read_list(chain)
        if self.split_steps is None:
            raise RowError("steps: are one text; cut it with data.options.split_steps (lines, sentences, ...)")
        thought, outside = take_thought(chain)
        return cut_steps(thought or outside, self.split_steps)


def _read_list(text: str) -> Any:
    try:
        return parse_json(text)
    except RowError:
        raise RowError(f"steps: a list that is written as a text must be JSON, got {text[:60]!r}") from None


def _readable(rows: Any) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        try:
            yield parse_row(row)
        except RowError:
            continue


def _conversation(row: Mapping[str, Any], columns: Columns) -> list[Any]:
    """Return the messages of a row in which question and answer are one conversation; [] if they are not."""
    if columns["question"] != columns["answer"]:
        return []
    messages = look_up(row, *columns["answer"])
    return messages if isinstance(messages, list) else []


def _chats(rows: Iterable[Mapping[str, Any]], columns: Columns) -> Iterator[list[str]]:
    """Yield the questions that are chat messages, each message as one text."""
    for row in rows:
        with suppress(RowError):
            question = _read_question(row, columns)
            if isinstance(question, list) and all(isinstance(message, Mapping) for message in question):
                yield [json.dumps([message.get("role"), message.get("content")]) for message in question]


def _read_question(row: Mapping[str, Any], columns: Columns) -> Any:
    """Return the question: a text, joined texts, or chat messages without the answer's turn."""
    names = columns["question"]
    if len(names) == 1:
        question = _require(row, *names)
        if names == columns["answer"] and isinstance(question, str):  # would be asked together with its answer
            raise RowError(
                f"question: {names[0]} is the answer too, so it must be a list of chat messages, got the text "
                f"{question[:40]!r}"
            )
        return question[:-1] if names == columns["answer"] and isinstance(question, list) else question
    if names == INSTRUCTION and INSTRUCTION[1] not in row:  # it is optional
        names = INSTRUCTION[:1]
    texts = [_require(row, name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise RowError(f"question: {name} must be a text to be joined, got {text!r}")
    return "\n".join(text for text in texts if text and has_content(text))


def _read_steps(row: Mapping[str, Any], columns: Columns) -> Any:
    """Return the steps as they are in the row, None if there are none; refuse wrong ones."""
    if not columns["steps"] or columns["steps"] == columns["answer"]:
        return None
    steps = look_up(row, *columns["steps"])
    if columns["steps"] == ("completions",) and row.get("labels") is not None:
        _check_labels(row["labels"], steps)
    return steps if steps is not ABSENT and is_filled(steps) else None


def _check_labels(labels: Any, steps: Any) -> None:
    """Refuse a chain with a wrong step: neither the step nor what follows from it should be learned."""
    is_list = isinstance(labels, list) and all(isinstance(label, bool) for label in labels)
    if not is_list or not isinstance(steps, list) or len(labels) != len(steps):
        raise RowError(f"labels: must be true or false for each of completions, got {labels!r}")
    if not all(labels):
        raise RowError(f"labels[{labels.index(False)}]: is false, so the chain has a wrong step and is not trained on")


def _read_answer(row: Mapping[str, Any], columns: Columns) -> tuple[Any, str | None]:
    """Return the answer's text, and the reasoning in its chat message."""
    answer = _require(row, *columns["answer"])
    if isinstance(answer, list) and answer and all(isinstance(message, Mapping) for message in answer):
        check_answer(answer, is_conversation=columns["answer"] == columns["question"])
        last = answer[-1]
        reasoning = next((last[part] for part in _REASONING if is_filled(last.get(part))), None)
        return last.get("content"), reasoning
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return require_number({"answer": answer}, "answer"), None
    return answer, None


def _require(row: Mapping[str, Any], name: str) -> Any:
    value = look_up(row, name)
    return require_field(row, name) if value is ABSENT else value


def _check_matches(rows: Rows) -> None:
    """Refuse rows if a regular expression matches nothing in more than a tenth of them; of a stream, of the first."""
    reasons = rows[ROW_ERROR] if isinstance(rows, Dataset) else [row[ROW_ERROR] for row in islice(rows, LOOKED_AT)]
    reasons = list(reasons)
    failed = [reason for reason in reasons if reason and NO_MATCH in reason]
    if len(failed) > len(reasons) / 10:
        text = failed[0].partition(f"{NO_MATCH} in ")[2]
        raise ValueError(
            "data.options.split_steps: the regular expression must match in nine of ten rows, got no match in "
            f"{len(failed)} of {len(reasons)}, such as {text}. Correct it; |$ at its end accepts texts of one step."
        )
