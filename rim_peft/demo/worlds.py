"""What the generated tasks' stories are to a base: their words, the samples drawn from them, and what counts there."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

from rim_peft.data.tasks import ontology_world, potions_world
from rim_peft.data.tasks.answers import exact_text
from rim_peft.data.tasks.potions import Potions
from rim_peft.demo.pretraining import Pretraining

NOTHING = "thing"
"""Stands in a chain of thought for a kind that is left unsaid."""


@dataclass(frozen=True)
class PotionsBase(Pretraining[potions_world.Chain]):
    """A base for ``potions``; the defaults made the one that is shipped.

    >>> PotionsBase(direct=0.0).draw_sample(random.Random(3), unsaid=0.5)[1]
    'Liv, Pam, Jon green, Hal blue'
    """

    task: ClassVar[str] = "potions"
    pattern: ClassVar[str] = r"What colour is|\w+'s brew is|\w+'s brew[.?]|\w+:?|[^\w\s]"

    num_colours: int = field(default=5, metadata={"help": "colours of the world, a prime"})
    num_names: int = field(default=16, metadata={"help": "people of the world"})
    distractors: int = field(default=0, metadata={"help": "statements about people who do not matter"})

    @cached_property
    def world(self) -> potions_world.World:
        """The world that stories are drawn from."""
        return potions_world.World(self.num_colours, self.num_names, self.distractors)

    @property
    def words(self) -> list[str]:
        """Colours, verbs, and the forms that a name takes."""
        forms = [name + ending for ending in ("", "'s brew.", "'s brew is", "'s brew?") for name in self.world.names]
        return ["What colour is", *self.world.colours, *self.world.verbs, *forms]

    @property
    def results(self) -> list[str]:
        """The colours."""
        return list(self.world.colours)

    def draw_story(self, rng: random.Random, length: int) -> potions_world.Chain:
        """Draw a story of `length` operations, whatever its split."""
        return self.world.draw_chain(rng, length)

    def write_chain(self, rng: random.Random, story: potions_world.Chain, *, unsaid: float) -> str:
        """Return every brew's owner and its colour; a colour that is left unsaid leaves the owner alone."""
        *earlier, last = story.thoughts
        return ", ".join([*(one.split()[0] if rng.random() < unsaid else one for one in earlier), last])

    def is_right(self, text: str, gold: str) -> bool:
        """Tell whether the last colour of a text is the right one."""
        return Potions(**asdict(self.world), lengths=(1,)).is_correct(text, gold)


@dataclass(frozen=True)
class OntologyBase(Pretraining[ontology_world.Story]):
    r"""A base for ``ontology``, with chains of thought as in ProsQA: a statement a line, the answer on the last.

    A kind on the way that is left unsaid is a *thing* in both statements that name it, so that what is left out must be
    kept in mind, and each statement has as many tokens as before.

    >>> OntologyBase(direct=0.0, max_length=4).draw_sample(random.Random(3), unsaid=0.5)[1].split("\n")
    ['Tom is a fompus.', 'Every fompus is a thing.', 'Every thing is a rompus.', 'Tom is a rompus.']
    """

    task: ClassVar[str] = "ontology"
    pattern: ClassVar[str] = r"Every \w+ is a|\w+ is a|Is \w+ a|\w+ or|\w+[.?:]|\n"

    max_length: int = field(default=6, metadata={"help": "statements of the longest chain of thought"})
    num_kinds: int = field(default=20, metadata={"help": "kinds in a question"})
    num_statements: int = field(default=36, metadata={"help": "statements in a question, at the most"})
    num_people: int = field(default=3, metadata={"help": "people in a question, at the most"})

    @cached_property
    def world(self) -> ontology_world.World:
        """The world that stories are drawn from."""
        return ontology_world.World(self.num_kinds, self.num_statements, self.num_people)

    @property
    def words(self) -> list[str]:
        """The forms that a name and a kind take."""
        names, kinds = ontology_world.NAMES, (*ontology_world.KINDS, NOTHING)
        of_names = [form.format(name) for form in ("{} is a", "Is {} a") for name in names]
        of_kinds = [form.format(kind) for form in ("Every {} is a", "{}.", "{} or", "{}?") for kind in kinds]
        return ["\n", *of_names, *of_kinds]

    @property
    def results(self) -> list[str]:
        """The kinds as they end a statement."""
        return [f"{kind}." for kind in ontology_world.KINDS]

    def draw_story(self, rng: random.Random, length: int) -> ontology_world.Story:
        """Draw a story of `length` steps, whatever its split."""
        return self.world.draw_story(rng, length)

    def write_chain(self, rng: random.Random, story: ontology_world.Story, *, unsaid: float) -> str:
        """Return the statements on the way and what follows."""
        person, *between, right = story.path
        said = [person, *(NOTHING if rng.random() < unsaid else kind for kind in between), right]
        steps = [ontology_world.state(subject, kind) for subject, kind in pairwise(said)]
        return "\n".join([*steps, story.answer])

    def is_right(self, text: str, gold: str) -> bool:
        """Tell whether the last line of a text is the right statement."""
        return exact_text(text.rpartition("\n")[2]) == exact_text(gold)


BASES: dict[str, type[Pretraining[Any]]] = {kind.task: kind for kind in (PotionsBase, OntologyBase)}
"""Tasks that a base can be made for."""
