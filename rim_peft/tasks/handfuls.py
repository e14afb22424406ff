"""Word problems with small numbers: who has how many things. Each number is from 1 to 9, so that it is one token.

A question gives one number, and each other one relative to the previous person:

    Cleo has 3 marbles more than Ben. Ben has half as many marbles as Ann. Ann has 8 marbles. How many does Cleo have?

"Twice", "three times", "half", "a third" and "together they have 10" are mixed with "more" and "fewer". So the answer
is not a sum of the numbers in the text, and no statement can be ignored. By default the statements come in reverse
order, starting with the person asked about: in the order of the chain, a model could carry a running value along the
words of the question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

from rim_peft.tasks.stories import StoryTask

LARGEST = 9
"""The largest number of things; the smallest is 1."""

NAMES = (
    *("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Liv", "Moe", "Nora", "Otto"),
    *("Pam", "Quinn", "Rose", "Sam", "Tom", "Uma", "Vera", "Walt", "Yara", "Zoe", "Alma", "Bert", "Carl"),
    *("Dora", "Emil"),
)
THINGS = (
    *("marbles", "buttons", "pens", "books", "shells", "stamps", "coins", "cards", "apples", "pears", "plums", "eggs"),
    *("nuts", "beads", "keys", "kites", "cups", "hats", "bags", "boxes", "balls", "stones", "flowers", "cookies"),
)


@dataclass(frozen=True)
class _Operation:
    """A relation that gives a new number from an old one.

    Attributes:
        apply: computes the new number from the old one and the operand.
        equation: template of the equation.
        numbers: possible operands.
        wordings: sentences about ``a``, who has the old number, and ``b``, who has the new one.
    """

    apply: Callable[[float, int], float]
    equation: str
    numbers: tuple[int, ...]
    wordings: tuple[str, ...]


OPERATIONS: Mapping[str, _Operation] = {
    "more": _Operation(
        lambda value, number: value + number,
        "{value}+{number}={result}",
        (2, 3, 4),
        (
            "{b} has {n} {things} more than {a}.",
            "{b} has {n} more {things} than {a} does.",
            "If {a} got {n} more {things}, {a} would have as many as {b}.",
            "{a} has {n} {things} fewer than {b}.",
        ),
    ),
    "fewer": _Operation(
        lambda value, number: value - number,
        "{value}-{number}={result}",
        (2, 3, 4),
        (
            "{b} has {n} {things} fewer than {a}.",
            "{b} has {n} fewer {things} than {a} does.",
            "If {a} lost {n} {things}, {a} would have as many as {b}.",
            "{a} has {n} {things} more than {b}.",
        ),
    ),
    "double": _Operation(
        lambda value, number: value * number,
        "{value}*{number}={result}",
        (2,),
        (
            "{b} has twice as many {things} as {a}.",
            "{a} has half as many {things} as {b}.",
            "{b} has two {things} for each one of {a}.",
        ),
    ),
    "triple": _Operation(
        lambda value, number: value * number,
        "{value}*{number}={result}",
        (3,),
        ("{b} has three times as many {things} as {a}.", "{a} has a third as many {things} as {b}."),
    ),
    "half": _Operation(
        lambda value, number: value / number,
        "{value}/{number}={result}",
        (2,),
        (
            "{b} has half as many {things} as {a}.",
            "{a} has twice as many {things} as {b}.",
            "{a} has two {things} for each one of {b}.",
        ),
    ),
    "third": _Operation(
        lambda value, number: value / number,
        "{value}/{number}={result}",
        (3,),
        ("{b} has a third as many {things} as {a}.", "{a} has three times as many {things} as {b}."),
    ),
    "together": _Operation(
        lambda value, number: number - value,
        "{number}-{value}={result}",
        (10, 12),
        (
            "Together {a} and {b} have {n} {things}.",
            "{b} and {a} have {n} {things} between them.",
            "{a} and {b} put their {things} on a pile, and count {n}.",
        ),
    ),
}
"""Operations by name. Two can share a wording; they differ in which of the two people comes earlier in the chain."""

_GIVEN = ("{a} has {n} {things}.", "There are {n} {things} in {a}'s bag.", "{a} counts {n} {things}.")
_ASKED = (
    "How many {things} does {b} have?",
    "How many {things} has {b} got?",
    "What is the number of {things} that {b} has?",
)


@dataclass(frozen=True)
class Handfuls(StoryTask):
    """The task's options; ``lengths`` are numbers of operations.

    >>> row = next(Handfuls(lengths=(2,)).rows("train"))
    >>> row["length"], len(row["steps"]), read_chain(row["question"])[0] == int(row["steps"][0])
    (2, 2, True)
    """

    name: ClassVar[str] = "handfuls"
    answer_rules: ClassVar[tuple[str, ...]] = ("last-number-float", "strict-string")

    lengths: tuple[int, ...] = (2, 3, 4, 5)
    """Numbers of operations to draw from."""
    steps: Literal["values", "equations"] = "values"
    """A step's text: the number alone, or its equation, such as ``8/2=4``; the first step is the given number."""
    order: Literal["reverse", "shuffled", "forward"] = "reverse"
    """Order of the statements: the chain reversed, random, or the chain's own."""

    @property
    def longest(self) -> int:
        """The most operations that the number of names allows."""
        return len(NAMES) - 1

    def draw_row(self, rng: random.Random, length: int) -> dict[str, Any]:
        """Draw a problem of ``length`` operations, whatever its split.

        With equations, the last one, which gives the answer, is also a step.
        """
        people, things = rng.sample(NAMES, length + 1), rng.choice(THINGS)
        value = rng.randint(2, LARGEST)
        sentences = [rng.choice(_GIVEN).format(a=people[0], n=value, things=things)]
        values, equations = [value], [str(value)]
        for before, person in pairwise(people):
            kind = rng.choice([name for name in OPERATIONS if _results(name, value)])
            number, result = rng.choice(_results(kind, value))
            operation = OPERATIONS[kind]
            sentences.append(rng.choice(operation.wordings).format(a=before, b=person, n=number, things=things))
            equations.append(operation.equation.format(value=value, number=number, result=result))
            values.append(value := result)
        if self.order == "reverse":
            sentences.reverse()
        elif self.order == "shuffled":
            rng.shuffle(sentences)
        asked = rng.choice(_ASKED).format(b=people[-1], things=things)
        steps = [str(value) for value in values[:-1]] if self.steps == "values" else equations
        return {"question": " ".join([*sentences, asked]), "steps": steps, "answer": str(values[-1])}

    def answer_from(self, question: str, step: int, value: str) -> str:
        """Return the answer to a question if the number after ``step`` operations were ``value``.

        It can be less than 1, and need not be a whole number.

        >>> question = (
        ...     "Cleo has 3 marbles more than Ben. Ben has half as many marbles as Ann. Ann has 8 marbles. "
        ...     "How many marbles does Cleo have?"
        ... )
        >>> [Handfuls().answer_from(question, step, number) for step, number in ((0, "8"), (0, "6"), (1, "5"))]
        ['7', '6', '8']

        Args:
            question: a question of this task.
            step: number of operations done, 0 to the chain's length.
            value: the number at that point.

        Raises:
            ValueError: the text is not a question of this task, or an argument is out of range.
        """
        _, chain = read_chain(question)
        if not 0 <= step <= len(chain):
            raise ValueError(f"step: must be from 0 to the chain's length {len(chain)}, got {step}.")
        number = float(value)
        for kind, other in chain[step:]:
            number = OPERATIONS[kind].apply(number, other)
        return f"{number:g}"


@cache
def _results(kind: str, value: int) -> list[tuple[int, int]]:
    """Return the operands for which the result is whole and within range, each with the result."""
    operation = OPERATIONS[kind]
    found = ((number, operation.apply(value, number)) for number in operation.numbers)
    return [(number, int(result)) for number, result in found if result == int(result) and 1 <= result <= LARGEST]


def read_chain(question: str) -> tuple[int, list[tuple[str, int]]]:
    """Return the given number of a question, and the operations from there to the number asked for.

    Raises:
        ValueError: the text is not a question of this task.
    """
    *statements, asked = re.split(r"(?<=[.?]) ", question)
    given = [match for text in statements for match in _matches(text, _GIVEN)]
    if len(given) != 1:
        raise _no_question(question)
    person, chain = given[0]["a"], []
    left = [text for text in statements if not _matches(text, _GIVEN)]
    while left:
        found = [
            (text, kind, int(match.groupdict().get("n") or operation.numbers[0]), match["b"])
            for text in left
            for kind, operation in OPERATIONS.items()
            for match in _matches(text, operation.wordings)
            if match["a"] == person
        ]
        if len(found) != 1:
            raise _no_question(question)
        text, kind, number, person = found[0]
        left.remove(text)
        chain.append((kind, number))
    if not any(match["b"] == person for match in _matches(asked, _ASKED)):
        raise _no_question(question)
    return int(given[0]["n"]), chain


def _matches(text: str, wordings: Iterable[str]) -> list[re.Match[str]]:
    return [match for wording in wordings if (match := _pattern(wording).fullmatch(text))]


@cache
def _pattern(wording: str) -> re.Pattern[str]:
    """Return a pattern that extracts the names and numbers from a sentence of a wording."""
    places = {"{n}": r"(?P<n>\d+)", "{things}": r"(?:\w+)", "{a}": r"(?P<a>[A-Z]\w+)", "{b}": r"(?P<b>[A-Z]\w+)"}
    text = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
    for place, pattern in places.items():
        text = text.replace(place, pattern, 1)
        if "<" in pattern:
            text = text.replace(place, f"(?P={place[1:-1]})")
    return re.compile(text)


def _no_question(question: str) -> ValueError:
    return ValueError(f"question: must be a question of task 'handfuls', got {question[:80]!r}.")
