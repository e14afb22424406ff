"""Which question gets whose blocks: pairs of equally long prompts with different answers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from rim_peft.data.examples import Example
from rim_peft.data.tasks import Task

Counterfactual = Callable[[Example, Example, int], str | None]
"""``f(a, b, t)``: the answer to question ``a`` if its ``steps[t]`` were that of ``b``."""


@runtime_checkable
class ChainTask(Protocol):
    """A task whose questions are chains of operations on one value, as :class:`~rim_peft.data.tasks.Potions`."""

    def read_answer(self, text: str) -> str | None:
        """Return the value that a step or an answer names."""

    def is_correct(self, text: str, gold: str) -> bool:
        """Tell whether a text names the value ``gold``."""

    def answer_from(self, question: str, step: int, value: str, /) -> str:
        """Return a question's answer if its value after ``step`` operations were another."""


@dataclass(frozen=True)
class ChainCounterfactual:
    """The answer that is right where a question's first blocks hold another question's values.

    A chain's ``steps[t]`` is the value after ``t`` operations, and grounding puts it into block ``t`` (block ``t + 1``
    where blocks read out their own step). With the blocks of ``donor`` up to that one, the answer is what the
    question's operations from ``t + 1`` on make of the donor's ``steps[t]``. Where that is the donor's own answer too,
    the pair is refused: following could not be told from copying.
    """

    task: ChainTask

    def __call__(self, example: Example, donor: Example, step: int) -> str | None:
        """Return the answer to ``example`` if it went on from ``donor.steps[step]``, None where the two will not do."""
        steps = donor.steps or ()
        value = self.task.read_answer(steps[step]) if step < len(steps) else None
        if value is None or not isinstance(example.question, str):
            return None
        implied = self.task.answer_from(example.question, step, value)
        return None if self.task.is_correct(implied, donor.answer) else implied


@dataclass(frozen=True)
class Pair:
    """A question, the one whose blocks it gets, and the answer that these imply."""

    example: Example
    donor: Example
    implied: str


def pair_examples(
    examples: Sequence[Example],
    groups: Sequence[Hashable],
    imply: Callable[[Example, Example], str | None],
    *,
    seed: int,
) -> list[Pair]:
    """Give each example a donor of its own group; those without one are left out.

    An example's donor is the first that will do among those behind it in a random order, from the end on to the
    beginning, so that most examples serve as donors.

    Args:
        examples: the examples.
        groups: each example's group, such as its prompt's length.
        imply: ``f(example, donor)``, the answer that the donor's blocks imply, None where the two will not do.
        seed: decides on the order.

    Returns:
        Pairs in the examples' order.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in random.Random(f"pairs {seed}").sample(range(len(examples)), len(examples)):
        members[groups[index]].append(index)
    found: dict[int, Pair] = {}
    for group in members.values():
        for place, index in enumerate(group):
            for other in [*group[place + 1 :], *group[:place]]:
                implied = imply(examples[index], examples[other])
                if implied is not None:
                    found[index] = Pair(examples[index], examples[other], implied)
                    break
    return [found[index] for index in sorted(found)]


def plan_swaps(
    examples: Sequence[Example],
    lengths: Sequence[int],
    task: Task,
    *,
    num_blocks: int,
    seed: int,
    counterfactual: Counterfactual | None,
    steps_ahead: int = 1,
) -> dict[int | None, list[Pair]]:
    """Pair examples for a swap of all blocks and, with ``counterfactual``, of the first 1, 2, … ``num_blocks - 1``.

    Args:
        examples: the examples.
        lengths: tokens in each example's prompt.
        task: compares answers; the two of a pair have different ones.
        num_blocks: the adapter's blocks.
        seed: decides who is paired with whom.
        counterfactual: as in :func:`~rim_peft.evaluation.controls.run_controls`.
        steps_ahead: block ``t`` holds ``steps[t]`` with 1, ``steps[t - 1]`` with 0.

    Returns:
        The pairs, maybe none, by the number of blocks swapped, None for all of them.
    """

    def imply(example: Example, donor: Example, *, count: int | None) -> str | None:
        if count is None or counterfactual is None:
            return None if task.is_correct(donor.answer, example.answer) else donor.answer
        step = held(count)
        if (example.steps or ())[step] == (donor.steps or ())[step] or task.is_correct(donor.answer, example.answer):
            return None
        implied = counterfactual(example, donor, step)
        # An answer that is right anyway cannot tell whether the model follows.
        return None if implied is None or task.is_correct(implied, example.answer) else implied

    def held(count: int) -> int:
        """Return which step the last of so many blocks holds."""
        return count - 1 + steps_ahead

    def pair(count: int | None) -> list[Pair]:
        # A chain that is too short has no partner: it would be compared with all others in vain.
        rows = [row for row, example in enumerate(examples) if count is None or held(count) < len(example.steps or ())]
        groups = [(lengths[row], None if count is None else len(examples[row].steps or ())) for row in rows]
        return pair_examples([examples[row] for row in rows], groups, partial(imply, count=count), seed=seed)

    counts = [None, *(range(1, num_blocks) if counterfactual is not None else ())]
    return {count: pair(count) for count in counts}
