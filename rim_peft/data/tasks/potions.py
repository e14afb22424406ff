"""The demo's generated task: which colour a brew has after a chain of kitchen work.

The colours lie on a ring and every verb is one affine map of that ring, so neither the order of the verbs nor
any single statement can be ignored. The statements stand in reverse order, the brew to ask for first and the known
colour last, so that no running value can be carried along the words of the question:

    Tom boils Kim's brew. Kim salts Pam's brew. Pam's brew is red. What colour is Tom's brew?

What a verb does is never said. It is what a model trained on this world knows, as others know that 7 x 8 is 56.

The demo has five colours, sixteen names and no distractors. More of each, and longer chains, make it as hard as one
likes; the world is then another, and needs a base that was trained on it (`World` draws the stories).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from rim_peft.data.tasks.potions_world import NAMES, Chain, World
from rim_peft.data.tasks.stories import SPLITS, Split, StoryTask, split_of

__all__ = [
    "COLOURS",
    "NAMES",
    "SPLITS",
    "VERBS",
    "Chain",
    "Potions",
    "Split",
    "World",
    "apply_verb",
    "draw_chain",
    "is_correct",
    "read_answer",
    "split_of",
]

_DEMO = World()

COLOURS = _DEMO.colours
"""The demo's ring: colour `c` is the number `c` modulo five."""

VERBS = _DEMO.verbs
"""The demo's verbs, each with `(factor, shift)`: the brew's number `c` becomes `(factor * c + shift) % 5`."""

apply_verb, draw_chain = _DEMO.apply_verb, _DEMO.draw_chain


def read_answer(text: str) -> str | None:
    """Return the last of the demo's colours named in a generated text, or None where it names none.

    >>> read_answer("Kim red, Tom gold"), read_answer("Tom")
    ('gold', None)
    """
    return _last_colour(text, COLOURS)


def is_correct(text: str, gold: str) -> bool:
    """Tell whether a generated text answers with the colour `gold`.

    >>> is_correct(" Gold", "gold"), is_correct("blue", "gold")
    (True, False)
    """
    return read_answer(text) == gold.strip().lower()


@dataclass(frozen=True)
class Potions(StoryTask):
    """The task's options; `lengths` are numbers of operations.

    >>> row = next(Potions(lengths=(2,)).rows("train"))
    >>> row["question"]
    "Finn shakes Moe's brew. Moe stirs Dan's brew. Dan's brew is blue. What colour is Finn's brew?"
    >>> row["steps"], row["answer"], row["length"]
    (['blue', 'plum'], 'blue', 2)
    """

    name: ClassVar[str] = "potions"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-word",)

    steps: Literal["values", "sentences"] = "values"
    """A step's text: the colour alone, or the brew's owner and its colour."""
    num_colours: int = 5
    """Colours on the ring, a prime up to 23; there are 2 p - 3 verbs."""
    num_names: int = 16
    """People who can brew."""
    distractors: int = 0
    """Statements in every question about people outside its chain."""

    @property
    def world(self) -> World:
        """The world that the options describe."""
        return _world(self.num_colours, self.num_names, self.distractors)

    @property
    def longest(self) -> int:
        """The most operations that names and distractors leave room for: `num_names - 1 - distractors`."""
        return self.world.longest

    def draw_row(self, rng: random.Random, length: int) -> dict[str, Any]:
        """Draw a story of `length + 1` colours, of which the last is the answer, whatever its split."""
        chain = self.world.draw_chain(rng, length)
        steps = list(chain.colours[:-1]) if self.steps == "values" else chain.thoughts[:-1]
        return {"question": chain.question, "steps": steps, "answer": chain.answer}

    def read_answer(self, text: str) -> str | None:
        """Return the last of the world's colours named in a generated text, or None where it names none."""
        return _last_colour(text, self.world.colours)

    def is_correct(self, text: str, gold: str) -> bool:
        """Tell whether a generated text answers with the colour `gold`."""
        return self.read_answer(text) == gold.strip().lower()

    def answer_from(self, question: str, step: int, colour: str) -> str:
        """Return the answer to a question if its brew had another colour on the way.

        The row's `steps[t]` is the brew's colour after `t` operations, that of the root for `t = 0`; so
        `answer_from(question, t, steps[t])` is the answer, and another colour in its place gives the counterfactual.

        >>> question = "Finn shakes Moe's brew. Moe stirs Dan's brew. Dan's brew is blue. What colour is Finn's brew?"
        >>> [Potions().answer_from(question, step, colour) for step, colour in ((0, "blue"), (1, "plum"), (1, "red"))]
        ['blue', 'blue', 'plum']

        Args:
            question: a question of this world.
            step: how many operations have been done, 0 to the chain's length.
            colour: the colour that the brew then has.

        Raises:
            ValueError: the text is no question of this world, or a value is out of range.
        """
        verbs = self.world.read_verbs(question)
        if not 0 <= step <= len(verbs):
            raise ValueError(f"step: must be from 0 to the chain's length {len(verbs)}, got {step}.")
        if colour not in self.world.colours:
            raise ValueError(f"colour: must be one of {', '.join(self.world.colours)}, got {colour!r}.")
        for verb in verbs[step:]:
            colour = self.world.apply_verb(verb, colour)
        return colour


@cache
def _world(num_colours: int, num_names: int, distractors: int) -> World:
    return World(num_colours, num_names, distractors)


@cache
def _colour_word(colours: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(colours)})\b", re.IGNORECASE)


def _last_colour(text: str, colours: tuple[str, ...]) -> str | None:
    words = _colour_word(colours).findall(text)
    return words[-1].lower() if words else None
