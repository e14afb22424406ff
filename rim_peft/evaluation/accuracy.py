"""Accuracy of answers under every rule, and paired tests of two methods."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Question, Templates
from rim_peft.evaluation.answers import AnswerReader, with_writable_answers
from rim_peft.evaluation.scores import Score, score, score_by_length, score_overall_and_by_length
from rim_peft.inference import Answerer, BlockAnswerer
from rim_peft.tasks import Task


@dataclass(frozen=True)
class PairedDifference:
    """The difference between two methods' verdicts on the same rows.

    Attributes:
        difference: accuracy of the first minus accuracy of the second.
        standard_error: of the difference, from the rows on which the two disagree.
        only_a: rows that only the first has right.
        only_b: rows that only the second has right.
        p_value: two-sided, from McNemar's exact test: the probability of a split at least this uneven if each of these
            rows were equally likely to favour either method. The trained weights are held fixed: it says whether these
            two adapters differ, not whether the two methods would with other seeds.
    """

    difference: float
    standard_error: float
    only_a: int
    only_b: int
    p_value: float


def paired_difference(right_a: Sequence[bool], right_b: Sequence[bool]) -> PairedDifference:
    """Compare two methods on the same rows.

    >>> found = paired_difference([True] * 9 + [False], [False] * 8 + [True] * 2)
    >>> found.only_a, found.only_b, round(found.p_value, 4)
    (8, 1, 0.0391)

    Args:
        right_a: whether the first method has each row right.
        right_b: the same for the second method.

    Raises:
        ValueError: there are no rows, or the two numbers of rows differ.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, 1947; the exact form
        is the sign test on the rows that differ.
    """
    if not right_a or len(right_a) != len(right_b):
        raise ValueError(
            f"rows: both methods must have the same ones, at least one, got {len(right_a)}, {len(right_b)}."
        )
    only_a = sum(a and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(b and not a for a, b in zip(right_a, right_b, strict=True))
    n, differing = len(right_a), only_a + only_b
    difference = (only_a - only_b) / n
    # The variance of a mean of +1, -1 and 0.
    error = math.sqrt((differing / n - difference**2) / n)
    tail = sum(math.comb(differing, k) for k in range(min(only_a, only_b) + 1))
    return PairedDifference(difference, error, only_a, only_b, min(1.0, 2 * tail / 2**differing))


def pooled_difference(pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> PairedDifference:
    """Compare two methods on the same rows over several seeds.

    Rows are the random sample here: a row's verdicts are averaged over the seeds first, because seeds that judge the
    same row are not independent rows. The spread between seeds is not included.

    Args:
        pairs: the verdicts of the first method and of the second, on the same rows, for each seed.

    Returns:
        Counts over all seeds; the p-value is from a normal distribution, which for few rows is no smaller than that of
        a sign-flip test can be: ``2 / 2**n`` with ``n`` rows that differ.

    Raises:
        ValueError: there are no rows, or the numbers of rows differ.
    """
    each = [paired_difference(first, second) for first, second in pairs]
    sizes = {len(first) for first, _ in pairs}
    if len(sizes) != 1:
        raise ValueError(f"pairs: must be at least one, all of the same rows, got {sorted(sizes)} rows.")
    rows = zip(*([int(a) - int(b) for a, b in zip(first, second, strict=True)] for first, second in pairs), strict=True)
    means = [sum(row) / len(pairs) for row in rows]
    difference = sum(means) / len(means)
    error = math.sqrt(sum((mean - difference) ** 2 for mean in means)) / len(means)
    normal = math.erfc(abs(difference) / error / math.sqrt(2)) if error else float(difference == 0)
    p_value = max(normal, min(1.0, 2.0 ** (1 - sum(mean != 0 for mean in means))))
    return PairedDifference(
        difference, error, sum(one.only_a for one in each), sum(one.only_b for one in each), p_value
    )


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracy of a model's answers under the task's answer rules.

    Attributes:
        answer_rule: the rule by which an answer was read and compared.
        num_blocks: blocks after each prompt.
        final: score of the answers after the last block.
        by_rule: the same under every rule that the task reports.
        by_length: the same by number of reasoning steps; rows without steps are not counted.
        by_block: the score of every block's readout, overall (``"all"``) and by number of steps; empty unless asked
            for.
        predictions: the answers after the last block, in the order of the rows.
        verdicts: every rule's verdict on each of them.
        num_cut: how many answers did not end within ``max_new_tokens``; they are judged as they are.
    """

    answer_rule: str
    num_blocks: int
    final: Score
    by_rule: dict[str, Score]
    by_length: dict[int, Score]
    by_block: list[dict[int | str, Score]]
    predictions: list[str]
    verdicts: list[dict[str, bool]]
    num_cut: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the predictions and their verdicts, ready for JSON."""
        return {
            "answer_rule": self.answer_rule,
            "num_blocks": self.num_blocks,
            **self.final.to_dict(),
            "num_cut": self.num_cut,
            "by_rule": {rule: score.to_dict() for rule, score in self.by_rule.items()},
            "by_length": {str(length): score.to_dict() for length, score in self.by_length.items()},
            "by_block": [{str(key): score.to_dict() for key, score in block.items()} for block in self.by_block],
        }


def evaluate_accuracy(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    *,
    templates: Templates | None = None,
    num_blocks: int | None = None,
    by_block: bool = False,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: bool = False,
) -> AccuracyReport:
    """Judge a model's greedy answers after the last block, or with ``by_block`` after every block.

    Args:
        templates: prompt templates; use those that the adapter was trained with.
        num_blocks: blocks after each prompt; by default the adapter's own number.
        by_block: judge the readout of every block too.

    Raises:
        ValueError: there are no examples.
    """
    answerer = BlockAnswerer(
        model, tokenizer, templates=templates, num_blocks=num_blocks, max_new_tokens=max_new_tokens
    )
    return judge_answers(answerer, examples, task, by_block=by_block, batch_size=batch_size, progress=progress)


def judge_answers(
    answerer: Answerer,
    examples: Sequence[Example],
    task: Task,
    *,
    by_block: bool = False,
    batch_size: int = 8,
    progress: bool = False,
    separator: str | None = None,
) -> AccuracyReport:
    """Judge an answerer's greedy answers; see :func:`evaluate_accuracy`.

    Args:
        answerer: gives the answers; with ``by_block`` a :class:`~rim_peft.inference.BlockAnswerer`.
        separator: what ends each step where a method writes its steps out: the answer is the text after the last one.
            None if the whole text is the answer.

    Raises:
        ValueError: there are no examples, or ``by_block`` is given for another answerer.
    """
    if not examples:
        raise ValueError("examples: there are none to evaluate on. Check the split and the limit.")
    if by_block and not isinstance(answerer, BlockAnswerer):
        raise ValueError(
            f"by_block: needs a BlockAnswerer, which can read every block out, got {type(answerer).__name__}. Omit it."
        )
    examples = with_writable_answers(examples, answerer.tokenizer, task, answerer.templates)
    readouts, cut = _read(answerer, examples, by_block=by_block, batch_size=batch_size, progress=progress)
    if cut:
        logger.warning(
            "max_new_tokens: %d of %d answers were cut at %d tokens, before they ended, and are judged as they are. "
            "Raise evaluation.max_new_tokens.",
            len(cut),
            len(examples),
            answerer.max_new_tokens,
        )
    lengths = lengths_of(examples)
    alone = AnswerReader(answerer.tokenizer, answerer.templates, separator)
    answers = [alone.each(texts, examples) for texts in zip(*readouts, strict=True)]
    verdicts, right = judge_readouts(answers, examples, task)
    return AccuracyReport(
        answer_rule=task.answer_rule,
        num_blocks=answerer.num_blocks,
        final=score(right[-1]),
        by_rule=score_by_rule(verdicts),
        by_length=score_by_length(right[-1], lengths),
        by_block=[score_overall_and_by_length(each, lengths) for each in right] if by_block else [],
        predictions=[row[-1] for row in readouts],
        verdicts=verdicts,
        num_cut=len(cut),
    )


def _read(
    answerer: Answerer, examples: Sequence[Example], *, by_block: bool, batch_size: int, progress: bool
) -> tuple[list[list[str]], list[str]]:
    """Return the texts of each example's readouts, the final one last, and the final ones that did not end."""
    readouts: list[list[str]] = []
    cut: list[str] = []
    for questions in question_batches(examples, batch_size, doing="Evaluating", progress=progress):
        if by_block and isinstance(answerer, BlockAnswerer):
            rows = answerer.read_blocks(questions)
            cut += [row[-1].text for row in rows if not answerer.has_ended(row[-1].token_ids)]
            readouts += [[readout.text for readout in row] for row in rows]
        else:
            texts = answerer.answer(questions, batch_size=len(questions), on_cut=cut.append)
            readouts += [[text] for text in texts]
    return readouts, cut


def question_batches(
    examples: Sequence[Example], batch_size: int, *, doing: str, progress: bool
) -> Iterator[list[Question]]:
    """Yield the examples' questions in batches; a progress bar counts those that are done."""
    with tqdm(total=len(examples), desc=doing, unit="row", disable=not progress) as bar:
        for start in range(0, len(examples), batch_size):
            questions = [example.question for example in examples[start : start + batch_size]]
            yield questions
            bar.update(len(questions))


def judge_readouts(
    answers: Sequence[Sequence[str]], examples: Sequence[Example], task: Task
) -> tuple[list[dict[str, bool]], list[list[bool]]]:
    """Judge several answers to each example.

    Args:
        answers: the examples' answers, once for each readout.

    Returns:
        Every rule's verdict on each of the last answers; for each readout, which answers the task's rule finds right.
    """
    *earlier, last = answers
    verdicts = judge_texts(last, examples, task)
    right = [are_right(texts, examples, task) for texts in earlier]
    return verdicts, [*right, [verdict[task.answer_rule] for verdict in verdicts]]


def are_right(texts: Sequence[str], examples: Sequence[Example], task: Task) -> list[bool]:
    """Return whether each text is right, by the task's rule."""
    pairs = zip(texts, examples, strict=True)
    return [task.about(example.question).is_correct(text, example.answer) for text, example in pairs]


def lengths_of(examples: Sequence[Example]) -> list[int | None]:
    """Return each example's number of reasoning steps; None where it has none."""
    return [len(example.steps) if example.steps else None for example in examples]


def judge_texts(texts: Sequence[str], examples: Sequence[Example], task: Task) -> list[dict[str, bool]]:
    """Return the verdict on each answer under every rule that the task reports."""
    return [
        task.about(example.question).judge(text, example.answer) for text, example in zip(texts, examples, strict=True)
    ]


def score_by_rule(verdicts: Sequence[Mapping[str, bool]]) -> dict[str, Score]:
    """Count verdicts under every rule; there is at least one."""
    return {rule: score([verdict[rule] for verdict in verdicts]) for rule in verdicts[0]}
