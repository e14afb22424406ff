"""What is known about blocks, collected, and what is made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from rim_peft.data.examples import Example, Templates
from rim_peft.data.tokenization import tokenize_example
from rim_peft.evaluation.readouts import BlockReadouts, collect_readouts, gap_closed, judge_steps
from rim_peft.evaluation.scores import Score
from rim_peft.inference import Readout, read_blocks
from rim_peft.tasks import get_task
from tests.conftest import build_rim, build_tokenizer

EXAMPLES = [Example(f"{n}+{n}", answer=str(2 * n), steps=tuple("ab"[: n % 3])) for n in range(5)]


def readouts_of(right: Any, states: torch.Tensor | None = None, **changes: object) -> BlockReadouts:
    verdicts = np.array(right, dtype=bool)
    rows, blocks = verdicts.shape
    values = {
        "texts": [["x"] * blocks] * rows,
        "answers": [["x"] * blocks] * rows,
        "right": verdicts,
        "log_probs": np.zeros((rows, blocks)),
        "states": torch.zeros(rows, blocks, 4) if states is None else states,
        "lengths": [None] * rows,
        **changes,
    }
    return BlockReadouts(**values)  # type: ignore[arg-type]


def test_collecting_reads_the_blocks_whatever_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    model, task = build_rim(num_blocks=3), get_task("gsm8k")
    one, many = (
        collect_readouts(model, tokenizer, EXAMPLES, task, max_new_tokens=4, batch_size=size) for size in (1, 4)
    )
    plain = [read_blocks(model, tokenizer, [example.question], max_new_tokens=4)[0] for example in EXAMPLES]
    assert one.texts == many.texts == [[readout.text for readout in row] for row in plain]
    assert one.answers == [[task.read_answer(text) for text in row] for row in one.texts]
    expected = torch.stack([torch.stack([readout.hidden_state for readout in row]) for row in plain])
    torch.testing.assert_close(one.states, expected)
    torch.testing.assert_close(many.states, expected, atol=1e-5, rtol=1e-5)
    sums = [[sum(readout.token_log_probs) for readout in row] for row in plain]
    np.testing.assert_allclose(one.log_probs, sums)
    assert one.lengths == [None, 1, 2, None, 1]
    assert one.num_blocks == 3
    with pytest.raises(ValueError, match="examples: there are none"):
        collect_readouts(model, tokenizer, [], task)


def test_the_words_of_the_answer_template_are_not_judged(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> list[list[Readout]]:
        texts = ("It is (B)", "It is (C)")
        return [[Readout(k, text, [2], [0.0], torch.zeros(4)) for k, text in enumerate(texts, start=1)]]

    monkeypatch.setattr("rim_peft.evaluation.readouts.read_blocks", read)
    rows, templates = [Example("a", answer="C")], Templates(answer="It is {answer}")
    readouts = collect_readouts(build_rim(), tokenizer, rows, get_task("logiqa"), templates=templates)
    assert readouts.right.tolist() == [[False, True]]
    assert readouts.verdicts == [get_task("logiqa").judge("(C)", "C")]
    assert readouts.answers == [["B", "C"]]
    assert readouts.texts == [["It is (B)", "It is (C)"]]


def test_blocks_and_choices_are_scored() -> None:
    readouts = readouts_of([[True, False], [False, False], [True, True]], lengths=[1, 2, 2])
    first, second = readouts.by_block()
    assert (first["all"].num_correct, second["all"].num_correct) == (2, 1)
    assert (first[1].num_correct, first[2].num_correct, first[2].num_rows) == (1, 1, 2)
    assert readouts.any_block()["all"].num_correct == 2
    assert readouts.chosen(np.array([1, 0, 0]))["all"].num_correct == 1


def test_the_gap_may_be_closed_or_overdone() -> None:
    final, best = Score(50, 100), Score(70, 100)
    assert gap_closed(final, best, Score(60, 100)) == pytest.approx(0.5)
    assert gap_closed(final, best, Score(40, 100)) == pytest.approx(-0.5)
    assert gap_closed(Score(61, 100), best, best) is None  # nine rows say nothing


# Faithfulness.


def test_steps_are_compared_with_what_training_wrote() -> None:
    examples = [
        Example("q", answer="5", steps=("1", "2", "3")),  # blocks read out 2, 3, then the answer
        Example("q", answer="5", steps=("1", "2", "3")),
        Example("q", answer="5", steps=("1", "2")),
        Example("q", answer="5", steps=("1",)),  # no step is read out
    ]
    texts = [["2", "3", "5"], ["2", "4", "6"], ["9", "5", "5"], ["5", "5", "5"]]
    right = [[text == "5" for text in row] for row in texts]
    found = judge_steps(readouts_of(right, texts=texts), examples)
    by_block = [
        (entry["block"], entry["step_right"]["num_correct"], entry["step_right"]["num_rows"])
        for entry in found["by_block"]
    ]
    assert by_block == [(1, 2, 3), (2, 1, 2)]
    assert (found["answer_right_if_steps_right"]["num_correct"], found["answer_right_if_steps_right"]["num_rows"]) == (
        1,
        1,
    )
    assert (
        found["answer_right_if_a_step_wrong"]["num_correct"],
        found["answer_right_if_a_step_wrong"]["num_rows"],
    ) == (1, 2)
    with pytest.raises(ValueError, match="examples: must have steps"):
        judge_steps(readouts_of([[True]]), [Example("q", answer="5")])


def test_steps_are_compared_as_the_tokenizer_writes_them() -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    templates, examples = Templates(step="<|user|>{step}"), [Example("q", answer="5", steps=("A", "B <bos>"))]
    readouts = readouts_of([[False, True]], texts=[["b <bos>", "5"]])
    found = judge_steps(readouts, examples, templates=templates, tokenizer=tokenizer)
    assert found["by_block"][0]["step_right"]["num_correct"] == 1
    written = tokenize_example(examples[0], tokenizer, templates)["step_ids"][1]
    assert tokenizer.decode(written, skip_special_tokens=True) == "b <bos>"


def test_blocks_that_read_out_their_own_step_are_judged_by_it() -> None:
    examples = [Example("q", answer="5", steps=("1", "2")), Example("q", answer="5", steps=("1",))]
    texts = [["1", "3", "5"], ["1", "5", "5"]]
    right = [[text == "5" for text in row] for row in texts]
    found = judge_steps(readouts_of(right, texts=texts), examples, steps_ahead=0)
    by_block = [
        (entry["block"], entry["step_right"]["num_correct"], entry["step_right"]["num_rows"])
        for entry in found["by_block"]
    ]
    assert by_block == [(1, 2, 2), (2, 0, 1)]
