"""Time several ways of answering side by side; accuracy and time by number of blocks.

Ways take turns, question by question, so that other work on the machine slows all of them alike; ratios are taken
within a round, before the median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Templates
from rim_peft.evaluation.accuracy import judge_answers
from rim_peft.evaluation.answers import answer_start
from rim_peft.inference import Answerer, BlockAnswerer, BlockDecoder, decode_with_thoughts
from rim_peft.inference.greedy import generate_greedily
from rim_peft.tasks import Task
from rim_peft.values import check_integer

Prompts = Sequence[Sequence[int]]
"""Token ids of each prompt, without blocks or padding."""

Answer = Callable[[Prompts, Callable[[], None]], list[list[int]]]
"""``f(prompts, on_token)`` writes an answer for each prompt and returns its tokens, EOS included.

It calls ``on_token()`` whenever every unfinished row has one more token."""

AnswerTokens = int | Callable[[Sequence[int]], int] | None


@dataclass(frozen=True)
class Way:
    """One way of answering questions.

    Attributes:
        name: its name in the figures.
        prompts: token ids of each question's prompt.
        answer: answers a batch of prompts.
        answer_tokens: how many of the last tokens written are the answer, EOS included: a number, or a function of the
            tokens written (:func:`count_behind`); None for all of them. A list has one of these for each question.
        device: where it computes.
    """

    name: str
    prompts: Prompts
    answer: Answer
    answer_tokens: AnswerTokens | Sequence[AnswerTokens] = None
    device: torch.device | str = "cpu"


def by_generate(
    name: str,
    prompts: Prompts,
    model: Any,
    *,
    eos_id: int | None,
    pad_id: int,
    max_new_tokens: int = 64,
    answer_tokens: AnswerTokens | Sequence[AnswerTokens] = None,
    **options: Any,
) -> Way:
    """Answer by a model's own greedy ``generate``, with prompts padded on the left.

    Args:
        model: a causal language model, with or without a RiM adapter.
        max_new_tokens: maximum tokens written, EOS included.
        answer_tokens: see :class:`Way`.
        options: more arguments of ``generate``, such as ``num_blocks``.
    """

    def answer(batch: Prompts, on_token: Callable[[], None]) -> list[list[int]]:
        return generate_greedily(
            model,
            batch,
            eos_id=eos_id,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            on_token=on_token,
            **options,
        )

    return Way(name, prompts, answer, answer_tokens, model.device)


def by_answerer(name: str, prompts: Prompts, answerer: Answerer) -> Way:
    """Answer by an :class:`Answerer`."""

    def answer(batch: Prompts, on_token: Callable[[], None]) -> list[list[int]]:
        return answerer.decode(batch, on_token=on_token)

    return Way(name, prompts, answer, device=answerer.model.device)


def by_decoder(name: str, prompts: Prompts, decoder: BlockDecoder) -> Way:
    """Return the way of a block decoder, compiled or not; the answer is the one after the last block.

    A compiled decoder compiles when prompts of a new length come: let ``warm_up`` bring the longest and the shortest.
    """

    def answer(batch: Prompts, on_token: Callable[[], None]) -> list[list[int]]:
        return [answers[-1] for answers in decoder(batch, on_token=on_token).token_ids]

    return Way(name, prompts, answer, device=decoder.model.device)


def by_thoughts(name: str, prompts: Prompts, model: PeftModel, **options: Any) -> Way:
    """Return the way of continuous thoughts; the options are those of ``decode_with_thoughts``."""

    def answer(batch: Prompts, on_token: Callable[[], None]) -> list[list[int]]:
        return decode_with_thoughts(model, batch, on_token=on_token, **options)

    return Way(name, prompts, answer, device=model.device)


def count_behind(
    tokenizer: PreTrainedTokenizerBase, separator: str, *, num_inside: int = 0
) -> Callable[[Sequence[int]], int]:
    """Return a function that counts the tokens from the first answer token on, EOS included.

    Args:
        separator: what ends each step. The answer begins with the token that adds the first non-space character after
            the last separator, or with the first token if there is no separator.
        num_inside: how many of the last separators belong to the answer.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def count(tokens: Sequence[int]) -> int:
        behind = answer_start(decode(tokens), separator, num_inside=num_inside)
        begins = (index for index in range(len(tokens)) if decode(tokens[: index + 1])[behind:].strip())
        return len(tokens) - next(begins, len(tokens))

    return count


@dataclass(frozen=True)
class Latency:
    """Latency of one way at one batch size; times are medians over batches, with lower and upper quartiles.

    Attributes:
        name: the way's name.
        batch_size: questions answered at a time.
        prompt_tokens: mean number of tokens of a prompt, without padding.
        first_token_ms: milliseconds from the prompts' ids until every question of a batch has the first token of its
            answer. If steps are written out, that token comes after all steps.
        first_token_quartiles_ms: its quartiles.
        answer_ms: milliseconds until all answers of a batch are complete, EOS included.
        answer_quartiles_ms: its quartiles.
        num_tokens: mean number of tokens written per question, with EOS and without memory tokens.
        peak_memory_mb: peak CUDA memory (2**20 bytes) of a batch above what was allocated before; None on a CPU.
        first_token_ratio: median ratio of the time to the first token to the reference's for the same questions; None
            without a reference.
        answer_ratio: the same for whole answers.
    """

    name: str
    batch_size: int
    prompt_tokens: float
    first_token_ms: float
    first_token_quartiles_ms: tuple[float, float]
    answer_ms: float
    answer_quartiles_ms: tuple[float, float]
    num_tokens: float
    peak_memory_mb: float | None
    first_token_ratio: float | None
    answer_ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields ready for JSON: rounded to 3 digits, ``prompt_tokens`` to an integer."""
        values = asdict(self)
        for key, value in values.items():
            if isinstance(value, float):
                values[key] = round(value, 3)
            elif isinstance(value, tuple):
                values[key] = [round(part, 3) for part in value]
        return {**values, "prompt_tokens": round(self.prompt_tokens)}


@dataclass(frozen=True)
class _Sample:
    """One batch: seconds to the first token and to the whole answer, tokens written, peak bytes."""

    first: float
    whole: float
    num_tokens: int
    num_bytes: int | None


def measure_latency(
    ways: Sequence[Way],
    *,
    batch_sizes: Sequence[int] = (1,),
    num_questions: int = 32,
    warm_up: int = 3,
    min_rounds: int = 10,
    reference: str | None = None,
) -> list[Latency]:
    """Ask the same questions in several ways, in turn; every round starts with another way.

    Args:
        ways: the ways, each with a prompt for each question, in the same order of questions.
        batch_sizes: questions answered at a time.
        num_questions: questions timed at each batch size, as far as available, in as many whole batches as they fill.
        warm_up: untimed batches of each way before the timed ones, at each batch size.
        min_rounds: minimum number of timed batches, for which questions are repeated; a median of fewer means little.
        reference: name of the way that the ratios refer to.

    Returns:
        The figures of each way, in the order of the ways, for each batch size.

    Raises:
        ValueError: there are no ways, two share a name, the reference is not one of them, their numbers of prompts
            differ, a number is out of range, or a way does not report its tokens.
    """
    _check(ways, reference)
    for size in batch_sizes:
        check_integer("batch_sizes", size, least=1)
    check_integer("num_questions", num_questions, least=1)
    check_integer("warm_up", warm_up, least=0)
    check_integer("min_rounds", min_rounds, least=1)
    counts = {"num_questions": num_questions, "warm_up": warm_up, "min_rounds": min_rounds}
    return [latency for size in batch_sizes for latency in _measure(ways, size, reference=reference, **counts)]


def _measure(
    ways: Sequence[Way], size: int, *, num_questions: int, warm_up: int, min_rounds: int, reference: str | None
) -> list[Latency]:
    num_timed = min(num_questions, len(ways[0].prompts))
    num_rounds = max(min_rounds, num_timed // size)
    rounds = [[(size * index + row) % num_timed for row in range(size)] for index in range(num_rounds)]
    samples: dict[str, list[_Sample]] = {way.name: [] for way in ways}
    for index in range(warm_up):
        for way in ways:
            _ask(way, rounds[index % num_rounds])
    for index, questions in enumerate(rounds):
        first = index % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            samples[way.name].append(_ask(way, questions))
    others = None if reference is None else samples[reference]
    asked = [question for questions in rounds for question in questions]
    return [_summarise(way, samples[way.name], others, batch_size=size, asked=asked) for way in ways]


def _ask(way: Way, questions: Sequence[int]) -> _Sample:
    """Answer one batch and read the clock at every token."""
    prompts = [way.prompts[index] for index in questions]
    device = torch.device(way.device)
    is_cuda = device.type == "cuda"
    ticks: list[float] = []
    if is_cuda:
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    def note() -> None:
        if is_cuda:
            torch.cuda.synchronize(device)
        ticks.append(perf_counter())

    started = perf_counter()
    rows = way.answer(prompts, note)
    num_bytes = torch.cuda.max_memory_allocated(device) - held if is_cuda else None
    longest = max((len(row) for row in rows), default=0)
    if len(rows) != len(prompts) or not 0 < longest <= len(ticks):
        raise ValueError(
            f"ways: {way.name!r} must give an answer for each prompt and call on_token for each token, got {len(rows)} "
            f"answers for {len(prompts)} prompts, and {len(ticks)} calls for {longest} tokens."
        )
    begins = max(len(row) - _count_answer(way, index, row) for index, row in zip(questions, rows, strict=True))
    return _Sample(ticks[begins] - started, ticks[longest - 1] - started, sum(len(row) for row in rows), num_bytes)


def _count_answer(way: Way, index: int, row: Sequence[int]) -> int:
    """Return how many tokens at the end of a question's row are its answer, at least one."""
    count = way.answer_tokens[index] if isinstance(way.answer_tokens, Sequence) else way.answer_tokens
    if count is None:
        return len(row)
    return min(len(row), max(1, count(row) if callable(count) else count))


def _summarise(
    way: Way, samples: list[_Sample], others: list[_Sample] | None, *, batch_size: int, asked: list[int]
) -> Latency:
    first, first_ratio = _spread(samples, others, lambda sample: sample.first)
    whole, whole_ratio = _spread(samples, others, lambda sample: sample.whole)
    taken = [sample.num_bytes for sample in samples if sample.num_bytes is not None]
    return Latency(
        name=way.name,
        batch_size=batch_size,
        prompt_tokens=fmean(len(way.prompts[index]) for index in asked),
        first_token_ms=first[1],
        first_token_quartiles_ms=(first[0], first[2]),
        answer_ms=whole[1],
        answer_quartiles_ms=(whole[0], whole[2]),
        num_tokens=sum(sample.num_tokens for sample in samples) / len(asked),
        peak_memory_mb=max(taken) / 2**20 if taken else None,
        first_token_ratio=first_ratio,
        answer_ratio=whole_ratio,
    )


def _spread(
    samples: list[_Sample], others: list[_Sample] | None, read: Callable[[_Sample], float]
) -> tuple[list[float], float | None]:
    """Return lower quartile, median and upper quartile in milliseconds, and the median ratio to others."""
    times = [read(sample) for sample in samples]
    parts = [1000 * float(part) for part in np.quantile(times, (0.25, 0.5, 0.75))]
    if others is None:
        return parts, None
    return parts, float(np.median([own / read(other) for own, other in zip(times, others, strict=True)]))


def _check(ways: Sequence[Way], reference: str | None) -> None:
    names = [way.name for way in ways]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"ways: must be at least one, each with its own name, got {names}.")
    if reference is not None and reference not in names:
        raise ValueError(f"reference: must be one of {names}, got {reference!r}.")
    counts = {way.name: len(way.prompts) for way in ways}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"ways: must have a prompt for each of the same questions, at least one, got {counts}.")


def budget_curve(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    counts: Sequence[int],
    *,
    templates: Templates | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    num_timed: int = 16,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Judge and time the answers at each of several numbers of blocks.

    Args:
        counts: numbers of blocks, 0 for none; they may exceed the number in training.
        templates: prompt templates; use those that the adapter was trained with.
        batch_size: questions judged at a time; it does not change the answers.
        num_timed: questions timed, one at a time, all counts in turn; they are spread over the examples.

    Returns:
        ``num_blocks``, ``accuracy`` and ``by_length`` as in ``Score.to_dict``, and the medians ``first_token_ms`` and
        ``answer_ms``, for each count.

    Raises:
        ValueError: there are no examples or counts, a count is negative or repeated, a number is out of range, or a
            question leaves no room for its answer in the base's positions.
    """
    if not counts or len(set(counts)) < len(counts):
        raise ValueError(f"counts: must be at least one number of blocks, each once, got {list(counts)}.")
    for count in counts:
        check_integer("counts", count, least=0)
    check_integer("num_timed", num_timed, least=1)
    answerers = [
        BlockAnswerer(model, tokenizer, templates=templates, num_blocks=count, max_new_tokens=max_new_tokens)
        for count in counts
    ]
    # The largest count needs the most room: fail before judging the others.
    largest = max(answerers, key=lambda answerer: answerer.num_between)
    prompts = largest.encode([example.question for example in examples], name="examples")
    curve = []
    for count, answerer in zip(counts, answerers, strict=True):
        report = judge_answers(answerer, examples, task, batch_size=batch_size, progress=progress)
        by_length = {str(length): score.to_dict() for length, score in report.by_length.items()}
        curve.append({"num_blocks": count, "accuracy": report.final.to_dict(), "by_length": by_length})
    num_timed = min(num_timed, len(prompts))
    timed = [prompts[number * len(prompts) // num_timed] for number in range(num_timed)]
    ways = [by_answerer(str(count), timed, answerer) for count, answerer in zip(counts, answerers, strict=True)]
    latencies = measure_latency(ways, num_questions=len(timed))
    for point, latency in zip(curve, latencies, strict=True):
        found = latency.to_dict()
        point.update(first_token_ms=found["first_token_ms"], answer_ms=found["answer_ms"])
    return curve
