"""Pairs of questions whose blocks are swapped: who gives blocks to whom, and which answer these imply."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from rim_peft.data.examples import Example
from rim_peft.tasks import Task

Counterfactual = Callable[[Example, Example, int], str | None]
"""``f(a, b, t)``: the answer to question ``a`` if its ``steps[t]`` were ``b``'s."""


@dataclass(frozen=True)
class Pair:
    """A question, the donor of its blocks, and the answer that these blocks imply."""

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
    """Give each example a donor from its own group, and drop those without one.

    In a random order, an example's donor is the first suitable one after it, continuing from the start: so most
    examples serve as donors.

    Args:
        groups: each example's group, such as its prompt's length.
        imply: ``f(example, donor)``, the answer that the donor's blocks imply, None for an unsuitable pair.

    Returns:
        Pairs in the order of the examples.
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
        lengths: tokens of each example's prompt.
        task: compares answers; the two examples of a pair have different ones.
        counterfactual: as in :func:`~rim_peft.evaluation.controls.run_controls`.
        steps_ahead: block ``t`` holds ``steps[t]`` with 1, ``steps[t - 1]`` with 0.

    Returns:
        The pairs, maybe none, by the number of blocks swapped (None: all).
    """

    def imply(example: Example, donor: Example, *, count: int | None) -> str | None:
        own = task.about(example.question)
        if count is None or counterfactual is None:
            return None if own.is_correct(donor.answer, example.answer) else donor.answer
        step = held(count)
        if (example.steps or ())[step] == (donor.steps or ())[step] or own.is_correct(donor.answer, example.answer):
            return None
        implied = counterfactual(example, donor, step)
        # An answer that is correct anyway cannot show whether the model follows the blocks.
        return None if implied is None or own.is_correct(implied, example.answer) else implied

    def held(count: int) -> int:
        """Return which step the last of ``count`` blocks holds."""
        return count - 1 + steps_ahead

    def pair(count: int | None) -> list[Pair]:
        # A chain that is too short has no partner; skip it rather than compare it with all others.
        rows = [row for row, example in enumerate(examples) if count is None or held(count) < len(example.steps or ())]
        groups = [(lengths[row], None if count is None else len(examples[row].steps or ())) for row in rows]
        return pair_examples([examples[row] for row in rows], groups, partial(imply, count=count), seed=seed)

    counts = [None, *(range(1, num_blocks) if counterfactual is not None else ())]
    return {count: pair(count) for count in counts}
