"""The demo's generated task: which colour a brew has after a chain of kitchen work.

Five colours lie on a ring and every verb is one affine map of that ring, so neither the order of the verbs nor
any single statement can be ignored. The statements stand in reverse order, the brew to ask for first and the known
colour last, so that no running value can be carried along the words of the question:

    Tom boils Kim's brew. Kim salts Pam's brew. Pam's brew is red. What colour is Tom's brew?

What a verb does is never said. It is what a model trained on this world knows, as others know that 7 x 8 is 56.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Literal

from rim_peft.data.tasks.task import GeneratedTask

COLOURS = ("red", "gold", "green", "blue", "plum")
"""The ring: colour `c` is the number `c` modulo five."""

VERBS: dict[str, tuple[int, int]] = {
    "stirs": (1, 1),
    "salts": (1, 2),
    "cools": (1, 3),
    "shakes": (1, 4),
    "boils": (2, 0),
    "sieves": (3, 0),
    "burns": (4, 0),
}
"""Verb to `(factor, shift)`: the brew's number `c` becomes `(factor * c + shift) % 5`."""

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eve",
    "Finn",
    "Gus",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Liv",
    "Moe",
    "Nell",
    "Pam",
    "Tom",
)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_COLOUR_WORD = re.compile(rf"\b(?:{'|'.join(COLOURS)})\b", re.IGNORECASE)


def apply_verb(verb: str, colour: str) -> str:
    """Return the colour that `verb` turns `colour` into.

    >>> apply_verb("stirs", "red"), apply_verb("boils", "plum")
    ('gold', 'blue')
    """
    factor, shift = VERBS[verb]
    return COLOURS[(factor * COLOURS.index(colour) + shift) % len(COLOURS)]


def split_of(question: str) -> Split:
    """Return the split a question belongs to: 90 % train, 5 % validation, 5 % test, by a hash of its text.

    A question has one text and a text has one split, so no question is ever in two splits, whatever the seeds.

    >>> split_of("Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?")
    'train'
    """
    bucket = hashlib.blake2b(question.encode(), digest_size=2).digest()
    twentieth = int.from_bytes(bucket, "big") % 20
    return {0: SPLITS[1], 1: SPLITS[2]}.get(twentieth, SPLITS[0])


def read_answer(text: str) -> str | None:
    """Return the last colour named in a generated text, or None where it names none.

    >>> read_answer("Kim red, Tom gold"), read_answer("Tom")
    ('gold', None)
    """
    words = _COLOUR_WORD.findall(text)
    return words[-1].lower() if words else None


def is_correct(text: str, gold: str) -> bool:
    """Tell whether a generated text answers with the colour `gold`.

    >>> is_correct(" Gold", "gold"), is_correct("blue", "gold")
    (True, False)
    """
    return read_answer(text) == gold.strip().lower()


@dataclass(frozen=True)
class Chain:
    """One story before it is written down: person 0's brew has colour 0, person `t` makes hers from that of `t - 1`."""

    people: tuple[str, ...]
    verbs: tuple[str, ...]
    colours: tuple[str, ...]

    @property
    def question(self) -> str:
        """The statements, last operation first, then the question."""
        links = zip(self.people[1:], self.verbs, self.people[:-1], strict=True)
        lines = [f"{person} {verb} {source}'s brew." for person, verb, source in links]
        root = f"{self.people[0]}'s brew is {self.colours[0]}."
        return " ".join([*reversed(lines), root, f"What colour is {self.people[-1]}'s brew?"])

    @property
    def thoughts(self) -> list[str]:
        """Every brew with its colour, from the root to the answer, as the base model writes them."""
        return [f"{person} {colour}" for person, colour in zip(self.people, self.colours, strict=True)]


def draw_chain(rng: random.Random, length: int) -> Chain:
    """Draw a story of `length` operations.

    >>> draw_chain(random.Random(0), 1).question
    "Tom burns Moe's brew. Moe's brew is red. What colour is Tom's brew?"
    """
    people = tuple(rng.sample(NAMES, length + 1))
    verbs = tuple(rng.choices(tuple(VERBS), k=length))
    colours = [rng.choice(COLOURS)]
    for verb in verbs:
        colours.append(apply_verb(verb, colours[-1]))
    return Chain(people, verbs, tuple(colours))


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
    answer_rule = "exact-word"

    lengths: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of operations to draw from: as many dependent steps has a question."""
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

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option is out of range.
        """
        super().__post_init__()
        longest = len(NAMES) - 1
        if not self.lengths or not all(1 <= length <= longest for length in self.lengths):
            raise ValueError(f"lengths: must hold numbers of steps from 1 to {longest}, got {self.lengths!r}.")
        if self.weights is not None and (len(self.weights) != len(self.lengths) or not sum(self.weights) > 0):
            raise ValueError(
                f"weights: must hold a weight for each of the {len(self.lengths)} lengths, not all 0, got "
                f"{self.weights!r}."
            )
        if self.num_rows < 1 or self.num_held_out < 1:
            raise ValueError(f"num_rows, num_held_out: must be at least 1, got {self.num_rows}, {self.num_held_out}.")

    def row(self, index: int) -> dict[str, Any]:
        """Return candidate `index`, whatever its split: `length + 1` colours, of which the last is the answer."""
        rng = random.Random(f"potions {self.seed} {index}")
        length = rng.choices(self.lengths, self.weights)[0]
        chain = draw_chain(rng, length)
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
        """Return the last colour named in a generated text, or None where it names none."""
        return read_answer(text)

    def is_correct(self, text: str, gold: str) -> bool:
        """Tell whether a generated text answers with the colour `gold`."""
        return is_correct(text, gold)
