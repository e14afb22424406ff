r"""MATH: competition problems with worked solutions in LaTeX.

Rows are as in the authors' files and on the Hub (``EleutherAI/hendrycks_math``, one configuration a subject, and
``HuggingFaceH4/MATH-500``, 500 test rows): ``problem``, ``solution``, and perhaps ``answer``; ``level``, ``type`` and
``subject`` are not read. The answer is the content of the solution's last ``\boxed{}``, braces matched, ``\fbox{}`` and
``\boxed 5`` included; without one it is the field ``answer``.

Steps are the solution's sentences, never split inside a formula and without drawings. A box is taken off, so that no
step reads as an answer; a last sentence that is nothing but the answer is left to the answer's own readout.

Source: Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example, RowError
from rim_peft.data.tasks.columns import require_text
from rim_peft.data.tasks.latex import check_math_verify, last_box, unbox
from rim_peft.data.tasks.sentences import split_sentences
from rim_peft.data.tasks.task import Task

_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)


@dataclass(frozen=True)
class MATH(Task):
    """The task's options.

    >>> MATH().answer_rules, MATH(math_verify=True).answer_rules
    (('boxed-string',), ('boxed-string', 'math-verify'))
    """

    name: ClassVar[str] = "math"
    answer_rules: ClassVar[tuple[str, ...]] = ("boxed-string",)

    answer_rule: Literal["boxed-string", "math-verify"] = "boxed-string"
    """The rule that decides."""
    math_verify: bool = False
    """Report ``math-verify`` beside ``boxed-string``, as always where it decides. Needs ``rim-peft[math]``."""

    def __post_init__(self) -> None:
        """Check the options, and that ``math_verify`` is there if it is asked for.

        Raises:
            ValueError: an option is none of its values.
            ImportError: ``math_verify`` is asked for and not installed.
        """
        if self.math_verify or self.answer_rule == "math-verify":
            check_math_verify()
            object.__setattr__(self, "answer_rules", ("boxed-string", "math-verify"))
        super().__post_init__()

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row.

        Raises:
            RowError: a field is missing, or neither the solution's last box nor ``answer`` gives an answer.
        """
        problem, solution = require_text(row, "problem"), require_text(row, "solution")
        answer = last_box(solution) or row.get("answer")
        if answer is None:
            raise RowError(f"solution: must hold \\boxed{{}} where there is no answer, got ...{solution[-60:]!r}")
        steps = split_sentences(unbox(_DRAWING.sub(" ", solution)))
        if steps and steps[-1].strip("$. ") == str(answer).strip("$. "):
            steps.pop()
        return Example(problem, answer=answer, steps=tuple(steps) or None)
