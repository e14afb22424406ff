"""GSM8K and GSM8K-Aug: grade-school problems, with steps as equations or as sentences.

Forms that are read, from files or the Hub:

* official: ``question``, and ``answer`` with the solution, its equations as ``<<48/2=24>>``, and ``#### 24``;
* GSM8K-Aug as text lines ``question||<<48/2=24>> <<24*2=48>> #### 48``;
* GSM8K-Aug with columns: ``question``, ``steps`` (list) or ``cot`` (one text), ``answer`` (the number).

All forms give the same steps, ``48/2=24`` without the brackets: every step is a readout of its own, closed by EOS, so
brackets would only be four characters to learn per step. ``step_template: "<<{step}>>"`` brings them back.

GSM8K-Aug's validation rows are rows of the official training file: beside that file they select nothing. The official
rows have a fifteenth of their own training questions carved out instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example, RowError, require_field
from rim_peft.data.tasks.answers import parse_gold_number
from rim_peft.data.tasks.columns import require_text
from rim_peft.data.tasks.task import Task

_EQUATION = re.compile(r"<<(.*?)>>")
_BARE_EQUATION = re.compile(r"[\d\s.,+*/()%$-]+=[\d\s.,+*/()%$=-]+")


@dataclass(frozen=True)
class GSM8K(Task):
    """The task's options."""

    name: ClassVar[str] = "gsm8k"
    source: ClassVar[str | None] = "openai/gsm8k:main"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    steps: Literal["equations", "sentences"] = "equations"
    """A step's text: the solution's equations, or its lines without them."""
    answer_rule: Literal["last-number-float", "strict-string"] = "last-number-float"
    """The rule that decides: as floats, the text's last number (as CODI does); or as strings, what follows the first
    ``####``, else the whole text (as iCoT does). Both without commas; both are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row of any of the forms above.

        Raises:
            RowError: a field is missing, the answer is no number, or the row holds no sentences and they are asked for.
        """
        if set(row) == {"text"}:
            row = _split_line(require_text(row, "text"))
        question, answer = require_field(row, "question"), require_field(row, "answer")
        if not isinstance(answer, str):
            raise RowError(f"answer: must be a text, got {answer!r}")
        solution, mark, gold = answer.partition("####")
        if not mark:
            solution, gold = "", answer
        lines = (
            _solution_lines(row, wants_equations=self.steps == "equations")
            if not solution.strip()
            else solution.split("\n")
        )
        gold = gold.replace(",", "").strip()
        if not _is_number(gold):
            rule = "what follows '####' must be a number" if mark else "must be a number or hold '####' and a number"
            raise RowError(f"answer: {rule}, got {gold[-60:]!r}")
        return Example(question, answer=gold, steps=tuple(self._read_steps(lines)) or None)

    def _read_steps(self, lines: list[str]) -> list[str]:
        if self.steps == "equations":
            return [equation.strip() for line in lines for equation in _EQUATION.findall(line)]
        sentences = [_EQUATION.sub("", line).strip() for line in lines if line.strip()]
        if "" in sentences:
            raise RowError("steps: the row has equations alone, no sentences; use the option steps='equations'")
        return sentences


@dataclass(frozen=True)
class GSM8KAug(GSM8K):
    """GSM8K-Aug: 385k rows to train on, and 500 for selection, which its own training rows leave out."""

    name: ClassVar[str] = "gsm8k-aug"
    source: ClassVar[str | None] = "whynlp/gsm8k-aug"


def _split_line(line: str) -> dict[str, str]:
    question, mark, answer = line.partition("||")
    if not mark or "####" not in answer:
        raise RowError(f"must read 'question||<<..>> #### answer', got {line[:60]!r}")
    return {"question": question.strip(), "answer": answer}


def _solution_lines(row: Mapping[str, Any], *, wants_equations: bool) -> list[str]:
    """Return the steps of a row whose answer does not hold them: from ``steps`` or ``cot``, or none."""
    steps = row.get("steps", row.get("cot"))
    if steps is None:
        return []
    if isinstance(steps, str):
        steps = steps.split("\n")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise RowError(f"steps: must be a text or a list of texts, got {steps!r}")
    lines = [f"<<{step}>>" if _BARE_EQUATION.fullmatch(step) else step for step in steps]
    for index, line in enumerate(lines):
        if wants_equations and "=" in line and not _EQUATION.search(line):
            # Left out, it would be a hole in the chain.
            raise RowError(
                f"steps[{index}]: must be an equation of numbers alone or mark it as <<..>>, got {line[:60]!r}; or use "
                "the option steps='sentences'"
            )
    return lines


def _is_number(text: str) -> bool:
    try:
        parse_gold_number(text)
    except ValueError:
        return False
    return True
