"""GSM-Hard: GSM8K's test questions with large numbers in them.

Rows are as in PAL's repository and on the Hub: ``input``, ``target`` (a number), and ``code``, which is not read; there
are no steps. All 1,319 rows are test rows, also on the Hub, where their split is called ``train``.

303 answers are no integers and 146 are negative. The figures of CODI and SIM-CoT are under ``last-number-float``, which
is the default for that reason: it asks for every digit of the 303. ``abs-1e-3``, the authors' own rule, stands beside
it; it takes 0 for the 31 answers between -0.001 and 0.001 that are not 0.

Source: Gao et al., "PAL: Program-aided Language Models", arXiv 2211.10435.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example
from rim_peft.data.tasks.columns import require_number, require_text
from rim_peft.data.tasks.task import Task


@dataclass(frozen=True)
class GSMHard(Task):
    """The task's options."""

    name: ClassVar[str] = "gsm-hard"
    source: ClassVar[str | None] = "reasoning-machines/gsm-hard"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string", "abs-1e-3")
    split_names: ClassVar[Mapping[str, str]] = {"train": "test"}

    answer_rule: Literal["last-number-float", "strict-string", "abs-1e-3"] = "last-number-float"
    """The rule that decides; all three are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row; the answer becomes a decimal without an exponent, which the rules would misread.

        Raises:
            RowError: a field is missing or of another type.
        """
        return Example(require_text(row, "input"), answer=require_number(row, "target"))
