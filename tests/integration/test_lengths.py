"""Curricula by length: which rows and blocks come when, which layers run, how phases end, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from rim_peft import GroundingConfig, GroundingTrainer
from rim_peft.data.objective import TokenizedRow
from rim_peft.training.baseline import BaselineTrainer
from rim_peft.training.coconut import CoconutTrainer
from rim_peft.training.head import CompiledLayers
from rim_peft.training.readout_trainer import ReadoutTrainer
from rim_peft.tuner.layers import find_layers
from tests.conftest import MakeTrainer, build_base, build_rim
from tests.training import (
    ROWS,
    assert_resumes_exactly,
    assert_trains_formula,
    batch_of,
    gradients,
    longer,
    train_mode,
    trained,
)


def test_a_curriculum_by_length_has_as_many_blocks_as_its_longest_chain(make_trainer: MakeTrainer) -> None:
    rows = longer(ROWS)
    options = {"rows": rows, "length_shares": [0.25, 0.25, 0.5], "schedule": "uniform", "max_steps": 8}
    trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=4), **options)
    trainer.state.max_steps = 8
    everything = list(trainer.train_dataset)
    for step, num_blocks in ((0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (7, 4)):
        trainer.state.global_step = step
        # Rows that are longer than their phase come in a batch that reaches over its end: they keep their blocks.
        lengths = {tuple(row["prompt_ids"]): max(num_blocks, len(row["step_ids"])) for row in everything}

        def readouts(row: TokenizedRow, lengths: Any = lengths) -> list[list[int]]:
            given = [*row["step_ids"][1:], row["answer_ids"]]
            return given + [row["answer_ids"]] * (lengths[tuple(row["prompt_ids"])] - len(given))

        def weights(row: TokenizedRow, lengths: Any = lengths) -> list[float]:
            before, all_blocks = len(row["step_ids"]) - 1, lengths[tuple(row["prompt_ids"])]
            return [1.0] * before + [1 / (all_blocks - before)] * (all_blocks - before)

        assert_trains_formula(trainer, readouts, weights)


@pytest.mark.parametrize("epochs", [False, True])
@pytest.mark.parametrize(
    "more",
    [{}, {"dataloader_drop_last": True}, {"layer_shares": [0.5, 0.5, 1.0]}],
    ids=["", "drop_last", "layer_shares"],
)
def test_a_curriculum_by_length_comes_in_order_and_resumes_exactly(
    epochs: bool, more: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    rows = longer(ROWS * 3)
    rows = rows[:11] if "dataloader_drop_last" in more else rows
    options = {
        **more,
        "rows": rows,
        "length_shares": [0.25, 0.25, 0.5],
        "per_device_train_batch_size": 2,
        "save_steps": 5,
        "logging_steps": 1,
        **({"max_steps": -1, "num_train_epochs": 2} if epochs else {"max_steps": 12}),
    }
    drawn: list[list[list[int]]] = []  # by training: each batch's numbers of steps

    def start() -> ReadoutTrainer:
        trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=3, lora_dropout=0.2), **options)
        lengths: list[list[int]] = []
        drawn.append(lengths)
        loss = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, **given: (  # type: ignore[method-assign]
            lengths.append(inputs["num_steps"].tolist()) or loss(model, inputs, **given)
        )
        return trainer

    trainer = assert_resumes_exactly(start, 5)
    longest = [max(batch) for batch in drawn[0]]
    first, second = trainer.lengths.begins[1:]
    assert (max(longest[:first]), max(longest[first:second]), max(longest[second:])) == (1, 2, 3)
    tokens = [line["num_tokens"] for line in trainer.state.log_history if "loss" in line]
    assert tokens[1] < tokens[-1] - tokens[-3]


@pytest.mark.parametrize(
    ("trainer_class", "compiled"),
    [(GroundingTrainer, False), (GroundingTrainer, True), (BaselineTrainer, False), (CoconutTrainer, False)],
)
def test_early_phases_run_and_train_the_lowest_layers_alone(
    trainer_class: Any, compiled: bool, make_trainer: MakeTrainer
) -> None:
    rows = longer(ROWS * 3)
    base = build_base(num_hidden_layers=4)
    model = build_rim(base=base, num_blocks=3)
    options = {
        "rows": rows,
        "length_shares": [0.25, 0.25, 0.5],
        "layer_shares": [0.25, 0.75, 1],
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": trainer_class is not CoconutTrainer,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    trainer = make_trainer(trainer_class, model, **options)
    before = trained(model)
    changed: list[set[int]] = []  # by step: layers whose LoRA has changed since the step before

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            nonlocal before
            now = trained(model)
            names = [name for name, tensor in now.items() if not tensor.equal(before[name])]
            changed.append({int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))})
            before = now

    trainer.add_callback(Watch())
    layers = list(base.model.layers)
    if compiled:  # what runs compiled is the layer; here it runs as it is, which says the same in less time
        trainer._compiled_layers = CompiledLayers(base, backend="eager")
    trainer.train()
    assert changed == [{0}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    assert list(base.model.layers) == layers
    logged = [line.get("num_layers") for line in trainer.state.log_history if "loss" in line]
    assert logged == [1.0, 3.0, None, None]


def test_the_loss_of_an_early_phase_is_that_of_a_shallower_model(make_trainer: MakeTrainer) -> None:
    rows = [{**row, "steps": row["steps"][-1:]} for row in ROWS]
    options = {"rows": rows, "length_shares": [0.5, 0.5], "layer_shares": [0.5, 1.0], "max_steps": 2}
    model = build_rim(num_blocks=1)
    trainer = make_trainer(GroundingTrainer, model, **options)
    whole = make_trainer(GroundingTrainer, shallow := build_rim(num_blocks=1), rows=rows, max_steps=2)
    find_layers(shallow.get_base_model())[0].layers = nn.ModuleList(find_layers(shallow.get_base_model())[1][:1])
    trainer.state.max_steps = whole.state.max_steps = 2
    for part in (trainer, whole):
        train_mode(part.model)
    ours = trainer.training_step(model, batch_of(trainer), num_items_in_batch=torch.tensor(len(rows)))
    theirs = whole.training_step(shallow, batch_of(whole), num_items_in_batch=torch.tensor(len(rows)))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    torch.testing.assert_close(gradients(model), gradients(shallow), atol=0, rtol=0)


def test_leaving_out_layers_is_refused_where_steps_need_all(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"length_shares": [0.5, 0.5], "layer_shares": [0.5, 1.0]}
    with pytest.raises(ValueError, match=r"layer_shares: must run the layer where blocks are inserted, 1, .* 1 of 2"):
        make_trainer(GroundingTrainer, build_rim(insertion_layer=1), **options)
    base = build_base()
    base.model.layers[1] = nn.Identity()
    with pytest.raises(ValueError, match="layer_shares: need a decoder with layers of transformers' usual kind"):
        make_trainer(GroundingTrainer, build_rim(base=base), **options)
    monkeypatch.setattr("rim_peft.training.attachment.shards_weights", lambda: True)
    with pytest.raises(ValueError, match="layer_shares: must be null with FSDP"):
        make_trainer(GroundingTrainer, build_rim(), **options)
    monkeypatch.undo()
    monkeypatch.setattr(GroundingConfig, "world_size", 2)
    with pytest.raises(ValueError, match="layer_shares: must be null in several processes"):
        make_trainer(GroundingTrainer, build_rim(), **options, ddp_find_unused_parameters=False)


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 1}], ids=["here", "workers"])
def test_chains_that_are_learned_make_room_for_longer_ones_and_resume_exactly(
    options: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    rows = longer(ROWS * 3)
    options = {
        **options,
        "rows": rows,
        "length_shares": [0.5, 0.25, 0.25],
        "length_accuracy": 1e-6,  # as soon as anything is right
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "logging_steps": 2,
        "max_steps": 24,
        "learning_rate": 0.1,
    }
    seen: list[tuple[int, int]] = []
    begins: list[list[int]] = []

    def start() -> ReadoutTrainer:
        trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=3, lora_dropout=0.2), **options)
        begins.append(trainer.lengths.begins)
        loss = trainer.compute_loss

        def watch(model: Any, inputs: Any, **given: Any) -> Any:
            begins[-1] = trainer.lengths.begins
            longest = trainer.lengths.most_steps(trainer.state.global_step)
            seen.append((int(inputs["num_steps"].max()), 3 if longest is None else longest))
            return loss(model, inputs, **given)

        trainer.compute_loss = watch  # type: ignore[method-assign]
        return trainer

    trainer = assert_resumes_exactly(start, 3, 9, 15)
    assert all(found <= allowed for found, allowed in seen)  # no row comes before its blocks do
    assert trainer.lengths.begins[1] < trainer.lengths.planned[1] == 12
    chains = [line["longest_chain"] for line in trainer.state.log_history if "longest_chain" in line]
    assert chains == sorted(chains)
    assert set(chains) == {1.0, 2.0}
    assert begins == [trainer.lengths.begins] * 4


@pytest.mark.parametrize(
    ("readout_step", "accuracies", "is_learned"),
    [
        ("next", {1: 1.0}, True),
        ("next", {1: 0.5}, False),
        ("own", {1: 1.0, 2: 0.5}, False),  # what has one step is answered after two blocks
        ("own", {1: 0.5, 2: 1.0}, True),
    ],
)
def test_a_phase_ends_by_the_readouts_of_its_answers(
    readout_step: str, accuracies: dict[int, float], is_learned: bool, make_trainer: MakeTrainer
) -> None:
    options = {"length_shares": [0.5, 0.5], "length_accuracy": 0.9, "max_steps": 40, "readout_step": readout_step}
    trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=4), **options)
    found = {f"token_accuracy_by_block/{block}": value for block, value in accuracies.items()}
    trainer._sums["train"].read = lambda accelerator: dict(found)  # type: ignore[method-assign]
    trainer.state.max_steps = 40
    trainer.state.global_step = 5
    assert trainer.figures("train")["longest_chain"] == 1.0
    assert trainer.lengths.begins == ([0, 7] if is_learned else [0, 20])
    trainer.lengths.begins = [0, 20]
    trainer.state.global_step, trainer._window = 22, 15  # the line's steps are of two phases: it says of neither
    trainer.figures("train")
    assert trainer.lengths.begins == [0, 20]


def test_a_curriculum_by_length_needs_rows_of_each_length(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(), rows=ROWS[:2], length_shares=[0.5, 0.5])
    with pytest.raises(ValueError, match="length_shares: each phase must have rows to draw"):
        trainer.train()
    streamed = make_trainer(
        GroundingTrainer, build_rim(), rows=Dataset.from_list(ROWS).to_iterable_dataset(), length_shares=[0.5, 0.5]
    )
    with pytest.raises(ValueError, match="length_shares: needs the rows' lengths"):
        streamed.train()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"dataloader_drop_last": True},
        {"max_tokens_per_batch": 100},
        {"length_shares": [0.5, 0.5]},
    ],
    ids=lambda more: next(iter(more), ""),
)
def test_samples_are_counted_as_they_are_drawn(more: dict[str, Any], make_trainer: MakeTrainer) -> None:
    rows = longer(ROWS * 3)[:7]
    options = {"rows": rows, "max_steps": 5, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2}
    batches: list[int] = []

    def start() -> ReadoutTrainer:
        trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=3, lora_dropout=0.2), **options, **more)
        batches.clear()
        loss = trainer.compute_loss

        def count(model: Any, inputs: Any, **given: Any) -> Any:
            batches.append(len(inputs["input_ids"]))
            return loss(model, inputs, **given)

        trainer.compute_loss = count
        return trainer

    trainer = start()
    trainer.train()
    counts = [line["num_samples"] for line in trainer.state.log_history if "loss" in line]
    assert counts[-1] == sum(batches)
    assert set(counts) <= {sum(batches[:end]) for end in range(len(batches) + 1)}
    resumed = start()
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert [line["num_samples"] for line in resumed.state.log_history if "loss" in line] == counts
