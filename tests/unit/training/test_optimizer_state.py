"""Bytes of an optimiser's state against what the Trainer's own optimiser keeps after a step."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn
from transformers import Trainer, TrainingArguments

from rim_peft.training.simulation import optimizer_bytes

SHAPES = [(64, 128), (8, 16), (40,)]  # the first is large enough for 8-bit states


@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("adamw_torch", None),
        ("adamw_torch_fused", None),
        ("sgd", None),
        ("sgd", "momentum=0.9"),
        ("adagrad", None),
        ("rmsprop", None),
        ("rmsprop", "momentum=0.9"),
        ("adafactor", None),
        ("paged_adamw_32bit", None),
        ("paged_adamw_8bit", None),
        ("adamw_8bit", None),
        ("lion_32bit", None),
        ("paged_lion_8bit", None),
        ("ademamix", None),
        ("ademamix_8bit", None),
    ],
)
def test_it_is_what_the_optimiser_keeps(optim: str, options: str | None) -> None:
    GlobalOptimManager.get_instance().initialize()  # it knows parameters of other tests by where they lay in memory
    args = TrainingArguments("unused", optim=optim, optim_args=options, use_cpu=True, report_to="none")
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = optimizer_class(parameters, **kwargs)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = ("qmap1", "qmap2", "step")  # shared by all tensors, and counters
    kept = 0
    for state in optimizer.state.values():
        kept += sum(value.nbytes for name, value in state.items() if torch.is_tensor(value) and name not in tables)
    momentum = options is not None
    # Adafactor keeps a scalar for each tensor besides.
    assert optimizer_bytes(optim, SHAPES, has_momentum=momentum) == pytest.approx(kept, abs=4 * len(SHAPES))


def test_an_optimiser_that_is_not_known() -> None:
    assert optimizer_bytes("galore_adamw", SHAPES) is None


def test_by_hand() -> None:
    assert optimizer_bytes("paged_adamw_8bit", [(64, 128), (10,)]) == 2 * (8192 + 4 * 32) + 2 * 4 * 10
