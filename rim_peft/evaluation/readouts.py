"""Everything that is known about a model's blocks on some examples: what the other measures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Templates
from rim_peft.data.tasks import Task
from rim_peft.evaluation.accuracy import Score, score_overall_and_by_length, with_writable_answers
from rim_peft.inference import read_blocks

_LEAST_GAP = 10


@dataclass(frozen=True)
class BlockReadouts:
    """The readouts of K blocks after each of N questions.

    Attributes:
        texts: N × K readouts as text, block 1 first.
        answers: N × K answers that the texts give, None where one gives none.
        right: (N, K) whether the readout gives the right answer.
        log_probs: (N, K) float64, natural logarithm of the probability of the whole readout, EOS included.
        states: (N, K, H) float32, the last layer's state at the block's end, which the head reads.
        lengths: N numbers of reasoning steps, None where an example has none.
        num_cut: questions whose last readout had not ended within ``max_new_tokens``.
    """

    texts: list[list[str]]
    answers: list[list[str | None]]
    right: NDArray[np.bool_]
    log_probs: NDArray[np.float64]
    states: Tensor
    lengths: list[int | None]
    num_cut: int = 0

    @property
    def num_blocks(self) -> int:
        """K."""
        return int(self.right.shape[1])

    def by_block(self) -> list[dict[int | str, Score]]:
        """Score every block, overall (``"all"``) and by number of steps."""
        return [self._scores(self.right[:, k].tolist()) for k in range(self.num_blocks)]

    def any_block(self) -> dict[int | str, Score]:
        """Score the oracle that is right where some block is, in the same form."""
        return self._scores([bool(any(row)) for row in self.right])

    def chosen(self, blocks: NDArray[np.int64]) -> dict[int | str, Score]:
        """Score one block for each question, given as (N,) indices from 0, in the same form."""
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
    """Read out every block after every question, greedily, and judge what is read.

    Args:
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer.
        examples: at least one.
        task: reads and compares answers.
        templates: how prompts are written; the ones that the adapter was trained with.
        num_blocks: blocks after each prompt, at least 1; the adapter's own if not given.
        max_new_tokens: tokens of a readout at most, EOS included.
        batch_size: questions at a time; it does not change what is read.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: there are no examples, or as :func:`~rim_peft.inference.read_blocks`.
    """
    if not examples:
        raise ValueError("examples: there are none to read blocks for. Check the split and the limit.")
    options: dict[str, Any] = {"templates": templates, "num_blocks": num_blocks, "max_new_tokens": max_new_tokens}
    rows = []
    with tqdm(total=len(examples), desc="Reading blocks", unit="row", disable=not progress) as bar:
        for start in range(0, len(examples), batch_size):
            questions = [example.question for example in examples[start : start + batch_size]]
            rows.extend(read_blocks(model, tokenizer, questions, **options))
            bar.update(len(questions))
    texts = [[readout.text for readout in row] for row in rows]
    examples = with_writable_answers(examples, tokenizer, task, templates)
    right = [
        [task.is_correct(text, example.answer) for text in row] for row, example in zip(texts, examples, strict=True)
    ]
    return BlockReadouts(
        texts=texts,
        answers=[[task.read_answer(text) for text in row] for row in texts],
        right=np.array(right, dtype=bool),
        log_probs=np.array([[sum(readout.token_log_probs) for readout in row] for row in rows], dtype=np.float64),
        states=torch.stack([torch.stack([readout.hidden_state for readout in row]) for row in rows]),
        lengths=[len(example.steps) if example.steps else None for example in examples],
        num_cut=sum(tokenizer.eos_token_id not in row[-1].token_ids for row in rows),
    )


def gap_closed(final: Score, any_block: Score, chosen: Score) -> float | None:
    """Return which share of the gap between final-block and any-block accuracy a choice closes.

    >>> gap_closed(Score(40, 100), Score(60, 100), Score(50, 100))
    0.5

    Returns:
        The share; below 0 where the choice loses against the last block; None where the gap is below ten rows, of which
        shares say nothing.
    """
    gap = any_block.num_correct - final.num_correct
    return round((chosen.num_correct - final.num_correct) / gap, 6) if gap >= _LEAST_GAP else None
