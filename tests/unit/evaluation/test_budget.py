"""The budget curve against one number of blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from rim_peft.data.examples import Example
from rim_peft.evaluation import evaluate_accuracy
from rim_peft.evaluation import latency as module
from rim_peft.evaluation.latency import Latency, Way, budget_curve
from rim_peft.inference import answer_questions
from rim_peft.tasks import Task
from tests.conftest import MakeRim

COUNTS = (0, 1, 3)
QUESTIONS = ["a", "two", "c c", "four?", "e", "zz"]


@dataclass(frozen=True)
class SameText(Task):
    """A task that compares answers as texts."""

    name: ClassVar[str] = "same-text"


def make_examples(model: Any, tokenizer: Any) -> list[Example]:
    """Examples whose gold answers are what some of the counts answer: 1 block the first half, 3 blocks the second."""
    first, second = (
        list(answer_questions(model, tokenizer, QUESTIONS, num_blocks=count, max_new_tokens=4)) for count in (1, 3)
    )
    gold = [*first[:3], *second[3:]]
    assert all(one != other for one, other in zip(first, second, strict=True))
    steps = [("0",), ("0",), ("0", "1"), ("0", "1"), None, None]
    return [
        Example(question, answer=answer, steps=some)
        for question, answer, some in zip(QUESTIONS, gold, steps, strict=True)
    ]


@pytest.mark.parametrize("can_decode", [True, False])
def test_the_curve_is_one_count_at_a_time(
    can_decode: bool, make_rim: MakeRim, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = make_rim(), SameText()
    examples = make_examples(model, tokenizer)
    monkeypatch.setattr("rim_peft.inference.block_answerer.can_decode", lambda model: can_decode)
    options: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 4}
    curve = budget_curve(model, tokenizer, examples, task, COUNTS, num_timed=2, **options)
    assert [point["num_blocks"] for point in curve] == [0, 1, 3]
    assert [point["accuracy"]["num_correct"] for point in curve][1:] == [3, 3]
    assert [point["by_length"]["1"]["num_correct"] for point in curve][1:] == [2, 0]
    for point, count in zip(curve, COUNTS, strict=True):
        report = evaluate_accuracy(model, tokenizer, examples, task, num_blocks=count, **options)
        assert point["accuracy"] == report.final.to_dict()
        assert point["by_length"] == {str(length): score.to_dict() for length, score in report.by_length.items()}
        assert set(point) == {"num_blocks", "accuracy", "by_length", "first_token_ms", "answer_ms"}
        assert 0 < point["first_token_ms"] <= point["answer_ms"]


@pytest.mark.parametrize("places", [[0, 2, 4], [0, 1, 3, 4]])  # spread over the examples
def test_timed_answers_are_those_that_are_judged(
    places: list[int], make_rim: MakeRim, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_rim()
    examples = make_examples(model, tokenizer)
    seen: list[Way] = []

    def measure(ways: list[Way], *, num_questions: int) -> list[Latency]:
        seen.extend(ways)
        assert num_questions == len(places)
        return [Latency(way.name, 1, 1.0, 2.0, (2.0, 2.0), 3.0, (3.0, 3.0), 1.0, None, None, None) for way in ways]

    monkeypatch.setattr(module, "measure_latency", measure)
    curve = budget_curve(model, tokenizer, examples, SameText(), [3, 0], max_new_tokens=4, num_timed=len(places))
    assert [(point["first_token_ms"], point["answer_ms"]) for point in curve] == [(2.0, 3.0)] * 2
    chosen = [QUESTIONS[place] for place in places]
    for way, count in zip(seen, (3, 0), strict=True):
        texts = [
            tokenizer.decode(row, skip_special_tokens=True).strip() for row in way.answer(way.prompts, lambda: None)
        ]
        assert texts == list(answer_questions(model, tokenizer, chosen, num_blocks=count, max_new_tokens=4))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([], r"counts: must be at least one number of blocks, each once, got \[\]"),
        ([1, 1], r"each once, got \[1, 1\]"),
        ([-1], "counts: must be an integer of at least 0, got -1"),
    ],
)
def test_counts_that_cannot_be_are_named(counts: list[int], message: str, make_rim: MakeRim, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        budget_curve(make_rim(), tokenizer, [Example("a", answer="b")], SameText(), counts)


def test_room_for_the_largest_count_is_asked_for_first(
    make_rim: MakeRim, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Any] = []
    monkeypatch.setattr(module, "judge_answers", lambda answerer, *args, **options: judged.append(answerer))
    with pytest.raises(ValueError, match=r"examples\[0\]: prompt \(2 tokens\), blocks \(800\) and answer"):
        budget_curve(make_rim(), tokenizer, [Example("a", answer="b")], SameText(), [1, 200])
    assert judged == []
