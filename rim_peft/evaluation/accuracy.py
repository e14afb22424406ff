"""Right answers, counted under every rule, with intervals and paired tests."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Templates
from rim_peft.data.tokenization import Encoder
from rim_peft.inference import Answerer, BlockAnswerer
from rim_peft.tasks import Task


@dataclass(frozen=True)
class PairedDifference:
    """What two methods' verdicts on the same rows say about their difference.

    Attributes:
        difference: accuracy of the first minus that of the second.
        standard_error: of the difference, from the rows on which the two disagree.
        only_a: rows that the first alone has right.
        only_b: rows that the second alone has right.
        p_value: two-sided, of McNemar's exact test: how likely so uneven a split of these rows is, if each were as
            likely to be the first's as the second's. The trained weights are held fixed: it says whether these two
            adapters differ, not whether two methods would with other seeds.
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
        right_b: the same of the second.

    Raises:
        ValueError: there are no rows, or not equally many.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, 1947; the exact form
        is the sign test of the rows that differ.
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

    Rows are what is drawn at random here: a row's verdicts are averaged over the seeds before the rows' spread is
    taken, since seeds that judge the same row are no rows of their own. What another seed would give is not in it.

    Args:
        pairs: for each seed the verdicts of the first method and of the second, on the same rows.

    Returns:
        Counts of all seeds together; the p-value is that of a normal distribution.

    Raises:
        ValueError: there are no rows, or not equally many.
    """
    each = [paired_difference(first, second) for first, second in pairs]
    sizes = {len(first) for first, _ in pairs}
    if len(sizes) != 1:
        raise ValueError(f"pairs: must be at least one, all of the same rows, got {sorted(sizes)} rows.")
    rows = zip(*([int(a) - int(b) for a, b in zip(first, second, strict=True)] for first, second in pairs), strict=True)
    means = [sum(row) / len(pairs) for row in rows]
    difference = sum(means) / len(means)
    error = math.sqrt(sum((mean - difference) ** 2 for mean in means)) / len(means)
    p_value = math.erfc(abs(difference) / error / math.sqrt(2)) if error else float(difference == 0)
    return PairedDifference(
        difference, error, sum(one.only_a for one in each), sum(one.only_b for one in each), p_value
    )


logger = logging.getLogger(__name__)


_Z = 1.959964  # of a normal distribution 95 % lie within so many standard deviations


@dataclass(frozen=True)
class Score:
    """A share of right answers.

    Attributes:
        num_correct: right answers.
        num_rows: answers that were judged.
    """

    num_correct: int
    num_rows: int

    @property
    def accuracy(self) -> float:
        """The share, 0 to 1."""
        return self.num_correct / self.num_rows

    @property
    def standard_error(self) -> float:
        """Standard error of the share, ``sqrt(p (1 - p) / n)``."""
        return math.sqrt(self.accuracy * (1.0 - self.accuracy) / self.num_rows)

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % confidence interval of the share.

        Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927. It holds near 0 and
        1 too, where accuracy plus and minus two standard errors does not.
        """
        n, p = self.num_rows, self.accuracy
        center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return min(p, center - half), max(p, center + half)  # rounding aside, the share is inside

    def to_dict(self) -> dict[str, float]:
        """Return counts, accuracy, standard error and the interval's ends (``low``, ``high``), rounded to 6 digits."""
        low, high = self.interval
        rounded = {"accuracy": self.accuracy, "standard_error": self.standard_error, "low": low, "high": high}
        return {**asdict(self), **{name: round(value, 6) for name, value in rounded.items()}}


@dataclass(frozen=True)
class AccuracyReport:
    """How many answers were right, under which rule.

    Attributes:
        answer_rule: name of the rule by which an answer was read and compared.
        num_blocks: blocks after each prompt.
        final: score of the answers after the last block.
        by_rule: the same under every rule that the task reports.
        by_length: the same by number of reasoning steps; rows without steps have none.
        by_block: for every block the score of its readout, overall (``"all"``) and by number of steps; empty unless
            asked for.
        predictions: the answers after the last block, in the rows' order.
        num_cut: how many of these had not ended within ``max_new_tokens``; they are judged as they are.
    """

    answer_rule: str
    num_blocks: int
    final: Score
    by_rule: dict[str, Score]
    by_length: dict[int, Score]
    by_block: list[dict[int | str, Score]]
    predictions: list[str]
    num_cut: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the predictions, as JSON takes it."""
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
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer.
        examples: held-out examples, at least one.
        task: reads and compares answers.
        templates: how prompts are written; the ones that the adapter was trained with.
        num_blocks: blocks after each prompt; the adapter's own if not given.
        by_block: judge the readout of every block too.
        max_new_tokens: tokens of an answer at most.
        batch_size: questions at a time.
        progress: show a progress bar on stderr.

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
    """Judge the answers of whatever answers; see :func:`evaluate_accuracy`.

    Args:
        answerer: what answers; for ``by_block`` a :class:`~rim_peft.inference.BlockAnswerer`.
        examples: held-out examples, at least one.
        task: reads and compares answers.
        by_block: judge the readout of every block too.
        batch_size: questions at a time.
        progress: show a progress bar on stderr.
        separator: what stands behind each step where a method writes its steps out: what follows the last one in a
            text is its answer. None where a text is the answer.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("examples: there are none to evaluate on. Check the split and the limit.")
    tokenizer = answerer.tokenizer
    examples = with_writable_answers(examples, tokenizer, task, answerer.templates)
    count = answerer.num_blocks
    readouts: list[list[str]] = []  # for each example its readouts as text, the final one last
    cut: list[str] = []  # of the final ones
    with tqdm(total=len(examples), desc="Evaluating", unit="row", disable=not progress) as bar:
        for start in range(0, len(examples), batch_size):
            questions = [example.question for example in examples[start : start + batch_size]]
            if by_block and isinstance(answerer, BlockAnswerer):
                rows = answerer.read_blocks(questions)
                cut += [row[-1].text for row in rows if tokenizer.eos_token_id not in row[-1].token_ids]
                readouts += [[readout.text for readout in row] for row in rows]
            else:
                texts = answerer.answer(questions, batch_size=len(questions), on_cut=cut.append)
                readouts += [[text] for text in texts]
            bar.update(len(questions))
    num_cut = len(cut)
    if num_cut:
        logger.warning(
            "max_new_tokens: %d of %d answers were cut at %d tokens, before they ended, and are judged as they are. "
            "Raise evaluation.max_new_tokens.",
            num_cut,
            len(examples),
            answerer.max_new_tokens,
        )
    right = [
        [task.is_correct(answer_of(text, separator), example.answer) for text in row]
        for row, example in zip(readouts, examples, strict=True)
    ]
    lengths = [len(example.steps) if example.steps else None for example in examples]
    final = [row[-1] for row in right]
    return AccuracyReport(
        answer_rule=task.answer_rule,
        num_blocks=count,
        final=score(final),
        by_rule=score_by_rule([row[-1] for row in readouts], examples, task, separator=separator),
        by_length=score_by_length(final, lengths),
        by_block=[score_overall_and_by_length([row[k] for row in right], lengths) for k in range(count)]
        if by_block
        else [],
        predictions=[row[-1] for row in readouts],
        num_cut=num_cut,
    )


def with_writable_answers(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: Task, templates: Templates | None = None
) -> list[Example]:
    """Return examples with gold answers that the tokenizer can write.

    Some tokenizers normalise texts, or have no token for a character: a perfect readout is then not the answer as the
    row has it. Where the task judges it wrong for that, the row's answer is replaced by what the tokenizer makes of it.
    Others stay as they are.
    """

    def is_right(text: str, gold: str) -> bool:
        try:
            return task.is_correct(text, gold)
        except ValueError:  # no gold answer that the rule can read
            return False

    written = Encoder(tokenizer, templates or Templates()).read_back([example.answer for example in examples])
    return [
        example
        if text == example.answer.strip() or is_right(text, example.answer) or not is_right(text, text)
        else replace(example, answer=text)
        for example, text in zip(examples, written, strict=True)
    ]


def answer_of(text: str, separator: str | None) -> str:
    """Return what follows the last separator of a text that has its steps written out; all of it without one.

    >>> answer_of("2*3=6, 6+1=7, 7", ", "), answer_of("(3,4)=p, (3,4)", ", "), answer_of("a , b", ", ")
    ('7', '(3,4)', 'b')
    """
    return text if separator is None else text[answer_start(text, separator) :].strip()


def answer_start(text: str, separator: str) -> int:
    """Return the index behind the last separator of a text; 0 if it has none.

    Some tokenizers change the white space around a separator. So where it does not stand as it was written, its mark
    with white space on one side counts.

    >>> [answer_start(text, ", ") for text in ("a=1, 7", "a=1 , 7", "1,234")]
    [5, 6, 0]
    """
    found = text.rfind(separator)
    if found >= 0:
        return found + len(separator)
    mark = re.escape(separator.strip())
    ends = [match.end() for match in re.finditer(rf"\s{mark}\s*|{mark}\s+", text)] if mark else []
    return ends[-1] if ends else 0


def score_by_rule(
    texts: Sequence[str], examples: Sequence[Example], task: Task, *, separator: str | None = None
) -> dict[str, Score]:
    """Score texts under every rule that a task reports."""
    verdicts = [
        task.judge(answer_of(text, separator), example.answer) for text, example in zip(texts, examples, strict=True)
    ]
    return {rule: score([verdict[rule] for verdict in verdicts]) for rule in task.answer_rules}


def score(right: Sequence[bool]) -> Score:
    """Count verdicts."""
    return Score(num_correct=sum(right), num_rows=len(right))


def score_by_length(right: Sequence[bool], lengths: Sequence[int | None]) -> dict[int, Score]:
    """Count verdicts by number of steps; rows without steps are in none."""
    present = sorted({length for length in lengths if length is not None})
    return {n: score([ok for ok, length in zip(right, lengths, strict=True) if length == n]) for n in present}


def score_overall_and_by_length(right: Sequence[bool], lengths: Sequence[int | None]) -> dict[int | str, Score]:
    """Count verdicts, all of them (``"all"``) and by number of steps."""
    found: dict[int | str, Score] = {"all": score(right)}
    for length, counted in score_by_length(right, lengths).items():
        found[length] = counted
    return found
