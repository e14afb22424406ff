"""Which question gets whose blocks: pairs of equally long prompts with different answers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rim_peft.data.examples import Example
from rim_peft.data.tasks import Task

Counterfactual = Callable[[Example, Example, int], str | None]
"""``f(a, b, t)``: the answer to question ``a`` if what its block ``t`` holds were what block ``t`` of ``b`` holds."""


@dataclass(frozen=True)
class Pair:
    """A question, the one whose blocks it gets, and the answer that these imply."""

    example: Example
    donor: Example
    implied: str


def pair_examples(
    examples: Sequence[Example],
    lengths: Sequence[int],
    imply: Callable[[Example, Example], str | None],
    *,
    seed: int,
) -> list[Pair]:
    """Give each example a donor among those whose prompt is as long; those without one are left out.

    An example's donor is the first that will do among those behind it in a random order, from the end on to the
    beginning, so that most examples serve as donors.

    Args:
        examples: the examples.
        lengths: tokens in each example's prompt.
        imply: ``f(example, donor)``, the answer that the donor's blocks imply, None where the two will not do.
        seed: decides on the order.

    Returns:
        Pairs in the examples' order.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index in random.Random(f"pairs {seed}").sample(range(len(examples)), len(examples)):
        groups[lengths[index]].append(index)
    found: dict[int, Pair] = {}
    for group in groups.values():
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
) -> dict[int | None, list[Pair]]:
    """Pair examples for a swap of all blocks and, with ``counterfactual``, of the first 1, 2, … ``num_blocks - 1``.

    Args:
        examples: the examples.
        lengths: tokens in each example's prompt.
        task: compares answers; the two of a pair have different ones.
        num_blocks: the adapter's blocks.
        seed: decides who is paired with whom.
        counterfactual: as in :func:`~rim_peft.evaluation.controls.run_controls`.

    Returns:
        The pairs, maybe none, by the number of blocks swapped, None for all of them.
    """

    def imply(example: Example, donor: Example, *, count: int | None) -> str | None:
        if task.is_correct(donor.answer, example.answer):
            return None
        if count is None or counterfactual is None:
            return donor.answer
        steps, others = example.steps or (), donor.steps or ()
        if not count < len(steps) == len(others) or steps[count] == others[count]:
            return None
        implied = counterfactual(example, donor, count)
        # An answer that is right anyway cannot tell whether the model follows.
        return None if implied is None or task.is_correct(implied, example.answer) else implied

    counts = [None, *(range(1, num_blocks) if counterfactual is not None else ())]
    return {count: pair_examples(examples, lengths, partial(imply, count=count), seed=seed) for count in counts}
