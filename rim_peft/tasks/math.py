"""Mathematics in words: GSM8K, GSM8K-Aug, GSM-Hard, SVAMP, MultiArith and MATH."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example, RowError, require_field
from rim_peft.tasks.answers import check_math_verify, last_box, parse_gold_number, split_sentences, unbox
from rim_peft.tasks.task import Task, require_number, require_text

_EQUATION = re.compile(r"<<(.*?)>>")
_BARE_EQUATION = re.compile(r"[\d\s.,+*/()%$-]+=[\d\s.,+*/()%$=-]+")


@dataclass(frozen=True)
class GSM8K(Task):
    """GSM8K and GSM8K-Aug: grade-school problems, with steps as equations or as sentences.

    Forms that are read, from files or the Hub:

    * official: ``question``, and ``answer`` with the solution, its equations as ``<<48/2=24>>``, and ``#### 24``;
    * GSM8K-Aug as text lines ``question||<<48/2=24>> <<24*2=48>> #### 48``;
    * GSM8K-Aug with columns: ``question``, ``steps`` (list) or ``cot`` (one text), ``answer`` (the number).

    All forms give the same steps, ``48/2=24`` without the brackets: every step is a readout of its own, closed by EOS,
    so brackets would only be four characters to learn per step. ``step_template: "<<{step}>>"`` brings them back.

    GSM8K-Aug's validation rows are rows of the official training file: beside that file they select nothing. The
    official rows have a fifteenth of their own training questions carved out instead.
    """

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


@dataclass(frozen=True)
class GSMHard(Task):
    """GSM-Hard: GSM8K's test questions with large numbers in them.

    Rows are as in PAL's repository and on the Hub: ``input``, ``target`` (a number), and ``code``, which is not read;
    there are no steps. All 1,319 rows are test rows, also on the Hub, where their split is called ``train``.

    303 answers are no integers and 146 are negative. The figures of CODI and SIM-CoT are under ``last-number-float``,
    which is the default for that reason: it asks for every digit of the 303. ``abs-1e-3``, the authors' own rule,
    stands beside it; it takes 0 for the 31 answers between -0.001 and 0.001 that are not 0.

    Source: Gao et al., "PAL: Program-aided Language Models", arXiv 2211.10435.
    """

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


@dataclass(frozen=True)
class MultiArith(Task):
    """MultiArith: problems of a few operations on small integers.

    Forms that are read: the Hub's (420 train, 180 test) with ``question`` and ``final_ans``, and PAL's (all 600 rows in
    ``multiarith.jsonl``, which should be named ``test.jsonl``) with ``input`` and ``target``. CODI judges on the Hub's
    test split. There are no steps.

    Source: Roy and Roth, "Solving General Arithmetic Word Problems", arXiv 1608.01413.
    """

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


_POINT_ZERO = re.compile(r"(?<=\d)\.0+\b")


@dataclass(frozen=True)
class SVAMP(Task):
    """SVAMP: one-operation problems, worded so that key words mislead.

    Forms that are read:

    * the authors' and the Hub's (700 train, 300 test): ``Body``, ``Question``, ``Answer``, ``Equation``, whose
      equation is the only step: ``( 76.0 - 25.0 )`` becomes ``76-25=51``;
    * PAL's (``svamp.jsonl``, all 1,000 rows): ``input``, ``target``. Name the file ``test.jsonl``. The Hub's training
      rows are among them, so what was trained on those must not be judged on this file.

    Source: Patel et al., "Are NLP Models really able to Solve Simple Math Word Problems?", arXiv 2103.07191.
    """

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


_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)


@dataclass(frozen=True)
class MATH(Task):
    r"""MATH: competition problems with worked solutions in LaTeX.

    Rows are as in the authors' files and on the Hub (``EleutherAI/hendrycks_math``, one configuration a subject, and
    ``HuggingFaceH4/MATH-500``, 500 test rows): ``problem``, ``solution``, and perhaps ``answer``; ``level``, ``type``
    and ``subject`` are not read. The answer is the content of the solution's last ``\boxed{}``, braces matched,
    ``\fbox{}`` and ``\boxed 5`` included; without one it is the field ``answer``.

    Steps are the solution's sentences, never split inside a formula and without drawings. A box is taken off, so that
    no step reads as an answer; a last sentence that is nothing but the answer is left to the answer's own readout.

    Source: Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874.

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
