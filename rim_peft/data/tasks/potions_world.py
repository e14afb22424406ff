"""The world of the task ``potions``: its colours, verbs and names, and stories of any difficulty in it.

The demo's world has five colours, seven verbs and sixteen names. A larger one keeps these words and adds others, so
that every verb does the same work in every world that has it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)
"""How many colours a ring can have: with a prime number of them every factor permutes them."""

# fmt: off
_COLOUR_WORDS = (
    "red", "gold", "green", "blue", "plum", "teal", "rust", "lime", "navy", "rose", "amber", "coral", "olive",
    "beige", "mauve", "black", "white", "brown", "pink", "grey", "cyan", "tan", "jade",
)

_SHIFT_WORDS = (
    "stirs", "salts", "cools", "shakes", "heats", "dries", "soaks", "peels", "chops", "mixes", "rinses", "skims",
    "folds", "beats", "bakes", "fries", "grills", "steams", "thaws", "smokes", "drains", "tosses",
)
"""The verb that adds 1, the one that adds 2, ..."""

_FACTOR_WORDS = (
    "boils", "sieves", "burns", "whisks", "mashes", "blends", "grinds", "presses", "strains", "kneads", "rolls",
    "melts", "roasts", "toasts", "pickles", "glazes", "stews", "brews", "ferments", "churns", "chills",
)
"""The verb that multiplies by 2, the one that multiplies by 3, ..."""

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
    """One story before it is written down: person 0's brew has colour 0, person `t` makes hers from that of `t - 1`.

    ``distractors`` holds statements about other people, each with its place among all statements.
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
        """Every brew with its colour, from the root to the answer, as the base model writes them."""
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
        distractors: statements in every story about people outside its chain: a known colour, and brews made from one
            another, all with a maker and a colour of their own.

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
        """The ring: colour `c` is the number `c` modulo its length."""
        return _COLOUR_WORDS[: self.num_colours]

    @cached_property
    def verbs(self) -> dict[str, tuple[int, int]]:
        """Verb to `(factor, shift)`: the brew's number `c` becomes `(factor * c + shift) % num_colours`."""
        shifts = {_SHIFT_WORDS[shift - 1]: (1, shift) for shift in range(1, self.num_colours)}
        return shifts | {_FACTOR_WORDS[factor - 2]: (factor, 0) for factor in range(2, self.num_colours)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The people, the demo's first, then two syllables each."""
        syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
        made = ("".join(pair).capitalize() for pair in product(syllables, syllables))
        taken = {*NAMES, *(word.capitalize() for word in (*_COLOUR_WORDS, *_SHIFT_WORDS, *_FACTOR_WORDS))}
        new = [name for name in made if name not in taken][: max(0, self.num_names - len(NAMES))]
        return (*NAMES, *new)[: self.num_names]

    @property
    def longest(self) -> int:
        """The most operations that a story can have: one name for each and one for the root remain."""
        return self.num_names - 1 - self.distractors

    @property
    def words(self) -> list[str]:
        """All words that differ between worlds: colours, verbs, names."""
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
        """Draw a statement about each of `others` and its place; as in the chain, who is made from whom comes first."""
        if not others:
            return ()
        statements = [f"{others[0]}'s brew is {rng.choice(self.colours)}."]
        for number, person in enumerate(others[1:], start=1):
            statements.append(f"{person} {rng.choice(tuple(self.verbs))} {others[rng.randrange(number)]}'s brew.")
        places = sorted(rng.sample(range(num_statements + len(others)), len(others)))
        return tuple(zip(places, reversed(statements), strict=True))

    def read_verbs(self, question: str) -> tuple[str, ...]:
        """Return the verbs on the way from the root to the brew that a question asks for, in the order of their work.

        Raises:
            ValueError: the text is no question of this world.
        """
        asked = _ASKED.search(question)
        made = {person: (verb, source) for person, verb, source in _STATEMENT.findall(question)}
        person = asked[1] if asked else ""
        verbs: list[str] = []
        while person in made and len(verbs) < len(made):
            verb, person = made[person]
            verbs.append(verb)
        if not asked or f"{person}'s brew is " not in question or not set(verbs) <= set(self.verbs):
            raise ValueError(f"question: must be one of this world of {self.num_colours} colours, got {question!r}.")
        return tuple(reversed(verbs))
