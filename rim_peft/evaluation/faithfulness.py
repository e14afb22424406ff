"""Whether blocks read out the steps that stage 1 taught them, and whether wrong steps go with wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rim_peft.data.examples import Example, Templates
from rim_peft.evaluation.accuracy import Score
from rim_peft.evaluation.readouts import BlockReadouts


def judge_steps(
    readouts: BlockReadouts, examples: Sequence[Example], *, templates: Templates | None = None, steps_ahead: int = 1
) -> dict[str, Any]:
    """Judge an adapter after stage 1 by its blocks' readouts.

    Block ``t`` of a chain with ``T`` steps should read out step ``t + 1`` for ``t < T``, compared as text with the step
    as training wrote it, and from block ``T`` on the answer, compared by the task's rule.

    Args:
        readouts: of the adapter after stage 1.
        examples: the same rows, with steps; rows without any are left out.
        templates: how steps were written in training.
        steps_ahead: 0 if blocks were trained to read out their own step, and the answer from block ``T + 1`` on.

    Returns:
        ``by_block``: for every block that has steps to read out, ``block`` and ``step_right``, the score of those;
        ``answer_right_if_steps_right`` and ``answer_right_if_a_step_wrong``: scores of the last block's answer among
        rows of at least two steps whose steps are all read out right, and among the others; None where there are none.

    Raises:
        ValueError: no row has steps.
    """
    templates = templates or Templates()
    by_block: dict[int, list[bool]] = {}
    answers: dict[bool, list[bool]] = {True: [], False: []}
    for row, example in enumerate(examples):
        steps = [templates.step.format(step=step).strip() for step in example.steps or ()][steps_ahead:]
        found = [readouts.texts[row][block] == step for block, step in enumerate(steps[: readouts.num_blocks])]
        for block, is_right in enumerate(found, start=1):
            by_block.setdefault(block, []).append(is_right)
        if found:
            answers[all(found)].append(bool(np.asarray(readouts.right)[row, -1]))
    if not any(example.steps for example in examples):
        raise ValueError("examples: must have steps to compare readouts with, none has any.")

    def score_of(right: list[bool]) -> dict[str, float] | None:
        return Score(sum(right), len(right)).to_dict() if right else None

    return {
        "stage": "grounding",
        "by_block": [{"block": block, "step_right": score_of(right)} for block, right in sorted(by_block.items())],
        "answer_right_if_steps_right": score_of(answers[True]),
        "answer_right_if_a_step_wrong": score_of(answers[False]),
    }
