"""SVAMP: one-operation problems, worded so that key words mislead.

Forms that are read:

* the authors' and the Hub's (700 train, 300 test): ``Body``, ``Question``, ``Answer``, ``Equation``, whose equation is
  the only step: ``( 76.0 - 25.0 )`` becomes ``76-25=51``;
* PAL's (``svamp.jsonl``, all 1,000 rows): ``input``, ``target``. Name the file ``test.jsonl``. The Hub's training rows
  are among them, so what was trained on those must not be judged on this file.

Source: Patel et al., "Are NLP Models really able to Solve Simple Math Word Problems?", arXiv 2103.07191.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example
from rim_peft.data.tasks.columns import require_number, require_text
from rim_peft.data.tasks.task import Task

_POINT_ZERO = re.compile(r"(?<=\d)\.0+\b")


@dataclass(frozen=True)
class SVAMP(Task):
    """The task's options."""

    name: ClassVar[str] = "svamp"
    source: ClassVar[str | None] = "ChilleD/SVAMP"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    answer_rule: Literal["last-number-float", "strict-string"] = "last-number-float"
    """The rule that decides; both are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row of either form.

        Raises:
            RowError: a field is missing or of another type.
        """
        if "input" in row:
            return Example(require_text(row, "input"), answer=require_number(row, "target"))
        body, question = require_text(row, "Body"), require_text(row, "Question")
        body = body if body[-1] in ".?!," else f"{body}."
        answer = require_number(row, "Answer")
        steps = (_write_step(require_text(row, "Equation"), answer),) if row.get("Equation") is not None else None
        return Example(f"{body} {question}", answer=answer, steps=steps)


def _write_step(equation: str, answer: str) -> str:
    text = _POINT_ZERO.sub("", "".join(equation.split()))
    is_wrapped = text.startswith("(") and text.endswith(")") and "(" not in text[1:]
    return f"{text[1:-1] if is_wrapped else text}={answer}"
