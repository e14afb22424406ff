"""Readouts of all blocks for many questions: their steps, and their states in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Templates
from rim_peft.data.tokenization import Encoder
from rim_peft.evaluation.accuracy import judge_readouts, lengths_of, question_batches
from rim_peft.evaluation.answers import AnswerReader, with_writable_answers
from rim_peft.evaluation.scores import Score, score, score_overall_and_by_length
from rim_peft.inference import read_blocks
from rim_peft.tasks import Task
from rim_peft.values import check_integer

_LEAST_GAP = 10


@dataclass(frozen=True)
class BlockReadouts:
    """The readouts of K blocks after each of N questions.

    Attributes:
        texts: N × K readouts as text, block 1 first.
        answers: N × K answers read from the texts, None where a text gives none.
        right: (N, K) whether the readout gives the right answer.
        log_probs: (N, K) float64, natural log-probability of the whole readout, EOS included.
        states: (N, K, H) float32, the last layer's state at the block's end, which the head reads.
        lengths: N numbers of reasoning steps, None where an example has none.
        num_cut: questions whose last readout did not end within ``max_new_tokens``.
        verdicts: every rule's verdict on each last readout.
    """

    texts: list[list[str]]
    answers: list[list[str | None]]
    right: NDArray[np.bool_]
    log_probs: NDArray[np.float64]
    states: Tensor
    lengths: list[int | None]
    num_cut: int = 0
    verdicts: list[dict[str, bool]] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        """K, the number of blocks."""
        return int(self.right.shape[1])

    def by_block(self) -> list[dict[int | str, Score]]:
        """Score every block, overall (``"all"``) and by number of steps."""
        return [self._scores(self.right[:, k].tolist()) for k in range(self.num_blocks)]

    def any_block(self) -> dict[int | str, Score]:
        """Score the oracle that is right if any block is, in the same form."""
        return self._scores([bool(any(row)) for row in self.right])

    def chosen(self, blocks: NDArray[np.int64]) -> dict[int | str, Score]:
        """Score one chosen block per question, given as (N,) indices from 0, in the same form."""
        return self._scores(self.right[np.arange(len(self.right)), blocks].tolist())

    def _scores(self, right: list[bool]) -> dict[int | str, Score]:
        return score_overall_and_by_length(right, self.lengths)


def collect_readouts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    *,
    templates: Templates | None = None,
    num_blocks: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: bool = False,
) -> BlockReadouts:
    """Read out every block after every question, greedily, and judge the readouts.

    Args:
        templates: prompt templates; use those that the adapter was trained with.
        num_blocks: blocks after each prompt, at least 1; by default the adapter's own number.
        max_new_tokens: maximum tokens of a readout, EOS included.
        batch_size: questions per batch; does not change what is read.

    Raises:
        ValueError: there are no examples, or as in :func:`~rim_peft.inference.read_blocks`.
    """
    if not examples:
        raise ValueError("examples: there are none to read blocks for. Check the split and the limit.")
    options: dict[str, Any] = {"templates": templates, "num_blocks": num_blocks, "max_new_tokens": max_new_tokens}
    batches = question_batches(examples, batch_size, doing="Reading blocks", progress=progress)
    rows = [row for questions in batches for row in read_blocks(model, tokenizer, questions, **options)]
    texts = [[readout.text for readout in row] for row in rows]
    examples = with_writable_answers(examples, tokenizer, task, templates)
    alone = AnswerReader(tokenizer, templates)
    answers = [[alone(text) for text in row] for row in texts]
    verdicts, right = judge_readouts(list(zip(*answers, strict=True)), examples, task)
    return BlockReadouts(
        texts=texts,
        answers=[[task.read_answer(text) for text in row] for row in answers],
        right=np.array(right, dtype=bool).T,
        log_probs=np.array([[sum(readout.token_log_probs) for readout in row] for row in rows], dtype=np.float64),
        states=torch.stack([torch.stack([readout.hidden_state for readout in row]) for row in rows]),
        lengths=lengths_of(examples),
        num_cut=sum(tokenizer.eos_token_id not in row[-1].token_ids for row in rows),
        verdicts=verdicts,
    )


def gap_closed(final: Score, any_block: Score, chosen: Score) -> float | None:
    """Return the share of the gap between final-block and any-block accuracy that a choice closes.

    >>> gap_closed(Score(40, 100), Score(60, 100), Score(50, 100))
    0.5

    Returns:
        The share; below 0 if the choice is worse than the last block; None if the gap is less than ten rows, too few
        for a share to mean anything.
    """
    gap = any_block.num_correct - final.num_correct
    return round((chosen.num_correct - final.num_correct) / gap, 6) if gap >= _LEAST_GAP else None


def judge_steps(
    readouts: BlockReadouts,
    examples: Sequence[Example],
    *,
    templates: Templates | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps_ahead: int = 1,
) -> dict[str, Any]:
    """Judge an adapter after stage 1 by its blocks' readouts.

    In a chain with ``T`` steps, block ``t`` should read out step ``t + 1`` for ``t < T``, compared as text with the
    step as written in training. From block ``T`` on it should read out the answer, compared by the task's rule.

    Args:
        readouts: readouts of the adapter after stage 1.
        examples: the same rows, with steps; rows without steps are ignored.
        templates: how steps were written in training.
        tokenizer: the model's; steps are then compared as it writes them, which may change a text. None: as they are.
        steps_ahead: 0 if blocks were trained to read out their own step, and the answer from block ``T + 1`` on.

    Returns:
        ``by_block``: for every block that has steps to read out, ``block`` and ``step_right``, the score of those;
            ``answer_right_if_steps_right`` and ``answer_right_if_a_step_wrong``: scores of the last block's answer
            among rows of at least two steps whose steps are all read out right, and among the other such rows; None if
            there are none.

    Raises:
        ValueError: no row has steps.
    """
    templates = templates or Templates()
    encoder = None if tokenizer is None else Encoder(tokenizer, templates)
    by_block: dict[int, list[bool]] = {}
    answers: dict[bool, list[bool]] = {True: [], False: []}
    for row, example in enumerate(examples):
        steps = [templates.step.format(step=step).strip() for step in example.steps or ()]
        steps = (steps if encoder is None else encoder.read_back_steps(example.steps or ()))[steps_ahead:]
        found = [readouts.texts[row][block] == step for block, step in enumerate(steps[: readouts.num_blocks])]
        for block, is_right in enumerate(found, start=1):
            by_block.setdefault(block, []).append(is_right)
        if found:
            answers[all(found)].append(bool(np.asarray(readouts.right)[row, -1]))
    if not any(example.steps for example in examples):
        raise ValueError("examples: must have steps to compare readouts with, got none. Give rows with steps.")

    def score_of(right: list[bool]) -> dict[str, float] | None:
        return score(right).to_dict() if right else None

    return {
        "stage": "grounding",
        "by_block": [{"block": block, "step_right": score_of(right)} for block, right in sorted(by_block.items())],
        "answer_right_if_steps_right": score_of(answers[True]),
        "answer_right_if_a_step_wrong": score_of(answers[False]),
    }


class BlockStates(Protocol):
    """The part of :class:`~rim_peft.evaluation.readouts.BlockReadouts` that projections need."""

    @property
    def states(self) -> Tensor:
        """(N, K, H) the last layer's states at the blocks' ends."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """(N, K) whether a block's readout is right."""

    @property
    def lengths(self) -> list[int | None]:
        """N numbers of reasoning steps, None where a row has none."""


class _Projection(NamedTuple):
    """The two directions, (2, H), with the largest variance around the (H,) mean, and their shares of it."""

    mean: Tensor
    directions: Tensor
    explained_variance: list[float]

    def points(self, states: Tensor) -> list[list[float]]:
        """Return [x, y] of (R, H) states, rounded to 6 digits."""
        found = (states.detach().cpu().double() - self.mean) @ self.directions.T
        return [[round(value, 6) for value in point] for point in found.tolist()]


def block_components(readouts: BlockStates, *, max_points: int = 400) -> dict[str, Any]:
    """Project the states at all blocks' ends onto their first two principal components.

    Args:
        readouts: states, verdicts and lengths of N questions with K blocks.
        max_points: maximum number of points returned; whole questions are skipped evenly. All states count for the
            components.

    Returns:
        ``explained_variance``, the share of the variance along x and y, and ``points``, question after question, with
        ``block`` (from 1), ``length``, ``right``, ``x`` and ``y``.

    Raises:
        ValueError: there are no states, some are not finite, or ``max_points`` is lower than K.
    """
    states = readouts.states
    projection = _fit([states])
    num_questions, num_blocks = states.shape[:2]
    check_integer("max_points", max_points, least=num_blocks)
    shown = min(num_questions, max_points // num_blocks)
    points = []
    for index in (number * num_questions // shown for number in range(shown)):
        for block, (x, y) in enumerate(projection.points(states[index]), start=1):
            right = bool(readouts.right[index, block - 1])
            points.append({"block": block, "length": readouts.lengths[index], "right": right, "x": x, "y": y})
    return {"explained_variance": projection.explained_variance, "points": points}


def training_components(checkpoints: Sequence[tuple[str, int, Tensor]]) -> dict[str, Any]:
    """Show how each block's mean state moves during training, in one projection of all checkpoints' states.

    Args:
        checkpoints: stage, step and (N, K, H) states of each; all of the same H.

    Returns:
        ``explained_variance``, the share of the variance of single states along x and y, and ``points``, checkpoint
        after checkpoint, with ``step``, ``stage``, ``block`` (from 1), ``x`` and ``y``.

    Raises:
        ValueError: there are no states, they differ in H, or some are not finite.
    """
    projection = _fit([states for _, _, states in checkpoints])
    points = []
    for stage, step, states in checkpoints:
        for block, (x, y) in enumerate(projection.points(states.double().mean(0)), start=1):
            points.append({"step": step, "stage": stage, "block": block, "x": x, "y": y})
    return {"explained_variance": projection.explained_variance, "points": points}


def _fit(parts: Sequence[Tensor]) -> _Projection:
    """Fit two principal components to all states of (N, K, H) tensors.

    The sign of a component is arbitrary: its largest entry by absolute value is made positive here.
    """
    shapes = [tuple(part.shape) for part in parts]
    if not shapes or any(len(shape) != 3 or 0 in shape for shape in shapes) or len({s[-1] for s in shapes}) > 1:
        raise ValueError(f"states: must be (N, K, H), at least one of each and of one H, got shapes {shapes}.")
    states = torch.cat([part.detach().cpu().flatten(0, 1).double() for part in parts])
    if not bool(states.isfinite().all()):
        raise ValueError("states: must be finite, got infinite ones or NaN. Check the adapter's training.")
    mean = states.mean(0)
    _, sizes, directions = torch.linalg.svd(states - mean, full_matrices=False)
    variances = sizes.square()
    total = float(variances.sum())
    shares = [round(float(variance) / total, 6) if total > 0 else 0.0 for variance in variances[:2]]
    # A single state, or states of one dimension, have no second component: y is 0.
    kept = torch.zeros(2, states.shape[1], dtype=states.dtype)
    kept[: len(shares)] = directions[:2]
    largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
    return _Projection(mean, torch.where(largest < 0, -kept, kept), [*shares, 0.0][:2])
