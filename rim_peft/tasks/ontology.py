"""ProsQA's task, generated: which of two kinds a person is, through a chain of made-up kinds.

    ... Sally is a gerpus. Every worpus is a rempus. Every gerpus is a terpus. ... Is Sally a hilpus or terpus?

The steps are the statements on a shortest path, here "Sally is a gerpus." and "Every gerpus is a terpus."; the answer
is "Sally is a terpus.". The wrong kind follows from somebody else, never from the person asked about.

The defaults match the averages of ProsQA's validation and test rows: 36.0 statements on 20.3 kinds and 2.6 people, 2.7
statements about a person, chains of 3 to 6 steps (0.41, 0.44, 0.13, 0.02), and offered kinds from which nothing
follows. There is one difference. In ProsQA the wrong kind is nearer to its person (2.1 steps) than the right one (3.8).
So, without reading the question, the kind from which more can be reached backwards is right in 0.71 of the 800 rows,
and the one with fewer statements about its members in 0.66. Here both are equally far, and no count of this sort beats
chance.

Two people each start a chain of kinds of the same length; the last kind of a chain follows from its own person and
never from the other. The other kinds and further statements are grown around the two chains as in ProsQA: a new kind
gets its statements from earlier people and kinds, from deep kinds more often than from shallow ones; and it may be
barred from everything that follows from the first person, or from the second.

Both chains are drawn in the same way, and the question is about the first person. So any count at the two offered
kinds that does not follow the statements differs only by chance.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

from rim_peft.tasks.stories import StoryTask

# fmt: off
NAMES = (
    "Alex", "Bob", "Carol", "Davis", "Eva", "Fae", "Gabriel", "Jack", "Max", "Oliver", "Polly", "Rex", "Sally", "Sam",
    "Stella", "Tom", "Wren",
)
"""People in the published rows."""

KINDS = (
    "bompus", "boompus", "brimpus", "chorpus", "dumpus", "felpus", "fompus", "gerpus", "gorpus", "grimpus", "gwompus",
    "hilpus", "impus", "jelpus", "jompus", "kerpus", "lempus", "lorpus", "numpus", "quimpus", "rempus", "rompus",
    "rorpus", "scrompus", "shumpus", "sterpus", "storpus", "terpus", "timpus", "tumpus", "vumpus", "worpus", "wumpus",
    "yerpus", "yimpus", "yumpus", "zhorpus", "zumpus",
)
"""Kinds in the published rows."""
# fmt: on

BARRED = {0: 0.35, 1: 0.35, None: 0.3}
"""How often a kind outside the chains must not follow from the first person, or from the second, or is free."""


@dataclass(frozen=True)
class Story:
    """One question as data.

    Attributes:
        statements: all statements, each as (person or kind, kind), in the order of the question.
        path: the person asked about and the kinds on the path, ending with the right one.
        choices: the right and the wrong kind, in the order of the question.
    """

    statements: tuple[tuple[str, str], ...]
    path: tuple[str, ...]
    choices: tuple[str, str]

    @property
    def question(self) -> str:
        """The statements, then the question."""
        lines = [state(subject, kind) for subject, kind in self.statements]
        return " ".join([*lines, f"Is {self.path[0]} a {self.choices[0]} or {self.choices[1]}?"])

    @property
    def steps(self) -> list[str]:
        """The statements on the path from the person to the right kind."""
        return [state(subject, kind) for subject, kind in pairwise(self.path)]

    @property
    def answer(self) -> str:
        """The statement that follows."""
        return state(self.path[0], self.path[-1])


def state(subject: str, kind: str) -> str:
    """Return a statement about a person or a kind.

    >>> state("Sally", "terpus"), state("gerpus", "impus")
    ('Sally is a terpus.', 'Every gerpus is a impus.')
    """
    return f"{subject if subject in NAMES else f'Every {subject}'} is a {kind}."


@dataclass(frozen=True)
class World:
    """The size of the questions.

    Attributes:
        num_kinds: kinds in every question.
        num_statements: statements in a question; fewer if there is no room for that many different ones.
        num_people: the most people in a question; there are at least two.

    Raises:
        ValueError: a number is out of range.
    """

    num_kinds: int = 20
    num_statements: int = 36
    num_people: int = 3

    def __post_init__(self) -> None:
        if not 2 <= self.num_kinds <= len(KINDS):
            raise ValueError(f"num_kinds: must be from 2 to {len(KINDS)}, got {self.num_kinds}.")
        if self.num_statements < self.num_kinds:
            raise ValueError(
                f"num_statements: must be at least num_kinds, since every kind has one, got {self.num_statements} for "
                f"{self.num_kinds}. Raise num_statements."
            )
        if not 2 <= self.num_people <= len(NAMES):
            raise ValueError(f"num_people: must be from 2 to {len(NAMES)}, got {self.num_people}.")

    @property
    def longest(self) -> int:
        """The most steps of a chain; the two chains have no kind in common."""
        return self.num_kinds // 2

    def draw_story(self, rng: random.Random, length: int) -> Story:
        """Draw a story of two chains of `length` steps; the question is about the first.

        >>> story = World(num_kinds=4, num_statements=5).draw_story(random.Random(0), 2)
        >>> story.question.split(". ")[2:]
        ['Every wumpus is a numpus', 'Every jelpus is a gorpus', 'Sam is a jelpus', 'Is Sam a gorpus or numpus?']
        >>> story.steps, story.answer
        (['Sam is a jelpus.', 'Every jelpus is a gorpus.'], 'Sam is a gorpus.')

        Raises:
            ValueError: the chains need more kinds than there are.
        """
        if length > self.longest:
            raise ValueError(f"length: must be at most {self.longest} with {self.num_kinds} kinds, got {length}.")
        first, second, *others = rng.sample(NAMES, rng.randint(2, self.num_people))
        joining = {rng.randrange(self.num_kinds): other for other in others}
        owners = [0] * length + [1] * length + [None] * (self.num_kinds - 2 * length)
        rng.shuffle(owners)
        further = Counter(rng.choices(range(self.num_kinds), k=self.num_statements - self.num_kinds))
        growth = _Growth(rng, (first, second), length)
        for number, (kind, owner) in enumerate(zip(rng.sample(KINDS, self.num_kinds), owners, strict=True)):
            if number in joining:
                growth.join(joining[number])
            growth.add(kind, owner, 1 + further[number])
        statements = growth.statements
        rng.shuffle(statements)
        right, wrong = (chain[-1] for chain in growth.chains)
        choices = (right, wrong) if rng.random() < 0.5 else (wrong, right)
        return Story(tuple(statements), tuple(growth.chains[0]), choices)


class _Growth:
    """The people and kinds so far, with their statements and their distances from the first two people."""

    def __init__(self, rng: random.Random, people: tuple[str, str], length: int) -> None:
        self.rng, self.length = rng, length
        self.statements: list[tuple[str, str]] = []
        self.chains = [[person] for person in people]
        self.distances = [{one: 0.0 if one == person else math.inf for one in people} for person in people]
        self.sources = list(people)
        self.depths = dict.fromkeys(people, 0)
        self.missing = 0

    def join(self, person: str) -> None:
        """Add a person as a source of statements; one who joins late gets no more statements than a kind."""
        self.sources.append(person)
        self.depths[person] = 0
        for distances in self.distances:
            distances[person] = math.inf

    def add(self, kind: str, owner: int | None, wanted: int) -> None:
        """Add a kind with `wanted` statements, plus those that earlier kinds had no room for, as far as there is room.

        A kind of a chain gets the statement from its predecessor, and others that give neither a shorter path nor one
        from the other chain's person. The last kind of a chain is never a source.
        """
        wanted += self.missing
        taken: list[str] = []
        if owner is None:
            (barred,) = self.rng.choices(tuple(BARRED), tuple(BARRED.values()))
            free = [one for one in self.sources if barred is None or self.distances[barred][one] == math.inf]
        else:
            own, other, chain = self.distances[owner], self.distances[1 - owner], self.chains[owner]
            taken = [chain[-1]]
            steps = len(chain) - 1
            free = [one for one in self.sources if other[one] == math.inf and own[one] >= steps and one != chain[-1]]
            chain.append(kind)
        if free:
            weights = [1 + 1.5 * self.depths[one] for one in free]
            taken += dict.fromkeys(self.rng.choices(free, weights, k=wanted - len(taken)))
        self.missing = wanted - len(taken)
        self.depths[kind] = 1 + max(self.depths[one] for one in taken)
        self.statements += [(one, kind) for one in taken]
        for distances in self.distances:
            distances[kind] = 1 + min(distances[one] for one in taken)
        if owner is None or len(self.chains[owner]) <= self.length:
            self.sources.append(kind)


_world = cache(World)


@dataclass(frozen=True)
class Ontology(StoryTask):
    """The task's options; `lengths` are numbers of statements on the path."""

    name: ClassVar[str] = "ontology"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-text",)

    lengths: tuple[int, ...] = (3, 4, 5, 6)
    """Numbers of statements on the path to the right kind, as published."""
    weights: tuple[float, ...] | None = (0.41, 0.44, 0.13, 0.02)
    """Relative frequency of each of `lengths`, as published; equal if null."""
    num_kinds: int = 20
    """Kinds in a question, up to 38; at least twice the longest chain."""
    num_statements: int = 36
    """Statements in a question; fewer if there is no room for that many different ones."""
    num_people: int = 3
    """The most people in a question; there are at least two."""

    @property
    def world(self) -> World:
        """The world that the options describe."""
        return _world(self.num_kinds, self.num_statements, self.num_people)

    @property
    def longest(self) -> int:
        """The most statements that a chain can have: `num_kinds // 2`."""
        return self.world.longest

    def draw_row(self, rng: random.Random, length: int) -> dict[str, Any]:
        """Draw a question whose right kind is `length` statements away, regardless of split."""
        story = self.world.draw_story(rng, length)
        return {"question": story.question, "steps": story.steps, "answer": story.answer}
