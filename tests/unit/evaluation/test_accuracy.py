"""Scores against counts made by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from rim_peft.data.examples import Example, Templates
from rim_peft.evaluation import evaluate_accuracy
from rim_peft.evaluation.accuracy import judge_answers
from rim_peft.evaluation.answers import with_writable_answers
from rim_peft.evaluation.scores import Score
from rim_peft.inference import (
    BlockAnswerer,
    Readout,
    ThoughtAnswerer,
    answer_with_thoughts,
    decode_with_thoughts,
    read_blocks,
)
from rim_peft.tasks import get_task
from tests.conftest import EOS_ID, build_rim, build_tokenizer

EXAMPLES = [
    Example("a", answer="1", steps=("0",)),
    Example("b", answer="2", steps=("0", "1")),
    Example("c", answer="3", steps=("0", "1")),
    Example("d", answer="4", steps=None),
]


class _Said(BlockAnswerer):
    """What a model would say: for each question the readouts of its blocks."""

    texts = {"a": ["0", "1"], "b": ["2", "#### 2"], "c": ["3", "so 33"], "d": ["none", "4.0"]}  # noqa: RUF012

    def answer(self, questions: Sequence[Any], **_: Any) -> Iterator[str]:
        return (self.texts[question][-1] for question in questions)

    def read_blocks(self, questions: Sequence[Any]) -> list[list[Readout]]:
        return [
            [Readout(k, text, [EOS_ID], [0.0], torch.empty(0)) for k, text in enumerate(self.texts[question], start=1)]
            for question in questions
        ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_final_answers_are_counted_by_length(batch_size: int, tokenizer: PreTrainedTokenizerFast) -> None:
    report = judge_answers(
        _Said(build_rim(num_blocks=2), tokenizer), EXAMPLES, get_task("gsm8k"), batch_size=batch_size
    )
    assert report.final == Score(num_correct=3, num_rows=4)
    assert report.by_length == {1: Score(1, 1), 2: Score(1, 2)}
    assert report.by_block == []
    assert report.predictions == ["1", "#### 2", "so 33", "4.0"]


def test_the_words_of_the_answer_template_are_no_part_of_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Example("a", answer="B"), Example("b", answer="C"), Example("c", answer="C")]
    said = {"a": ["The answer is C.", "The answer is B."], "b": ["The answer isC.", "C"], "c": ["", "The answer is C"]}
    templates = Templates(answer="<|assistant|> The answer is {answer}.<bos>")
    answerer = type("_Other", (_Said,), {"texts": said})(build_rim(num_blocks=2), tokenizer, templates=templates)
    report = judge_answers(answerer, rows, get_task("logiqa"), by_block=True)
    assert report.final == report.by_rule["leading-letter"] == Score(3, 3)
    assert report.by_block[0]["all"] == Score(0, 3)
    assert report.predictions == [texts[-1] for texts in said.values()]


def test_an_answer_may_hold_what_ends_a_written_step(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Example("a", answer="3\n4"), Example("b", answer="3\n4"), Example("c", answer="3\n4")]
    said = {"a": ["sort\nthem\n3\n4"], "b": ["3\n4"], "c": ["sort\n4\n4"]}
    templates = Templates(answer="It is:\n{answer}\n.")
    for before, after, options in (("", "", {}), ("It is:\n", "\n.", {"templates": templates})):
        texts = {name: [text.replace("3\n4", f"{before}3\n4{after}") for text in all_] for name, all_ in said.items()}
        answerer = type("_Other", (_Said,), {"texts": texts})(build_rim(num_blocks=1), tokenizer, **options)
        report = judge_answers(answerer, rows, get_task("prosqa"), separator="\n")
        assert report.final == report.by_rule["exact-text"] == Score(2, 3)


def test_every_block_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    report = judge_answers(_Said(build_rim(num_blocks=2), tokenizer), EXAMPLES, get_task("gsm8k"), by_block=True)
    assert report.by_block == [
        {"all": Score(2, 4), 1: Score(0, 1), 2: Score(2, 2)},
        {"all": Score(3, 4), 1: Score(1, 1), 2: Score(1, 2)},
    ]
    assert report.by_rule == {"last-number-float": Score(3, 4), "strict-string": Score(2, 4)}
    assert report.to_dict() == {
        "answer_rule": "last-number-float",
        "num_blocks": 2,
        **Score(3, 4).to_dict(),
        "num_cut": 0,
        "by_rule": {"last-number-float": Score(3, 4).to_dict(), "strict-string": Score(2, 4).to_dict()},
        "by_length": {"1": Score(1, 1).to_dict(), "2": Score(1, 2).to_dict()},
        "by_block": [
            {"all": Score(2, 4).to_dict(), "1": Score(0, 1).to_dict(), "2": Score(2, 2).to_dict()},
            {"all": Score(3, 4).to_dict(), "1": Score(1, 1).to_dict(), "2": Score(1, 2).to_dict()},
        ],
    }
    assert Score(3, 4).to_dict()["standard_error"] == 0.216506  # sqrt(0.75 * 0.25 / 4)


def test_a_real_model_is_judged_by_its_own_readouts(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(num_blocks=2)
    said = [row[-1].text for row in read_blocks(model, tokenizer, ["a", "b"], max_new_tokens=4)]
    examples = [Example("a", answer="5"), Example("b", answer="6")]
    report = evaluate_accuracy(model, tokenizer, examples, get_task("gsm8k"), max_new_tokens=4)
    assert report.predictions == said
    assert report.num_blocks == 2


def test_answers_that_had_not_ended_are_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_rim(num_blocks=2)
    questions = ["a", "b", "c"]
    said = [row[-1].token_ids for row in read_blocks(model, tokenizer, questions, max_new_tokens=4)]
    # What the first answer says second is declared to be the end.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(said[0][1])
    expected = sum(said[0][1] not in ids for ids in said)
    assert 0 < expected < 3
    examples = [Example(question, answer="5") for question in questions]
    for by_block in (True, False):
        caplog.clear()
        report = evaluate_accuracy(
            model, tokenizer, examples, get_task("gsm8k"), by_block=by_block, max_new_tokens=4, batch_size=2
        )
        assert report.num_cut == report.to_dict()["num_cut"] == expected
        (message,) = caplog.messages
        assert f"max_new_tokens: {expected} of 3 answers were cut at 4 tokens" in message
    assert evaluate_accuracy(model, tokenizer, examples[:1], get_task("gsm8k"), max_new_tokens=4).num_cut == 0
    assert len(caplog.messages) == 1


def test_answers_after_thoughts_that_had_not_ended_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim()
    prompts = [tokenizer(question)["input_ids"] for question in "abc"]
    said = decode_with_thoughts(model, prompts, num_thoughts=2, eos_id=None, max_new_tokens=4)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(said[0][1])
    expected = [text for ids in said if said[0][1] not in ids for text in [tokenizer.decode(ids).strip()]]
    assert 0 < len(expected) < 3
    cut: list[str] = []
    options: dict[str, Any] = {"num_thoughts": 2, "max_new_tokens": 4, "templates": Templates(prompt="{question}")}
    texts = list(answer_with_thoughts(model, tokenizer, list("abc"), on_cut=cut.append, **options))
    assert cut == [text for text in texts if text in expected]
    assert len(cut) == len(expected)


def test_only_blocks_are_judged_by_block(tokenizer: PreTrainedTokenizerFast) -> None:
    thoughts = ThoughtAnswerer(build_rim(), tokenizer, num_thoughts=2)
    with pytest.raises(ValueError, match=r"by_block: needs a BlockAnswerer, .* got ThoughtAnswerer"):
        judge_answers(thoughts, EXAMPLES, get_task("gsm8k"), by_block=True)


def test_no_examples_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="examples: there are none"):
        evaluate_accuracy(build_rim(), tokenizer, [], get_task("gsm8k"))


def build_normalising_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


def test_answers_are_judged_as_the_tokenizer_writes_them() -> None:
    task, tokenizer = get_task("prosqa"), build_normalising_tokenizer()
    examples = [Example("?", answer=text) for text in ("cafe\u0301", "A.", "b", "<eos>")]
    written = with_writable_answers(examples, tokenizer, task)
    assert [example.answer for example in written] == ["caf\u00e9", "a.", "b", "<eos>"]
    assert task.is_correct("caf\u00e9", written[0].answer)
    assert with_writable_answers(examples, build_tokenizer(), task) == examples


def test_an_answer_that_no_readout_can_be_stays() -> None:
    """A letter that the rule does not read in lower case, a number that it never reads."""
    for task, answer in (("logiqa", "B"), ("gsm8k", "1E3")):
        examples = [Example("?", answer=answer)]
        assert with_writable_answers(examples, build_normalising_tokenizer(), get_task(task)) == examples
