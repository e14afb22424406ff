"""The demo's generated task: the colour of a brew after a chain of kitchen work.

The colours form a ring and each verb is an affine map of that ring, so neither the order of the verbs nor any single
statement can be ignored. The statements come in reverse order, the brew asked for first and the known colour last, so
that a model cannot carry a running value along the words of the question:

    Tom boils Kim's brew. Kim salts Pam's brew. Pam's brew is red. What colour is Tom's brew?

What a verb does is never stated. A model trained on this world knows it, as others know that 7 x 8 is 56.

The demo's world has five colours, seven verbs, sixteen names and no distractors. More of each, and longer chains, make
it as hard as you like. A larger world keeps these words and adds others, and a verb means the same operation in every
world that has it; but it is a different world, and needs a base trained on it (`World` draws the stories).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any, ClassVar, Literal

from rim_peft.tasks.stories import StoryTask

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)
"""Possible numbers of colours; with a prime, every factor permutes the ring."""

# fmt: off
_COLOUR_WORDS = (
    "red", "gold", "green", "blue", "plum", "teal", "rust", "lime", "navy", "rose", "amber", "coral", "olive",
    "beige", "mauve", "black", "white", "brown", "pink", "grey", "cyan", "tan", "jade",
)

_SHIFT_WORDS = (
    "stirs", "salts", "cools", "shakes", "heats", "dries", "soaks", "peels", "chops", "mixes", "rinses", "skims",
    "folds", "beats", "bakes", "fries", "grills", "steams", "thaws", "smokes", "drains", "tosses",
)
"""Verbs that add 1, 2, ..."""

_FACTOR_WORDS = (
    "boils", "sieves", "burns", "whisks", "mashes", "blends", "grinds", "presses", "strains", "kneads", "rolls",
    "melts", "roasts", "toasts", "pickles", "glazes", "stews", "brews", "ferments", "churns", "chills",
)
"""Verbs that multiply by 2, 3, ..."""

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Liv", "Moe", "Nell", "Pam",
    "Tom",
)

# fmt: on

MOST_NAMES = 4000

_STATEMENT = re.compile(r"(\w+) (\w+) (\w+)'s brew\.")
_ASKED = re.compile(r"What colour is (\w+)'s brew\?")


@dataclass(frozen=True)
class Chain:
    """One story as data: person 0's brew has colour 0, and person `t` makes a brew from that of person `t - 1`.

    ``distractors`` holds statements about other people, each with its position among all statements.
    """

    people: tuple[str, ...]
    verbs: tuple[str, ...]
    colours: tuple[str, ...]
    distractors: tuple[tuple[int, str], ...] = ()

    @property
    def question(self) -> str:
        """The statements, last operation first, then the question."""
        links = zip(self.people[1:], self.verbs, self.people[:-1], strict=True)
        lines = [f"{person} {verb} {source}'s brew." for person, verb, source in links]
        statements = [*reversed(lines), f"{self.people[0]}'s brew is {self.colours[0]}."]
        for place, statement in self.distractors:
            statements.insert(place, statement)
        return " ".join([*statements, f"What colour is {self.people[-1]}'s brew?"])

    @property
    def answer(self) -> str:
        """The colour of the brew that the question asks for."""
        return self.colours[-1]

    @property
    def thoughts(self) -> list[str]:
        """Each brew with its colour, from the root to the answer, as the base model writes them."""
        return [f"{person} {colour}" for person, colour in zip(self.people, self.colours, strict=True)]


@dataclass(frozen=True)
class World:
    """Colours on a ring, verbs that move them, people who brew.

    >>> World(num_colours=7).verbs["heats"], len(World(num_colours=23).verbs), World(num_names=18).names[16:]
    ((1, 5), 43, ('Baba', 'Babe'))

    Attributes:
        num_colours: colours on the ring, p: a prime up to 23. The verbs are all shifts (p - 1) and all factors but 1
            (p - 2).
        num_names: people who can brew, the demo's sixteen first.
        distractors: statements per story about people outside its chain: one known colour, and brews made from one
            another, each with its own maker and colour.

    Raises:
        ValueError: a number is out of range.
    """

    num_colours: int = 5
    num_names: int = 16
    distractors: int = 0

    def __post_init__(self) -> None:
        if self.num_colours not in PRIMES:
            listed = ", ".join(map(str, PRIMES))
            raise ValueError(f"num_colours: must be one of the primes {listed}, got {self.num_colours}.")
        if not 2 <= self.num_names <= MOST_NAMES:
            raise ValueError(f"num_names: must be from 2 to {MOST_NAMES}, got {self.num_names}.")
        if not 0 <= self.distractors <= self.num_names - 2:
            raise ValueError(
                f"distractors: must be from 0 to {self.num_names - 2}, since each takes one of the {self.num_names} "
                f"names and a chain at least two, got {self.distractors}. Raise num_names."
            )

    @cached_property
    def colours(self) -> tuple[str, ...]:
        """The ring: the colour at index `c` is the number `c` modulo the ring's length."""
        return _COLOUR_WORDS[: self.num_colours]

    @cached_property
    def verbs(self) -> dict[str, tuple[int, int]]:
        """Map each verb to `(factor, shift)`: colour `c` becomes `(factor * c + shift) % num_colours`."""
        shifts = {_SHIFT_WORDS[shift - 1]: (1, shift) for shift in range(1, self.num_colours)}
        return shifts | {_FACTOR_WORDS[factor - 2]: (factor, 0) for factor in range(2, self.num_colours)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The people: the demo's first, then names of two syllables."""
        syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
        made = ("".join(pair).capitalize() for pair in product(syllables, syllables))
        taken = {*NAMES, *(word.capitalize() for word in (*_COLOUR_WORDS, *_SHIFT_WORDS, *_FACTOR_WORDS))}
        new = [name for name in made if name not in taken][: max(0, self.num_names - len(NAMES))]
        return (*NAMES, *new)[: self.num_names]

    @property
    def longest(self) -> int:
        """The most operations of a story: each needs one name, and so do the root and each distractor."""
        return self.num_names - 1 - self.distractors

    @property
    def words(self) -> list[str]:
        """All words that depend on the world: colours, verbs, names."""
        return [*self.colours, *self.verbs, *self.names]

    def apply_verb(self, verb: str, colour: str) -> str:
        """Return the colour that `verb` turns `colour` into.

        >>> World().apply_verb("boils", "plum"), World(num_colours=7).apply_verb("boils", "plum")
        ('blue', 'gold')
        """
        factor, shift = self.verbs[verb]
        return self.colours[(factor * self.colours.index(colour) + shift) % self.num_colours]

    def draw_chain(self, rng: random.Random, length: int) -> Chain:
        """Draw a story of `length` operations.

        >>> World().draw_chain(random.Random(0), 1).question
        "Tom burns Moe's brew. Moe's brew is red. What colour is Tom's brew?"
        >>> World(distractors=2).draw_chain(random.Random(0), 1).question.removesuffix("What colour is Tom's brew?")
        "Tom salts Moe's brew. Ada shakes Gus's brew. Moe's brew is plum. Gus's brew is blue. "
        """
        drawn = tuple(rng.sample(self.names, length + 1 + self.distractors))
        people, others = drawn[: length + 1], drawn[length + 1 :]
        verbs = tuple(rng.choices(tuple(self.verbs), k=length))
        colours = [rng.choice(self.colours)]
        for verb in verbs:
            colours.append(self.apply_verb(verb, colours[-1]))
        return Chain(people, verbs, tuple(colours), self._draw_distractors(rng, others, length + 1))

    def _draw_distractors(
        self, rng: random.Random, others: tuple[str, ...], num_statements: int
    ) -> tuple[tuple[int, str], ...]:
        """Draw a statement and its position for each of `others`, in reverse order like the chain."""
        if not others:
            return ()
        statements = [f"{others[0]}'s brew is {rng.choice(self.colours)}."]
        for number, person in enumerate(others[1:], start=1):
            statements.append(f"{person} {rng.choice(tuple(self.verbs))} {others[rng.randrange(number)]}'s brew.")
        places = sorted(rng.sample(range(num_statements + len(others)), len(others)))
        return tuple(zip(places, reversed(statements), strict=True))

    def read_verbs(self, question: str) -> tuple[str, ...]:
        """Return the verbs from the root to the brew asked for, in the order in which they apply.

        Raises:
            ValueError: the text is not a question of this world.
        """
        asked = _ASKED.search(question)
        made = {person: (verb, source) for person, verb, source in _STATEMENT.findall(question)}
        person = asked[1] if asked else ""
        verbs: list[str] = []
        while person in made and len(verbs) < len(made):
            verb, person = made[person]
            verbs.append(verb)
        if not asked or f"{person}'s brew is " not in question or not set(verbs) <= set(self.verbs):
            raise ValueError(f"question: must be from this world of {self.num_colours} colours, got {question!r}.")
        return tuple(reversed(verbs))


_world = cache(World)


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
    """Colours on the ring, a prime p up to 23; there are 2 p - 3 verbs."""
    num_names: int = 16
    """People who can brew."""
    distractors: int = 0
    """Statements per question about people outside its chain."""

    @property
    def world(self) -> World:
        """The world that the options describe."""
        return _world(self.num_colours, self.num_names, self.distractors)

    @property
    def longest(self) -> int:
        """The most operations that names and distractors allow: `num_names - 1 - distractors`."""
        return self.world.longest

    def draw_row(self, rng: random.Random, length: int) -> dict[str, Any]:
        """Draw a story of `length + 1` colours, the last of which is the answer, regardless of split."""
        chain = self.world.draw_chain(rng, length)
        steps = list(chain.colours[:-1]) if self.steps == "values" else chain.thoughts[:-1]
        return {"question": chain.question, "steps": steps, "answer": chain.answer}

    def read_answer(self, text: str) -> str | None:
        """Return the last of the world's colours in a generated text; None if there is none."""
        words = _colour_word(self.world.colours).findall(text)
        return words[-1].lower() if words else None

    def is_correct(self, text: str, gold: str) -> bool:
        """Tell whether a generated text answers with the colour `gold`."""
        return self.read_answer(text) == gold.strip().lower()

    def answer_from(self, question: str, step: int, colour: str) -> str:
        """Return the answer to a question if the colour after `step` operations were `colour`.

        The row's `steps[t]` is the colour after `t` operations, with the root at `t = 0`. So
        `answer_from(question, t, steps[t])` is the answer, and any other colour gives the counterfactual.

        >>> question = "Finn shakes Moe's brew. Moe stirs Dan's brew. Dan's brew is blue. What colour is Finn's brew?"
        >>> [Potions().answer_from(question, step, colour) for step, colour in ((0, "blue"), (1, "plum"), (1, "red"))]
        ['blue', 'blue', 'plum']

        Args:
            question: a question of this world.
            step: number of operations done, 0 to the chain's length.
            colour: the brew's colour at that point.

        Raises:
            ValueError: the text is not a question of this world, or an argument is out of range.
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
def _colour_word(colours: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(colours)})\b", re.IGNORECASE)
