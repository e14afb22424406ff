"""Rows, trained weights and gradients of tiny trainings, and how one resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from rim_peft import GroundingTrainer, RefinementTrainer

ROWS: list[dict[str, Any]] = [
    {"question": "2+3", "steps": ["2", "2+3=5"], "answer": "5"},
    {"question": "1+1+7", "steps": ["1", "1+1=2", "2+7=9"], "answer": "9"},
    {"question": "4", "steps": ["4"], "answer": "4"},
    {"question": "6-5+3", "steps": ["6", "6-5=1", "1+3=4"], "answer": "4"},
]

every_stage = pytest.mark.parametrize(
    "trainer_class", [GroundingTrainer, RefinementTrainer], ids=["grounding", "refinement"]
)


def stream() -> IterableDataset:
    """The rows as a stream."""
    return Dataset.from_list(ROWS).to_iterable_dataset()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that a training changes."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, loss: Tensor | None = None) -> dict[str, Tensor]:
    """The gradients of a loss, or those that are there."""
    if loss is not None:
        model.zero_grad()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_mode(model: nn.Module) -> nn.Module:
    """Training mode without dropout, which would differ between two ways of computing the same."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch_of(trainer: Any) -> Any:
    """All of a trainer's rows in one batch."""
    return trainer.data_collator(list(trainer.train_dataset))


def longer(rows: list[dict[str, Any]], *, most: int = 7) -> list[dict[str, Any]]:
    """Rows whose questions differ in length."""
    return [{**row, "question": row["question"] + "+0" * (n % most)} for n, row in enumerate(rows)]


def separate_loss(trainer: Any, readouts: Any, weights: Any) -> Tensor:
    """The method's formula, one sequence ``x, m_<=k, readout_k`` at a time."""
    model, rows = trainer.model, list(trainer.train_dataset)
    blocks = model.peft_config["default"].block_tokens
    total: Any = 0
    for row in rows:
        for k, (readout, weight) in enumerate(zip(readouts(row), weights(row), strict=True), start=1):
            trunk = [*row["prompt_ids"], *blocks.ids(k)]
            logits = model(input_ids=torch.tensor([[*trunk, *readout]])).logits[0]
            log_probs = logits[len(trunk) - 1 : -1].log_softmax(-1)
            total = total - weight * log_probs[range(len(readout)), list(readout)].sum()
    return total / len(rows)


def assert_trains_formula(trainer: Any, readouts: Any, weights: Any, *, tolerance: float = 1e-5) -> None:
    """Compare a batch's loss and gradients with those of :func:`separate_loss`."""
    train_mode(trainer.model)
    ours = trainer.compute_loss(trainer.model, batch_of(trainer))
    assert_same_gradients(trainer.model, ours, separate_loss(trainer, readouts, weights), tolerance=tolerance)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def assert_same_gradients(
    model: nn.Module, ours: Tensor, theirs: Tensor, *, tolerance: float = 1e-5
) -> dict[str, Tensor]:
    """Compare two losses of one model, and their gradients, which are returned."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    expected, found = gradients(model, theirs), gradients(model, ours)
    assert found.keys() == expected.keys()
    assert not hasattr(model, "peft_config") or any("lora_rim_memory" in name for name in found)
    for name, gradient in expected.items():  # sums run in another order: the tolerance is of a tensor's largest one
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, atol=tolerance * scale, rtol=tolerance, msg=name)
    return found


def assert_resumes_exactly(start: Callable[[], Any], *steps: int) -> Any:
    """Train without a stop, then from the checkpoints of some steps, to the same weights; return the first trainer.

    Args:
        start: makes a trainer with a new model.
        steps: the checkpoints' steps.
    """
    unbroken = start()
    unbroken.train()
    for step in steps:
        resumed = start()
        resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-{step}")
        assert_equal(trained(resumed.model), trained(unbroken.model))
    return unbroken
