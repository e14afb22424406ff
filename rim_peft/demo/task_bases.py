"""Bases of the generated tasks: each task's words, stories and chains."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

from rim_peft.demo.pretraining import Pretraining
from rim_peft.tasks import ontology, potions
from rim_peft.tasks.answers import exact_text
from rim_peft.tasks.potions import Potions

NOTHING = "thing"
"""Replaces an omitted kind in a chain of thought."""


@dataclass(frozen=True)
class PotionsBase(Pretraining[potions.Chain]):
    """A base for ``potions``; the defaults made the shipped one.

    >>> PotionsBase(direct=0.0).draw_sample(random.Random(3), unsaid=0.5)[1]
    'Liv, Pam, Jon green, Hal blue'
    """

    task: ClassVar[str] = "potions"
    pattern: ClassVar[str] = r"What colour is|\w+'s brew is|\w+'s brew[.?]|\w+:?|[^\w\s]"

    num_colours: int = field(default=5, metadata={"help": "colours of the world, a prime"})
    num_names: int = field(default=16, metadata={"help": "people of the world"})
    distractors: int = field(default=0, metadata={"help": "statements about people irrelevant to the question"})

    @cached_property
    def world(self) -> potions.World:
        """The world that stories are drawn from."""
        return potions.World(self.num_colours, self.num_names, self.distractors)

    @property
    def words(self) -> list[str]:
        """Colours, verbs, and the forms of a name."""
        forms = [name + ending for ending in ("", "'s brew.", "'s brew is", "'s brew?") for name in self.world.names]
        return ["What colour is", *self.world.colours, *self.world.verbs, *forms]

    @property
    def results(self) -> list[str]:
        """The colours."""
        return list(self.world.colours)

    def draw_story(self, rng: random.Random, length: int) -> potions.Chain:
        """Draw a story of `length` operations from any split."""
        return self.world.draw_chain(rng, length)

    def write_chain(self, rng: random.Random, story: potions.Chain, *, unsaid: float) -> str:
        """Return every brew's owner and colour; an omitted colour leaves only the owner."""
        *earlier, last = story.thoughts
        return ", ".join([*(one.split()[0] if rng.random() < unsaid else one for one in earlier), last])

    def is_right(self, text: str, gold: str) -> bool:
        """Return whether the last colour of a text is the right one."""
        return Potions(**asdict(self.world), lengths=(1,)).is_correct(text, gold)


@dataclass(frozen=True)
class OntologyBase(Pretraining[ontology.Story]):
    r"""A base for ``ontology``, with chains of thought as in ProsQA: one statement per line, the answer on the last.

    An omitted intermediate kind is a *thing* in both statements that name it, so that it must be remembered, and each
    statement keeps its number of tokens.

    >>> OntologyBase(direct=0.0, max_length=4).draw_sample(random.Random(3), unsaid=0.5)[1].split("\n")
    ['Tom is a fompus.', 'Every fompus is a thing.', 'Every thing is a rompus.', 'Tom is a rompus.']
    """

    task: ClassVar[str] = "ontology"
    pattern: ClassVar[str] = r"Every \w+ is a|\w+ is a|Is \w+ a|\w+ or|\w+[.?:]|\n"

    max_length: int = field(default=6, metadata={"help": "statements of the longest chain of thought"})
    num_kinds: int = field(default=20, metadata={"help": "kinds in a question"})
    num_statements: int = field(default=36, metadata={"help": "maximum statements in a question"})
    num_people: int = field(default=3, metadata={"help": "maximum people in a question"})

    @cached_property
    def world(self) -> ontology.World:
        """The world that stories are drawn from."""
        return ontology.World(self.num_kinds, self.num_statements, self.num_people)

    @property
    def words(self) -> list[str]:
        """The forms of a name and a kind."""
        names, kinds = ontology.NAMES, (*ontology.KINDS, NOTHING)
        of_names = [form.format(name) for form in ("{} is a", "Is {} a") for name in names]
        of_kinds = [form.format(kind) for form in ("Every {} is a", "{}.", "{} or", "{}?") for kind in kinds]
        return ["\n", *of_names, *of_kinds]

    @property
    def results(self) -> list[str]:
        """The kinds as they end a statement."""
        return [f"{kind}." for kind in ontology.KINDS]

    def draw_story(self, rng: random.Random, length: int) -> ontology.Story:
        """Draw a story of `length` steps from any split."""
        return self.world.draw_story(rng, length)

    def write_chain(self, rng: random.Random, story: ontology.Story, *, unsaid: float) -> str:
        """Return the intermediate statements and the conclusion."""
        person, *between, right = story.path
        said = [person, *(NOTHING if rng.random() < unsaid else kind for kind in between), right]
        steps = [ontology.state(subject, kind) for subject, kind in pairwise(said)]
        return "\n".join([*steps, story.answer])

    def is_right(self, text: str, gold: str) -> bool:
        """Return whether the last line of a text is the right statement."""
        return exact_text(text.rpartition("\n")[2]) == exact_text(gold)


BASES: dict[str, type[Pretraining[Any]]] = {kind.task: kind for kind in (PotionsBase, OntologyBase)}
"""Tasks that a base can be made for."""
