"""Figures of the blocks, against sums worked out by hand over batches that differ in size and blocks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from rim_peft import GroundingConfig
from rim_peft.sequence import Labels
from rim_peft.training.metrics import BlockMetrics, TextMetrics


def _add(metrics: BlockMetrics, log_probs: list[float], blocks: list[int], weights: list[list[float]]) -> None:
    places = torch.arange(len(blocks))
    labels = Labels(places, places, torch.zeros_like(places), torch.tensor(blocks), in_place=places < 0)
    is_top1 = torch.tensor([value > -1.5 for value in log_probs])
    table = torch.tensor(weights)
    metrics.add(torch.tensor(log_probs), is_top1, labels, table, table > -1)


def test_sums_run_over_all_batches_since_the_last_line() -> None:
    accelerator = Accelerator(cpu=True)
    metrics = BlockMetrics()
    _add(metrics, [-1.0, -2.0], [1, 1], [[0.5], [1.0]])
    _add(metrics, [-3.0, -1.0], [1, 2], [[0.0, 0.75]])
    found = metrics.read(accelerator)
    assert found == {
        "loss_by_block/1": 2.0,
        "token_accuracy_by_block/1": 1 / 3,
        "weight_by_block/1": 0.5,
        "loss_by_block/2": 1.0,
        "token_accuracy_by_block/2": 1.0,
        "weight_by_block/2": 0.75,
    }
    assert metrics.read(accelerator) == {}


def test_a_block_that_a_sample_lacks_does_not_count() -> None:
    metrics = BlockMetrics()
    places = torch.arange(1)
    labels = Labels(places, places, documents=places, blocks=torch.tensor([2]), in_place=places < 0)
    weights = torch.tensor([[1.0, 0.5], [1.0, 0.0]])
    metrics.add(
        torch.tensor([-1.0]), torch.tensor([True]), labels, weights, torch.tensor([[True, True], [True, False]])
    )
    assert metrics.read(Accelerator(cpu=True))["weight_by_block/2"] == 0.5


@pytest.mark.parametrize("kind", [BlockMetrics, TextMetrics])
def test_sums_go_on_from_json_to_the_last_bit(kind: Any) -> None:
    accelerator = Accelerator(cpu=True)
    before, after = kind(), kind()
    before._sums = torch.rand(5, 3) if kind is BlockMetrics else torch.tensor([3, 7])
    after.go_on(json.loads(json.dumps(before.running(accelerator))), process=0, device=torch.device("cpu"))
    torch.testing.assert_close(after._sums, before._sums, atol=0, rtol=0)
    assert after.read(accelerator) == before.read(accelerator)
    after.go_on(None, process=0, device=torch.device("cpu"))
    assert after.running(accelerator) is None


@pytest.mark.parametrize("name", ["loss_by_block/2", "block_2/loss", "eval_block_2/loss"])
def test_a_loss_of_a_block_is_better_when_lower_under_both_names(name: str, tmp_path: Path) -> None:
    """The parent goes by the end of a name; runs of earlier versions have the old one in their recipe."""
    args = GroundingConfig(output_dir=str(tmp_path), metric_for_best_model=name)
    assert args.metric_for_best_model == f"{'eval_' if name.startswith('eval_') else ''}loss_by_block/2"
    assert args.greater_is_better is False
    other = GroundingConfig(output_dir=str(tmp_path), metric_for_best_model="block_2/token_accuracy")
    assert (other.metric_for_best_model, other.greater_is_better) == ("token_accuracy_by_block/2", True)
