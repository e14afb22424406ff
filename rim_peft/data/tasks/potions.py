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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, ClassVar, Literal

from rim_peft.data.tasks.potions_world import NAMES, SPLITS, Chain, Split, World, split_of
from rim_peft.data.tasks.task import GeneratedTask

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
class Potions(GeneratedTask):
    """The task's options; the same options give the same rows.

    >>> row = next(Potions(lengths=(2,)).rows("train"))
    >>> row["question"]
    "Finn shakes Moe's brew. Moe stirs Dan's brew. Dan's brew is blue. What colour is Finn's brew?"
    >>> row["steps"], row["answer"], row["length"]
    (['blue', 'plum'], 'blue', 2)
    """

    name: ClassVar[str] = "potions"
    answer_rules: ClassVar[tuple[str, ...]] = ("exact-word",)

    lengths: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of operations to draw from: as many dependent steps has a question. What names and distractors leave room
    for: at most `num_names - 1 - distractors`."""
    weights: tuple[float, ...] | None = None
    """How often each of `lengths` is drawn, relative to the others; equally often where absent."""
    num_rows: int = 1000
    """Rows to train on."""
    num_held_out: int = 1000
    """Rows in each of the other splits."""
    seed: int = 0
    """Seed of the rows; a split holds other questions than the other splits under every seed."""
    steps: Literal["values", "sentences"] = "values"
    """A step's text: the colour alone, or the brew's owner and its colour."""
    num_colours: int = 5
    """Colours on the ring, a prime up to 23; there are 2 p - 3 verbs."""
    num_names: int = 16
    """People who can brew."""
    distractors: int = 0
    """Statements in every question about people outside its chain."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option is out of range.
        """
        super().__post_init__()
        longest = self.world.longest
        if not self.lengths or not all(1 <= length <= longest for length in self.lengths):
            raise ValueError(f"lengths: must hold numbers of steps from 1 to {longest}, got {self.lengths!r}.")
        if self.weights is not None and (len(self.weights) != len(self.lengths) or not sum(self.weights) > 0):
            raise ValueError(
                f"weights: must hold a weight for each of the {len(self.lengths)} lengths, not all 0, got "
                f"{self.weights!r}."
            )
        if self.num_rows < 1 or self.num_held_out < 1:
            raise ValueError(f"num_rows, num_held_out: must be at least 1, got {self.num_rows}, {self.num_held_out}.")

    @property
    def world(self) -> World:
        """The world that the options describe."""
        return _world(self.num_colours, self.num_names, self.distractors)

    def row(self, index: int) -> dict[str, Any]:
        """Return candidate `index`, whatever its split: `length + 1` colours, of which the last is the answer."""
        rng = random.Random(f"potions {self.seed} {index}")
        length = rng.choices(self.lengths, self.weights)[0]
        chain = self.world.draw_chain(rng, length)
        steps = list(chain.colours[:-1]) if self.steps == "values" else chain.thoughts[:-1]
        return {"question": chain.question, "steps": steps, "answer": chain.colours[-1], "length": length}

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a split: the candidates whose question hashes into it.

        Raises:
            ValueError: on a split that is none of train, validation and test.
        """
        if split not in SPLITS:
            raise ValueError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}")
        left = self.num_rows if split == "train" else self.num_held_out
        for index in count():
            if left <= 0:
                return
            row = self.row(index)
            if split_of(row["question"]) == split:
                left -= 1
                yield row

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
