"""MultiArith: problems of a few operations on small integers.

Forms that are read: the Hub's (420 train, 180 test) with ``question`` and ``final_ans``, and PAL's (all 600 rows in
``multiarith.jsonl``, which should be named ``test.jsonl``) with ``input`` and ``target``. CODI judges on the Hub's test
split. There are no steps.

Source: Roy and Roth, "Solving General Arithmetic Word Problems", arXiv 1608.01413.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example
from rim_peft.data.tasks.columns import require_number, require_text
from rim_peft.data.tasks.task import Task


@dataclass(frozen=True)
class MultiArith(Task):
    """The task's options."""

    name: ClassVar[str] = "multiarith"
    source: ClassVar[str | None] = "ChilleD/MultiArith"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    answer_rule: Literal["last-number-float", "strict-string"] = "last-number-float"
    """The rule that decides; both are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row of either form.

        Raises:
            RowError: a field is missing or of another type.
        """
        return Example(require_text(row, "question", "input"), answer=require_number(row, "final_ans", "target"))
