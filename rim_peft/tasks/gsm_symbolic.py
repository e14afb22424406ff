"""GSM-Symbolic, generated with the package reasoning-gym: GSM8K's problems with other names and numbers.

Each of its 85 templates writes a problem and its solution. The steps are the solution's equations, as in GSM8K-Aug, or
its lines. A problem is omitted if an equation is false or uses a number that comes from nowhere, or if the last
equation does not give the answer: about half of all. Ten templates are never trained on; their problems are the split
``new-templates``.

Source: Mirzadeh et al., "GSM-Symbolic: Understanding the Limitations of Mathematical Reasoning in Large Language
Models", arXiv 2410.05229; Stojanovski et al., "Reasoning Gym", arXiv 2505.24760.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import count
from typing import Any, ClassVar, Literal

from rim_peft.tasks.stories import SPLITS, DrawnTask, split_of

logger = logging.getLogger(__name__)

NEW_TEMPLATES = "new-templates"
"""The split with the held-out templates, which are in no other split."""

_NUMBER = r"\$?\d[\d,]*(?:\.\d+)?%?"
_EQUATION = re.compile(rf"({_NUMBER}(?:\s*[-+*/x×÷]\s*{_NUMBER})+)\s*=\s*({_NUMBER})")
_TAIL = " Give the result as your final answer. Do not include units."
"""The instruction that reasoning-gym appends to a problem."""
_KNOWN = {*map(float, range(13)), 24.0, 52.0, 60.0, 100.0, 365.0, 1000.0}
"""Numbers that a solution may use without a source: small ones, and those of clocks, calendars and percentages."""
_CHUNK = 1000
_MOST_EMPTY_CHUNKS = 50


@dataclass(frozen=True)
class GSMSymbolic(DrawnTask):
    """The task's options."""

    name: ClassVar[str] = "gsm-symbolic"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    lengths: tuple[int, ...] = (1, 2, 3, 4)
    """Allowed numbers of equations in a problem."""
    steps: Literal["equations", "sentences"] = "equations"
    """A step's text: an equation of the solution, or a line with one."""
    num_new_templates: int = 10
    """Number of held-out templates, the same ones for every seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: must hold numbers of equations of at least 1, got {self.lengths!r}.")
        if not 0 <= self.num_new_templates <= 40:
            raise ValueError(f"num_new_templates: must be from 0 to 40, got {self.num_new_templates}.")
        if find_spec("reasoning_gym") is None:
            raise ImportError("task: 'gsm-symbolic' needs reasoning-gym: pip install 'rim-peft[gsm-symbolic]'.")

    def num_in(self, split: str) -> int:
        """Return the number of rows in a split."""
        if split == NEW_TEMPLATES:
            return self.num_held_out
        if split not in SPLITS:
            listed = ", ".join((*SPLITS, NEW_TEMPLATES))
            raise ValueError(f"split: must be one of {listed}, got {split!r}")
        return super().num_in(split)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a split, each question once, with ``template`` and ``length`` (number of equations).

        Raises:
            ValueError: there is no such split, or too few problems have the requested numbers of equations.
        """
        wanted, found = self.num_in(split), 0
        left_out: Counter[str] = Counter()
        seen: set[str] = set()
        new = new_templates(self.num_new_templates)
        for number in count():
            before = found
            for template, problem in _problems(self.seed * 1_000_003 + number):
                question = problem["question"].removesuffix(_TAIL).strip()
                where = NEW_TEMPLATES if template in new else split_of(question)
                if where != split or question in seen:
                    continue
                steps = read_steps(problem, wants_equations=self.steps == "equations")
                if isinstance(steps, str):
                    left_out[steps] += 1
                elif len(steps) not in self.lengths:
                    left_out["a number of equations not in lengths"] += 1
                else:
                    seen.add(question)
                    found += 1
                    yield {
                        "question": question,
                        "steps": steps,
                        "answer": problem["answer"],
                        "length": len(steps),
                        "template": template,
                    }
                if found == wanted:
                    reasons = ", ".join(f"{reason}: {times}" for reason, times in left_out.most_common())
                    logger.info("gsm-symbolic, %s: %d problems; omitted: %s", split, found, reasons or "none")
                    return
            if found == before and number >= _MOST_EMPTY_CHUNKS:
                raise ValueError(
                    f"num_rows, num_held_out: split {split!r} has {found} problems of {self.lengths!r} equations, got "
                    f"{wanted}. Request fewer, or other lengths."
                )


def read_steps(problem: dict[str, Any], *, wants_equations: bool) -> list[str] | str:
    """Return the steps of a problem's solution, or the reason to omit the problem.

    >>> solution = "He buys 2*3=6 eggs.\\nSo he has 6 + 6 = $12.\\n#### 12"
    >>> problem = {"question": "How many?", "answer": "12", "metadata": {"answer_cot": solution}}
    >>> read_steps(problem, wants_equations=True), read_steps(problem, wants_equations=False)
    (['2*3=6', '6+6=12'], ['He buys 2*3=6 eggs.', 'So he has 6 + 6 = $12.'])
    """
    lines = problem["metadata"]["answer_cot"].partition("####")[0].splitlines()
    found = [(line.strip(), left, right) for line in lines for left, right in _EQUATION.findall(line)]
    if not found:
        return "no equation"
    equations = [(_plain(left), _plain(right)) for _, left, right in found]
    if not all(math.isclose(_value(left), _value(right), rel_tol=1e-6, abs_tol=1e-6) for left, right in equations):
        return "an equation that is not true"
    if _value(equations[-1][1]) != _value(_plain(problem["answer"])):
        return "the last equation does not give the answer"
    known = _KNOWN | _numbers(problem["question"])
    for left, right in equations:
        if not _numbers(left) <= known:
            return "a number that comes from nowhere"
        known |= _numbers(right)
    if wants_equations:
        return [f"{left}={right}" for left, right in equations]
    return list(dict.fromkeys(line for line, _, _ in found))


@cache
def new_templates(num: int) -> frozenset[int]:
    """Return the indices of the held-out templates: those with the smallest hashes among those with solutions."""
    solvable = {
        template
        for number in range(4)
        for template, problem in _problems(number)
        if not isinstance(steps := read_steps(problem, wants_equations=True), str) and len(steps) <= 4
    }
    return frozenset(
        sorted(solvable, key=lambda template: hashlib.sha256(f"template {template}".encode()).digest())[:num]
    )


def _problems(seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the indices of templates with their problems, the same for the same seed."""
    from reasoning_gym import create_dataset

    dataset = create_dataset("gsm_symbolic", size=_CHUNK, seed=seed * _CHUNK)  # row i is drawn with seed + i
    yield from zip(dataset.task_indices, dataset, strict=True)


def _numbers(text: str) -> set[float]:
    """Return the numbers in a text, without signs; 8% counts as 8."""
    return {float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}


def _plain(text: str) -> str:
    """Write an expression in Python's notation: no currency signs, white space or commas; ``*`` and ``/``."""
    return re.sub(r"[\s$,]", "", text).translate(str.maketrans("x×÷", "**/"))


def _value(expression: str) -> float:
    """Evaluate an expression of numbers, ``+``, ``-``, ``*`` and ``/``; ``%`` divides its number by 100."""
    total, product, sign = 0.0, math.nan, "+"
    for operator, number in re.findall(r"([-+*/]?)([\d.]+%?)", expression):
        value = float(number.rstrip("%")) / (100 if number.endswith("%") else 1)
        if operator in ("*", "/"):
            product = product * value if operator == "*" else product / value if value else math.nan
            continue
        if not math.isnan(product):
            total += product if sign == "+" else -product
        product, sign = value, operator or "+"
    return total + (product if sign == "+" else -product)
