"""ProsQA's task, generated: of which of two kinds is somebody, through a chain of made-up kinds.

    ... Sally is a gerpus. Every worpus is a rempus. Every gerpus is a terpus. ... Is Sally a hilpus or terpus?

The steps are the statements on a shortest way, "Sally is a gerpus." and "Every gerpus is a terpus." here; the answer is
"Sally is a terpus.". The other kind is one that somebody else is of, never the person asked about.

The defaults are what ProsQA's validation and test rows are on the average: 36.0 statements on 20.3 kinds and 2.6
people, 2.7 statements about a person, chains of 3 to 6 steps (0.41, 0.44, 0.13, 0.02), and offered kinds of which
nothing follows. They differ in one thing. There, the wrong kind is nearer to its person (2.1 steps) than the right one
(3.8), so that the kind from which more can be reached backwards is right in 0.71 of the 800 rows, and the one with
fewer statements about who is of it in 0.66, whatever the question. Here both are equally far, and no such count is
better than chance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from rim_peft.data.tasks.ontology_world import World
from rim_peft.data.tasks.stories import StoryTask


@dataclass(frozen=True)
class Ontology(StoryTask):
    """The task's options; `lengths` are numbers of statements on the way."""

    name: ClassVar[str] = "ontology"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-text",)

    lengths: tuple[int, ...] = (3, 4, 5, 6)
    """Numbers of statements on the way to the right kind, as published."""
    weights: tuple[float, ...] | None = (0.41, 0.44, 0.13, 0.02)
    """How often each of `lengths` is drawn, relative to the others, as published; equally often where null."""
    num_kinds: int = 20
    """Kinds in a question, up to 38; at least twice the longest chain."""
    num_statements: int = 36
    """Statements in a question; fewer where there is no room for so many different ones."""
    num_people: int = 3
    """The most people in a question; there are two of them or more."""

    @property
    def world(self) -> World:
        """The world that the options describe."""
        return _world(self.num_kinds, self.num_statements, self.num_people)

    @property
    def longest(self) -> int:
        """The most statements that a chain has room for: `num_kinds // 2`."""
        return self.world.longest

    def draw_row(self, rng: random.Random, length: int) -> dict[str, Any]:
        """Draw a question whose right kind is `length` statements away, whatever its split."""
        story = self.world.draw_story(rng, length)
        return {"question": story.question, "steps": story.steps, "answer": story.answer}


@cache
def _world(num_kinds: int, num_statements: int, num_people: int) -> World:
    return World(num_kinds, num_statements, num_people)
