"""StrategyQA: yes or no, by steps that the question does not name.

Rows are as in the authors' files and on the Hub: ``question``, ``answer`` (true or false), ``facts`` and
``decomposition`` (lists, or one text whose sentences count).

The labels of the authors' test set are not public; what is reported is accuracy on their ``dev.json`` (229 rows). It is
therefore the split ``test`` here, and ``validation`` is a fifteenth of ``train.json`` (2,061 rows), carved out by a
hash of the question. Nothing is ever selected on ``dev.json``; who asks for a split ``dev`` is told so. 53 % of its
answers are no.

Source: Geva et al., "Did Aristotle Use a Laptop?", arXiv 2101.02235.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example, RowError
from rim_peft.data.tasks.columns import read_texts, require_one_of, require_text
from rim_peft.data.tasks.task import Task


@dataclass(frozen=True)
class StrategyQA(Task):
    """The task's options."""

    name: ClassVar[str] = "strategyqa"
    source: ClassVar[str | None] = "ChilleD/StrategyQA"
    split_names: ClassVar[Mapping[str, str]] = {"dev": "test"}
    answer_rules: ClassVar[tuple[str, ...]] = ("yes-no",)

    steps: Literal["facts", "decomposition"] = "facts"
    """The column that steps come from: statements, or the questions that lead to the answer."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row; the answer becomes ``yes`` or ``no``.

        Raises:
            RowError: a field is missing or of another type, or the row has only the other kind of steps.
        """
        question, answer = require_text(row, "question"), require_one_of(row, "answer")
        if not isinstance(answer, bool):
            raise RowError(f"answer: must be true or false, got {answer!r}")
        if self.steps not in row and {"facts", "decomposition"} & set(row):
            there = ", ".join(row)
            raise RowError(f"{self.steps}: the row has no such field, only {there}; the option steps names another")
        return Example(question, answer="yes" if answer else "no", steps=read_texts(row, self.steps))
