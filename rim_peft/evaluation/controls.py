"""Do the blocks matter? Answers with blocks removed, disordered, made of noise, or taken from another question."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Templates
from rim_peft.data.preparation import tokenize_prompts
from rim_peft.data.tasks import Task
from rim_peft.evaluation.accuracy import Score, with_writable_answers
from rim_peft.evaluation.pairing import Counterfactual, Pair, plan_swaps
from rim_peft.inference import answer_questions
from rim_peft.inference.swapping import answer_with_memory_ids, answer_with_swapped_blocks, check_swaps, random_rows
from rim_peft.tuner.config import active_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Control:
    """The answers under one intervention on the blocks.

    Attributes:
        name: the intervention's short name.
        description: what was done, in one line.
        accuracy: score of the answers against the questions' own gold answers.
        by_length: the same by number of reasoning steps; rows without steps have none.
        follows: where blocks came from another question, score of the answers against what those blocks imply.
    """

    name: str
    description: str
    accuracy: Score
    by_length: dict[int, Score]
    follows: Score | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, as JSON takes it."""
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
    """Answer questions under interventions on the blocks: the less right the answers are, the more the blocks matter.

    The controls are ``removed``, ``shuffled``, ``random rows``, ``swapped`` and, with ``counterfactual``,
    ``swapped after t`` for ``t = 1 … K - 1``; ``docs/evidence.md`` describes them. A swap for which no two
    questions can be paired is left out, with a warning.

    Args:
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer.
        examples: held-out examples, at least one.
        task: reads and compares answers.
        templates: how prompts are written; the ones that the adapter was trained with.
        max_new_tokens: tokens of an answer at most.
        batch_size: questions at a time; it does not change the answers.
        seed: decides on the shuffled order, the random rows and the pairs.
        counterfactual: the answer that a question has if it goes on from another's step, None where a pair will not do.
            Pairs are asked about that have equally many steps, of which the one differs that block ``t``, the last one
            swapped, is trained to hold.
        steps_ahead: 0 if blocks were trained to read out their own step, not the next one.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: there are no examples, or the model has no blocks, or none that can be exchanged.
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
    total = 3 * len(examples) + sum(map(len, swaps.values()))
    options: dict[str, Any] = {"templates": templates, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with tqdm(total=total, desc="Controls", unit="row", disable=not progress) as bar:

        def counted(texts: Iterable[str]) -> Iterator[str]:
            for text in texts:
                bar.update()
                yield text

        controls = _run_plain(model, tokenizer, examples, task, seed=seed, counted=counted, options=options)
        for count, pairs in swaps.items():
            if not pairs:
                logger.warning("Control %r is left out: no two of %d rows can be paired.", _name(count), len(examples))
                continue
            texts = answer_with_swapped_blocks(
                model,
                tokenizer,
                [pair.example.question for pair in pairs],
                [pair.donor.question for pair in pairs],
                num_swapped=count,
                **options,
            )
            controls.append(_judge_swap(list(counted(texts)), pairs, task, count=count, num_examples=len(examples)))
    return controls


def shuffle_ids(ids: Sequence[int], *, seed: int) -> list[int]:
    """Return blocks' ids in another, random order; the last one stays, so that readouts still begin after ``</b>``.

    >>> shuffle_ids([90, 91, 92, 90, 91, 92], seed=0)
    [91, 92, 90, 90, 91, 92]
    """
    rng = random.Random(f"shuffled {seed}")
    shuffled = list(ids[:-1])
    while shuffled == list(ids[:-1]) and len(set(shuffled)) > 1:
        rng.shuffle(shuffled)
    return [*shuffled, ids[-1]]


def _run_plain(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    *,
    seed: int,
    counted: Callable[[Iterable[str]], Iterator[str]],
    options: dict[str, Any],
) -> list[Control]:
    """The controls that need no second question."""
    questions = [example.question for example in examples]
    config = active_config(model)
    ids = shuffle_ids(config.block_tokens.ids(config.num_blocks), seed=seed)
    removed = list(counted(answer_questions(model, tokenizer, questions, num_blocks=0, **options)))
    shuffled = list(counted(answer_with_memory_ids(model, tokenizer, questions, ids, **options)))
    with random_rows(model, seed=seed):
        noisy = list(counted(answer_questions(model, tokenizer, questions, **options)))
    described = [
        ("removed", "no blocks: the answer follows the prompt", removed),
        ("shuffled", "the blocks' tokens in a random order, the same for all questions, </b> at the end", shuffled),
        ("random rows", "the three memory rows are random, with the mean and spread of the vocabulary's", noisy),
    ]
    return [_judge(name, description, texts, examples, task) for name, description, texts in described]


def _judge(
    name: str,
    description: str,
    texts: Sequence[str],
    examples: Sequence[Example],
    task: Task,
    *,
    follows: Score | None = None,
) -> Control:
    right = [task.is_correct(text, example.answer) for text, example in zip(texts, examples, strict=True)]
    by_length: dict[int, list[bool]] = defaultdict(list)
    for is_right, example in zip(right, examples, strict=True):
        if example.steps:
            by_length[len(example.steps)].append(is_right)
    scores = {length: Score(sum(by_length[length]), len(by_length[length])) for length in sorted(by_length)}
    return Control(name, description, Score(sum(right), len(right)), scores, follows)


def _judge_swap(
    texts: Sequence[str], pairs: Sequence[Pair], task: Task, *, count: int | None, num_examples: int
) -> Control:
    which = "all blocks hold" if count is None else f"blocks 1 to {count} hold" if count > 1 else "block 1 holds"
    left_out = f"{num_examples - len(pairs)} of {num_examples} rows have no partner and are left out"
    follow = [task.is_correct(text, pair.implied) for text, pair in zip(texts, pairs, strict=True)]
    return _judge(
        _name(count),
        f"{which} the keys and values of another question with another answer; {left_out}",
        texts,
        [pair.example for pair in pairs],
        task,
        follows=Score(sum(follow), len(follow)),
    )


def _name(count: int | None) -> str:
    return "swapped" if count is None else f"swapped after {count}"
