"""What is known about blocks, collected, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rim_peft.data.examples import Example
from rim_peft.data.tasks import get_task
from rim_peft.evaluation.faithfulness import judge_steps
from rim_peft.evaluation.probe import Probe, auroc_by_block, gap_closed, train_probe
from rim_peft.evaluation.readouts import BlockReadouts, collect_readouts
from rim_peft.inference import read_blocks
from tests.conftest import build_rim

EXAMPLES = [Example(f"{n}+{n}", answer=str(2 * n), steps=tuple("ab"[: n % 3])) for n in range(5)]


def readouts_of(right: list[list[bool]], states: torch.Tensor | None = None, **changes: object) -> BlockReadouts:
    verdicts = np.array(right)
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


def test_blocks_and_choices_are_scored() -> None:
    readouts = readouts_of([[True, False], [False, False], [True, True]], lengths=[1, 2, 2])
    first, second = readouts.by_block()
    assert (first["all"].num_correct, second["all"].num_correct) == (2, 1)
    assert (first[1].num_correct, first[2].num_correct, first[2].num_rows) == (1, 1, 2)
    assert readouts.any_block()["all"].num_correct == 2
    assert readouts.chosen(np.array([1, 0, 0]))["all"].num_correct == 1


# The probe.


def _separable(num_rows: int, *, seed: int, noise: float) -> BlockReadouts:
    """States whose first dimension says, with noise, whether the readout is right; the second one never varies."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(num_rows, 3, generator=generator) < torch.tensor([0.2, 0.5, 0.8])
    states = torch.randn(num_rows, 3, 4, generator=generator)
    states[..., 0] = right * 2.0 - 1.0 + noise * states[..., 0]
    states[..., 1] = 5.0
    return readouts_of(right.tolist(), states)


def test_a_probe_finds_the_direction_and_ships_with_an_adapter(tmp_path: Path) -> None:
    probe = train_probe(_separable(200, seed=0, noise=0.1))
    assert probe is not None
    test = _separable(100, seed=1, noise=0.1)
    assert auroc_by_block(probe, test) == [1.0, 1.0, 1.0]
    assert int(probe.weight.abs().argmax()) == 0
    assert probe.num_training_rows == 200
    probe.save(tmp_path / "probe.safetensors")
    loaded = Probe.load(tmp_path / "probe.safetensors")
    np.testing.assert_array_equal(loaded.scores(test.states), probe.scores(test.states))
    with pytest.raises(ValueError, match=r"states: must be \(N, 3, 4\), got \(100, 2, 4\)"):
        probe.scores(test.states[:, :2])


def test_a_probe_of_noise_is_at_chance() -> None:
    probe = train_probe(_separable(300, seed=0, noise=1e6))
    assert probe is not None
    areas = [area for area in auroc_by_block(probe, _separable(300, seed=1, noise=1e6)) if area is not None]
    assert all(0.35 < area < 0.65 for area in areas)


def test_a_probe_needs_both_kinds_and_enough_questions() -> None:
    assert train_probe(readouts_of([[True, True]] * 20)) is None
    with pytest.raises(ValueError, match="at least 10 questions, got 3"):
        train_probe(readouts_of([[True, False]] * 3))
    probe = train_probe(_separable(50, seed=0, noise=0.1))
    assert probe is not None
    all_right = _separable(20, seed=1, noise=0.1)
    assert auroc_by_block(probe, readouts_of([[True, False, True]] * 20, all_right.states)) == [None, None, None]


def test_the_gap_may_be_closed_or_overdone() -> None:
    assert gap_closed(0.5, 0.7, 0.6) == pytest.approx(0.5)
    assert gap_closed(0.5, 0.7, 0.4) == pytest.approx(-0.5)
    assert gap_closed(0.7, 0.7, 0.7) is None


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
