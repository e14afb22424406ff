"""Thinking for longer or shorter: accuracy and time by the number of blocks after the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rim_peft.data.examples import Example, Templates
from rim_peft.data.preparation import tokenize_prompts
from rim_peft.data.tasks import Task
from rim_peft.data.tokenization import padding_id
from rim_peft.evaluation.accuracy import evaluate_accuracy
from rim_peft.evaluation.latency import Latency, measure_latency
from rim_peft.evaluation.ways import Way, by_decoder, by_generate
from rim_peft.inference.decoding import BlockDecoder, can_decode, check_number
from rim_peft.tuner.config import active_config


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
    """Judge and time the answers after each of several numbers of blocks.

    Args:
        model: a model with an active RIM adapter.
        tokenizer: the base's tokenizer.
        examples: held-out examples, at least one.
        task: reads and compares answers.
        counts: numbers of blocks, 0 for none; more than the adapter was trained with are allowed.
        templates: how prompts are written; the ones that the adapter was trained with.
        max_new_tokens: tokens of an answer at most, EOS included.
        batch_size: questions judged at a time; it does not change the answers.
        num_timed: questions that are timed, one at a time, all counts in turn; they are spread over the examples.
        progress: show a progress bar for each count on stderr.

    Returns:
        For each count ``num_blocks``, ``accuracy`` and ``by_length`` as ``Score.to_dict`` has them, and medians
        ``first_token_ms`` and ``answer_ms``.

    Raises:
        ValueError: there are no examples, counts are none, negative or there twice, a number is out of range, or a
            question leaves no room for its answer in the base's positions.
    """
    _check_counts(counts)
    check_number("num_timed", num_timed, least=1)
    prompts = tokenize_prompts(
        [example.question for example in examples],
        tokenizer,
        templates,
        vocab_size=active_config(model).block_tokens.begin,
    )
    # The largest count needs the most room: said before the others are judged.
    _decoder(model, tokenizer, max(counts), max_new_tokens=max_new_tokens).check_room(prompts, name="examples")
    curve = []
    for count in counts:
        report = evaluate_accuracy(
            model,
            tokenizer,
            examples,
            task,
            templates=templates,
            num_blocks=count,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        by_length = {str(length): score.to_dict() for length, score in report.by_length.items()}
        curve.append({"num_blocks": count, "accuracy": report.final.to_dict(), "by_length": by_length})
    timed = prompts[:: max(1, len(prompts) // num_timed)][:num_timed]
    latencies = _time_counts(model, tokenizer, timed, counts, max_new_tokens=max_new_tokens)
    for point, latency in zip(curve, latencies, strict=True):
        found = latency.to_dict()
        point.update(first_token_ms=found["first_token_ms"], answer_ms=found["answer_ms"])
    return curve


def _time_counts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    max_new_tokens: int,
) -> list[Latency]:
    """Time answers as ``answer_questions`` makes them."""

    def way(count: int) -> Way:
        decoder = _decoder(model, tokenizer, count, max_new_tokens=max_new_tokens)
        if can_decode(model):
            return by_decoder(str(count), prompts, decoder)
        return by_generate(
            str(count),
            prompts,
            model,
            num_blocks=count,
            eos_id=tokenizer.eos_token_id,
            pad_id=decoder.pad_id,
            max_new_tokens=max_new_tokens,
        )

    return measure_latency([way(count) for count in counts], num_questions=len(prompts))


def _decoder(model: PeftModel, tokenizer: PreTrainedTokenizerBase, count: int, *, max_new_tokens: int) -> BlockDecoder:
    pad_id = padding_id(tokenizer, active_config(model).block_tokens.begin)
    return BlockDecoder(
        model, eos_id=tokenizer.eos_token_id, pad_id=pad_id, num_blocks=count, max_new_tokens=max_new_tokens
    )


def _check_counts(counts: Sequence[int]) -> None:
    if not counts or len(set(counts)) < len(counts):
        raise ValueError(f"counts: must be at least one number of blocks, each once, got {list(counts)}.")
    for count in counts:
        check_number("counts", count, least=0)
