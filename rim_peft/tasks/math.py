"""Mathematical word problems: GSM8K, GSM8K-Aug (also in words), GSM-Hard, SVAMP, MultiArith and MATH."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rim_peft.data.examples import Example, RowError, require_field
from rim_peft.tasks.answers import parse_gold_number
from rim_peft.tasks.latex import check_math_verify, last_box, unbox
from rim_peft.tasks.steps import MARKED_EQUATION, split_sentences
from rim_peft.tasks.task import Task, read_texts, require_number, require_text

_BARE_EQUATION = re.compile(r"[\d\s.,+*/()%$-]+=[\d\s.,+*/()%$=-]+")


@dataclass(frozen=True)
class GSM8K(Task):
    """GSM8K and GSM8K-Aug: grade-school problems, with steps as equations or as sentences.

    Supported formats, from files or the Hub:

    * official: ``question``, and ``answer`` with the solution, its equations as ``<<48/2=24>>``, and ``#### 24``;
    * GSM8K-Aug as text lines ``question||<<48/2=24>> <<24*2=48>> #### 48``;
    * GSM8K-Aug with columns: ``question``, ``steps`` (list) or ``cot`` (one text), ``answer`` (the number).

    All formats give the same steps, ``48/2=24`` without the brackets: each step is its own readout that ends with EOS,
    so brackets would only be four more characters to learn. ``step_template: "<<{step}>>"`` restores them.

    GSM8K-Aug's validation rows are in the official training file, so do not select on them after training on that
    file. For the official rows, a fifteenth of their own training questions is held out instead.
    """

    name: ClassVar[str] = "gsm8k"
    source: ClassVar[str | None] = "openai/gsm8k:main"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    steps: Literal["equations", "sentences"] = "equations"
    """A step's text: an equation of the solution, or a line without its equations."""
    answer_rule: Literal["last-number-float", "strict-string"] = "last-number-float"
    """The deciding rule: the text's last number, compared as floats (as CODI does); or the text after the first
    ``####``, else the whole text, compared as strings (as iCoT does). Both ignore commas; both are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row in any of the formats above.

        Raises:
            RowError: a field is missing, the answer is not a number, or sentences are requested and the row has none.
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
            return [equation.strip() for line in lines for equation in MARKED_EQUATION.findall(line)]
        sentences = [MARKED_EQUATION.sub("", line).strip() for line in lines if line.strip()]
        if "" in sentences:
            raise RowError("steps: the row has only equations, no sentences; use the option steps='equations'")
        return sentences


@dataclass(frozen=True)
class GSM8KAug(GSM8K):
    """GSM8K-Aug: 385k training rows, and 500 for selection that are not in them."""

    name: ClassVar[str] = "gsm8k-aug"
    source: ClassVar[str | None] = "whynlp/gsm8k-aug"


@dataclass(frozen=True)
class GSM8KAugNL(Task):
    """GSM8K-Aug in words: ``question``, ``steps`` (a list of sentences, kept as they are) and ``answer`` (a number)."""

    name: ClassVar[str] = "gsm8k-aug-nl"
    source: ClassVar[str | None] = "whynlp/gsm8k-aug-nl"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    answer_rule: Literal["last-number-float", "strict-string"] = "last-number-float"
    """The deciding rule; both are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row."""
        return Example(
            require_text(row, "question"), answer=require_number(row, "answer"), steps=read_texts(row, "steps")
        )


def _split_line(line: str) -> dict[str, str]:
    question, mark, answer = line.partition("||")
    if not mark or "####" not in answer:
        raise RowError(f"must read 'question||<<..>> #### answer', got {line[:60]!r}")
    return {"question": question.strip(), "answer": answer}


def _solution_lines(row: Mapping[str, Any], *, wants_equations: bool) -> list[str]:
    """Return the steps in ``steps`` or ``cot``, for a row whose answer does not hold them; may be empty."""
    steps = row.get("steps", row.get("cot"))
    if steps is None:
        return []
    if isinstance(steps, str):
        steps = steps.split("\n")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise RowError(f"steps: must be a text or a list of texts, got {steps!r}")
    lines = [f"<<{step}>>" if _BARE_EQUATION.fullmatch(step) else step for step in steps]
    for index, line in enumerate(lines):
        if wants_equations and "=" in line and not MARKED_EQUATION.search(line):
            # Omitting it would leave a gap in the chain.
            raise RowError(
                f"steps[{index}]: must be an equation of only numbers or mark it as <<..>>, got {line[:60]!r}. Correct "
                "it, or use the option steps='sentences'"
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
    """GSM-Hard: GSM8K's test questions with large numbers.

    Rows are as in PAL's repository and on the Hub: ``input``, ``target`` (a number), and ``code``, which is not read;
    there are no steps. All 1,319 rows are test rows, although the Hub calls their split ``train``.

    303 answers are not integers and 146 are negative. The default rule is ``last-number-float``, since CODI and SIM-CoT
    report under it; it requires every digit of the 303. The authors' own rule, ``abs-1e-3``, is reported as well; it
    accepts 0 for the 31 answers between -0.001 and 0.001 that are not 0.

    Source: Gao et al., "PAL: Program-aided Language Models", arXiv 2211.10435.
    """

    name: ClassVar[str] = "gsm-hard"
    source: ClassVar[str | None] = "reasoning-machines/gsm-hard"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string", "abs-1e-3")
    split_names: ClassVar[Mapping[str, str]] = {"train": "test"}

    answer_rule: Literal["last-number-float", "strict-string", "abs-1e-3"] = "last-number-float"
    """The deciding rule; all three are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row; the answer becomes a decimal without an exponent, which the rules would misread."""
        return Example(require_text(row, "input"), answer=require_number(row, "target"))


@dataclass(frozen=True)
class MultiArith(Task):
    """MultiArith: problems of a few operations on small integers.

    Supported formats: the Hub's (420 train, 180 test) with ``question`` and ``final_ans``, and PAL's (all 600 rows in
    ``multiarith.jsonl``, which should be named ``test.jsonl``) with ``input`` and ``target``. CODI evaluates on the
    Hub's test split. There are no steps.

    Source: Roy and Roth, "Solving General Arithmetic Word Problems", arXiv 1608.01413.
    """

    name: ClassVar[str] = "multiarith"
    source: ClassVar[str | None] = "ChilleD/MultiArith"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    answer_rule: Literal["last-number-float", "strict-string"] = "last-number-float"
    """The deciding rule; both are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row in either format."""
        return Example(require_text(row, "question", "input"), answer=require_number(row, "final_ans", "target"))


_POINT_ZERO = re.compile(r"(?<=\d)\.0+\b")


@dataclass(frozen=True)
class SVAMP(Task):
    """SVAMP: one-operation problems with misleading key words.

    Supported formats:

    * the authors' and the Hub's (700 train, 300 test): ``Body``, ``Question``, ``Answer``, ``Equation``. The equation
      is the only step: ``( 76.0 - 25.0 )`` becomes ``76-25=51``;
    * PAL's (``svamp.jsonl``, all 1,000 rows): ``input``, ``target``. Name the file ``test.jsonl``. It includes the
      Hub's training rows, so do not evaluate on it after training on those.

    Source: Patel et al., "Are NLP Models really able to Solve Simple Math Word Problems?", arXiv 2103.07191.
    """

    name: ClassVar[str] = "svamp"
    source: ClassVar[str | None] = "ChilleD/SVAMP"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    answer_rule: Literal["last-number-float", "strict-string"] = "last-number-float"
    """The deciding rule; both are reported."""

    def read_row(self, row: Mapping[str, Any]) -> Example:
        """Read a row in either format."""
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

    Rows are as in the authors' files and on the Hub (``EleutherAI/hendrycks_math``, one configuration per subject, and
    ``HuggingFaceH4/MATH-500``, 500 test rows): ``problem``, ``solution``, and optionally ``answer``; ``level``,
    ``type`` and ``subject`` are not read. The answer is the content of the solution's last ``\boxed{}`` (braces
    matched; ``\fbox{}`` and ``\boxed 5`` included), else the field ``answer``.

    Steps are the solution's sentences, never split inside a formula and without drawings. Boxes are removed, so that
    no step looks like an answer; a last sentence that is only the answer is no step.

    Source: Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874.

    >>> MATH().answer_rules, MATH(math_verify=True).answer_rules
    (('boxed-string',), ('boxed-string', 'math-verify'))
    """

    name: ClassVar[str] = "math"
    answer_rules: ClassVar[tuple[str, ...]] = ("boxed-string",)

    answer_rule: Literal["boxed-string", "math-verify"] = "boxed-string"
    """The deciding rule."""
    math_verify: bool = False
    """Also report ``math-verify``, as is always done if it decides. Needs ``rim-peft[math]``."""

    def __post_init__(self) -> None:
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
            raise RowError(f"solution: must hold \\boxed{{}} if there is no answer, got ...{solution[-60:]!r}")
        steps = split_sentences(unbox(_DRAWING.sub(" ", solution)))
        if steps and steps[-1].strip("$. ") == str(answer).strip("$. "):
            steps.pop()
        return Example(problem, answer=answer, steps=tuple(steps) or None)
