"""Do the blocks matter? Answers under interventions on them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Templates
from rim_peft.data.tokenization import tokenize_prompts
from rim_peft.evaluation.accuracy import are_right, lengths_of
from rim_peft.evaluation.answers import AnswerReader, with_writable_answers
from rim_peft.evaluation.pairs import Counterfactual, Pair, plan_swaps
from rim_peft.evaluation.scores import Score, score, score_by_length
from rim_peft.inference import answer_questions
from rim_peft.inference.swapping import answer_with_memory_ids, answer_with_swapped_blocks, check_swaps, random_rows
from rim_peft.tasks import Task
from rim_peft.tuner.config import active_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Control:
    """The answers under one intervention on the blocks.

    Attributes:
        name: the intervention's short name.
        description: what was done, in one line.
        accuracy: score of the answers against the questions' own gold answers.
        by_length: the same by number of reasoning steps; rows without steps are not counted.
        follows: if the blocks came from another question, score of the answers against what those blocks imply.
    """

    name: str
    description: str
    accuracy: Score
    by_length: dict[int, Score]
    follows: Score | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {
            "name": self.name,
            "description": self.description,
            "accuracy": self.accuracy.to_dict(),
            "by_length": {str(length): score.to_dict() for length, score in self.by_length.items()},
            "follows": None if self.follows is None else self.follows.to_dict(),
        }


def run_controls(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    *,
    templates: Templates | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    counterfactual: Counterfactual | None = None,
    steps_ahead: int = 1,
    progress: bool = False,
) -> list[Control]:
    """Answer questions under interventions on the blocks: the more accuracy drops, the more the blocks matter.

    The controls are ``removed``, ``shuffled``, ``random rows``, ``swapped`` and, with ``counterfactual``, ``swapped
    after t`` for ``t = 1 … K - 1``; ``docs/evidence.md`` describes them. A swap without a single pair is skipped with a
    warning.

    Args:
        templates: prompt templates; use those that the adapter was trained with.
        batch_size: questions per batch; does not change the answers.
        seed: determines the shuffled order, the random rows and the pairs.
        counterfactual: the answer to a question continued from another's step, None for an unsuitable pair. It is asked
            about pairs with the same number of steps that differ in the step that block ``t``, the last one swapped, is
            trained to hold.
        steps_ahead: 0 if blocks were trained to read out their own step rather than the next one.

    Raises:
        ValueError: there are no examples, or the model has no blocks, or its blocks cannot be swapped.
    """
    if not examples:
        raise ValueError("examples: there are none to evaluate on. Check the split and the limit.")
    check_swaps(model)
    examples = with_writable_answers(examples, tokenizer, task, templates)
    first_memory_id = active_config(model).block_tokens.begin
    questions = [row.question for row in examples]
    lengths = [len(ids) for ids in tokenize_prompts(questions, tokenizer, templates, vocab_size=first_memory_id)]
    num_blocks = active_config(model).num_blocks
    swaps = plan_swaps(
        examples,
        lengths,
        task,
        num_blocks=num_blocks,
        seed=seed,
        counterfactual=counterfactual,
        steps_ahead=steps_ahead,
    )
    options: dict[str, Any] = {"templates": templates, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    total = 3 * len(examples) + sum(map(len, swaps.values()))
    with tqdm(total=total, desc="Controls", unit="row", disable=not progress) as bar:
        asked = _Asked(model, tokenizer, task, options, AnswerReader(tokenizer, templates), bar)
        controls = asked.without_donors(examples, seed=seed)
        for count, pairs in swaps.items():
            if pairs:
                controls.append(asked.swapped(pairs, count=count, num_examples=len(examples)))
            else:
                logger.warning("Control %r is skipped: no two of %d rows can be paired.", _name(count), len(examples))
    return controls


def shuffle_ids(ids: Sequence[int], *, seed: int) -> list[int]:
    """Shuffle the blocks' ids; the last one stays, so that readouts still begin after ``</b>``.

    >>> shuffle_ids([90, 91, 92, 90, 91, 92], seed=0)
    [91, 92, 90, 90, 91, 92]
    """
    rng = random.Random(f"shuffled {seed}")
    shuffled = list(ids[:-1])
    while shuffled == list(ids[:-1]) and len(set(shuffled)) > 1:
        rng.shuffle(shuffled)
    return [*shuffled, ids[-1]]


@dataclass(frozen=True)
class _Asked:
    """A model under interventions, the options of its answers and how they are read, and a bar that counts them."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    options: Mapping[str, Any]
    alone: AnswerReader
    bar: Any

    def without_donors(self, examples: Sequence[Example], *, seed: int) -> list[Control]:
        """Run the controls that need no second question."""
        model, tokenizer, options = self.model, self.tokenizer, self.options
        questions = [example.question for example in examples]
        config = active_config(model)
        ids = shuffle_ids(config.block_tokens.ids(config.num_blocks), seed=seed)
        removed = self._counted(answer_questions(model, tokenizer, questions, num_blocks=0, **options))
        shuffled = self._counted(answer_with_memory_ids(model, tokenizer, questions, ids, **options))
        with random_rows(model, seed=seed):
            noisy = self._counted(answer_questions(model, tokenizer, questions, **options))
        described = [
            ("removed", "no blocks: the answer follows the prompt", removed),
            ("shuffled", "the blocks' tokens in a random order, the same for all questions, </b> at the end", shuffled),
            ("random rows", "the three memory rows are random, with the mean and spread of the vocabulary's", noisy),
        ]
        return [_judge(name, description, texts, examples, self.task) for name, description, texts in described]

    def swapped(self, pairs: Sequence[Pair], *, count: int | None, num_examples: int) -> Control:
        """Answer with the first ``count`` blocks of each question's donor; None for all blocks."""
        questions, donors = [pair.example.question for pair in pairs], [pair.donor.question for pair in pairs]
        texts = self._counted(
            answer_with_swapped_blocks(self.model, self.tokenizer, questions, donors, num_swapped=count, **self.options)
        )
        which = "all blocks hold" if count is None else f"blocks 1 to {count} hold" if count > 1 else "block 1 holds"
        left_out = f"{num_examples - len(pairs)} of {num_examples} rows have no partner and are left out"
        return _judge(
            _name(count),
            f"{which} the keys and values of another question with another answer; {left_out}",
            texts,
            [pair.example for pair in pairs],
            self.task,
            follows=score([self._follows(text, pair, count) for text, pair in zip(texts, pairs, strict=True)]),
        )

    def _follows(self, text: str, pair: Pair, count: int | None) -> bool:
        # With all blocks swapped the implied answer is the donor's own, whose question a rule may depend on.
        task = self.task.about(pair.donor.question) if count is None else self.task
        return task.is_correct(text, pair.implied)

    def _counted(self, texts: Iterable[str]) -> list[str]:
        found = []
        for text in texts:
            self.bar.update()
            found.append(self.alone(text))
        return found


def _judge(
    name: str,
    description: str,
    texts: Sequence[str],
    examples: Sequence[Example],
    task: Task,
    *,
    follows: Score | None = None,
) -> Control:
    right = are_right(texts, examples, task)
    return Control(name, description, score(right), score_by_length(right, lengths_of(examples)), follows)


def _name(count: int | None) -> str:
    return "swapped" if count is None else f"swapped after {count}"


@runtime_checkable
class ChainTask(Protocol):
    """A task whose questions are chains of operations on one value, like :class:`~rim_peft.tasks.potions.Potions`."""

    def read_answer(self, text: str) -> str | None:
        """Return the value that a step or an answer names."""

    def is_correct(self, text: str, gold: str) -> bool:
        """Return whether a text names the value ``gold``."""

    def answer_from(self, question: str, step: int, value: str, /) -> str:
        """Return a question's answer if its value after ``step`` operations were ``value``."""


@dataclass(frozen=True)
class ChainCounterfactual:
    """The correct answer when a question's first blocks hold another question's values.

    A chain's ``steps[t]`` is the value after ``t`` operations, and grounding puts it into block ``t`` (block ``t + 1``
    if blocks read out their own step). With the donor's blocks up to that one, the answer is what the question's
    operations from ``t + 1`` on make of the donor's ``steps[t]``. A pair for which this is also the donor's own answer
    is refused: following the blocks would look the same as copying the donor.
    """

    task: ChainTask

    def __call__(self, example: Example, donor: Example, step: int) -> str | None:
        """Return the answer to ``example`` continued from ``donor.steps[step]``, None for an unsuitable pair."""
        steps = donor.steps or ()
        value = self.task.read_answer(steps[step]) if step < len(steps) else None
        if value is None or not isinstance(example.question, str):
            return None
        implied = self.task.answer_from(example.question, step, value)
        return None if self.task.is_correct(implied, donor.answer) else implied
