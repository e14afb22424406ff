"""Both trainers: the loss they take gradients of is the method's, however it is batched."""

from __future__ import annotations

import functools
import itertools
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from rim_peft import GroundingConfig, GroundingTrainer, RefinementTrainer, RiMConfig
from rim_peft.data.objective import TokenizedRow
from rim_peft.inference import read_blocks
from rim_peft.training.head import CompiledLayers
from rim_peft.training.readout_trainer import ReadoutTrainer
from tests.conftest import ARCHITECTURES, VOCAB_SIZE, MakeTrainer, build_base, build_rim
from tests.training import (
    ROWS,
    assert_resumes_exactly,
    assert_trains_formula,
    batch_of,
    every_stage,
    gradients,
    longer,
    stream,
    train_mode,
    trained,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_grounding_loss_is_the_formula(architecture: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(architecture, num_blocks=2), trailing_blocks=False)
    trainer.state.global_step, trainer.state.max_steps = 1, 4

    def weights(row: TokenizedRow) -> list[float]:
        length = len(row["step_ids"])
        return [max(0.0, 1 - 1 / (4 * t / length)) for t in range(1, length + 1)]

    assert_trains_formula(trainer, lambda row: [*row["step_ids"][1:], row["answer_ids"]], weights)


def test_trailing_blocks_share_the_answer(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=3), trailing_blocks=True, schedule="uniform")

    def readouts(row: TokenizedRow) -> list[list[int]]:
        return [*row["step_ids"][1:], *[row["answer_ids"]] * (4 - len(row["step_ids"]))]

    def weights(row: TokenizedRow) -> list[float]:
        trailing = 4 - len(row["step_ids"])
        return [1.0] * (len(row["step_ids"]) - 1) + [1 / trailing] * trailing

    assert_trains_formula(trainer, readouts, weights)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_refinement_loss_is_the_formula(architecture: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(RefinementTrainer, build_rim(architecture, num_blocks=3))
    assert_trains_formula(trainer, lambda row: [row["answer_ids"]] * 3, lambda row: [1 / 6, 2 / 6, 3 / 6])


@every_stage
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"pack_length": 64},
        {"pack_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"pad_to_multiple_of": 16},
        {"max_tokens_per_batch": 1000},
        {"loraplus_lr_ratio": 1.0},
    ],
    ids=["accumulation", "checkpointing", "packing", "packing-accumulation", "multiple", "tokens", "loraplus"],
)
def test_equivalent_settings_train_alike(
    trainer_class: Any, options: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    models = []
    for chosen in ({}, options):
        model = build_rim(num_blocks=3)
        # Plain SGD: Adam would blow rounding differences of tiny gradients up to whole steps.
        make_trainer(trainer_class, model, optim="sgd", max_steps=3, **chosen).train()
        models.append(trained(model))
    before = trained(build_rim(num_blocks=3))
    moved = max(float((models[0][name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-3
    torch.testing.assert_close(*models, atol=1e-5, rtol=1e-4)


@every_stage
def test_training_lowers_the_loss_and_logs_it_by_block(trainer_class: Any, make_trainer: MakeTrainer) -> None:
    model = build_rim(num_blocks=3, fresh=True)
    trainer = make_trainer(trainer_class, model, max_steps=30, logging_steps=1, **_uniform(trainer_class))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    for block in (1, 2, 3):
        for name in ("loss", "token_accuracy", "weight"):
            assert f"{name}_by_block/{block}" in lines[0]
    # Rows have 10 to 24 tokens; the count must be that of real ones.
    assert lines[0]["num_tokens"] == int(batch_of(trainer)["attention_mask"].sum())


@every_stage
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_packed_batches_give_the_same_loss_and_gradients(
    trainer_class: Any, architecture: str, make_trainer: MakeTrainer
) -> None:
    model = build_rim(architecture, num_blocks=3)
    results = []
    for options in ({}, {"pack_length": 60, "pad_to_multiple_of": 8}):
        trainer = make_trainer(trainer_class, model, **options)
        train_mode(model)
        shapes: list[tuple[int, ...]] = []
        embedding = model.base_model.memory
        hook = embedding.register_forward_pre_hook(lambda _, args, shapes=shapes: shapes.append(args[0].shape))
        loss = trainer.compute_loss(trainer.model, batch_of(trainer))
        hook.remove()
        results.append((shapes[0], loss, gradients(model, loss)))
    (plain_shape, ours, found), (packed_shape, theirs, expected) = results
    assert packed_shape[0] < plain_shape[0] == len(ROWS)
    assert packed_shape[1] % 8 == 0
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)  # sums run in another order


def test_batches_by_tokens_hold_every_row_and_resume_exactly(make_trainer: MakeTrainer) -> None:
    rows = longer(ROWS * 5)
    options = {"max_tokens_per_batch": 130, "max_steps": 9, "save_steps": 7, "pack_length": 64, "rows": rows}

    def start() -> ReadoutTrainer:
        return make_trainer(GroundingTrainer, build_rim(num_blocks=3, lora_dropout=0.2), **options)

    batches = [batch["attention_mask"] for batch in start().get_train_dataloader()]
    assert all(int(batch.sum()) <= 130 for batch in batches)
    assert sum(len(batch) for batch in batches) == len(rows)
    assert len({len(batch) for batch in batches}) > 1
    trainer = assert_resumes_exactly(start, 7)
    assert trainer.state.epoch > 1  # so that the order of the second pass is met too


def test_batches_of_differing_sizes_accumulate_to_the_mean_over_samples(make_trainer: MakeTrainer) -> None:
    rows = longer(ROWS * 5)
    shared = {"rows": rows, "optim": "sgd", "max_steps": 1, "train_sampling_strategy": "sequential"}
    models = []
    for options in (
        {"per_device_train_batch_size": len(rows)},
        {"max_tokens_per_batch": 130, "gradient_accumulation_steps": 100},
    ):
        model = build_rim(num_blocks=3)
        trainer = make_trainer(GroundingTrainer, model, **shared, **options)
        trainer.train()
        models.append(trained(model))
    sizes = [len(batch["num_steps"]) for batch in trainer.get_train_dataloader()]
    assert len(set(sizes)) > 1
    assert len(sizes) > 2
    torch.testing.assert_close(*models, atol=1e-5, rtol=1e-4)


def test_tokens_are_counted_in_every_line_with_a_loss(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(RefinementTrainer, build_rim(num_blocks=3), max_steps=4, logging_steps=3, eval_strategy="no")
    per_step = int(batch_of(trainer)["attention_mask"].sum())
    trainer.add_callback(_LogsOfItsOwn(trainer))
    trainer.train()
    lines = trainer.state.log_history
    assert [line["num_tokens"] for line in lines if "loss" in line] == [3 * per_step]
    assert [line["num_tokens"] for line in lines if "train_loss" in line] == [4 * per_step]
    assert all("num_tokens" not in line for line in lines if "own" in line)
    evaluated = trainer.evaluate(Dataset.from_list(ROWS))
    assert evaluated["eval_loss"] > 0


class _LogsOfItsOwn(TrainerCallback):
    """Logs from one process alone, as users' callbacks do."""

    def __init__(self, trainer: ReadoutTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log({"own": 1.0})


@pytest.mark.parametrize("trailing", [False, True])
def test_blocks_that_read_out_their_own_step_train_the_formula(trailing: bool, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=5), readout_step="own", trailing_blocks=trailing)
    trainer.state.global_step, trainer.state.max_steps = 1, 4

    def readouts(row: TokenizedRow) -> list[list[int]]:
        own = [*row["step_ids"], row["answer_ids"]]
        return own + [row["answer_ids"]] * ((5 - len(own)) if trailing else 0)

    def weights(row: TokenizedRow) -> list[float]:
        length = len(row["step_ids"]) + 1
        falling = [max(0.0, 1 - 1 / (4 * t / length)) for t in range(1, length + 1)]
        last = 5 - length + 1 if trailing else 1
        return falling[:-1] + [falling[-1] / last] * last

    assert_trains_formula(trainer, readouts, weights)
    table = trainer.train_dataset.with_format("arrow")[:]
    lengths = [trainer.objective.num_tokens(row) for row in trainer.train_dataset]
    assert (trainer.objective.most_tokens(table) >= lengths).all()


@every_stage
def test_loraplus_gives_b_a_rate_of_its_own_and_resumes_exactly(trainer_class: Any, make_trainer: MakeTrainer) -> None:
    options = {"max_steps": 6, "save_steps": 3, "loraplus_lr_ratio": 8.0, "weight_decay": 0.1, "warmup_steps": 2}

    def start() -> ReadoutTrainer:
        return make_trainer(trainer_class, build_rim(num_blocks=3, lora_dropout=0.2), **options)

    trainer = start()
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates.keys() == trained(trainer.model).keys()
    for name, found in rates.items():
        assert found == (8e-2 if "lora_B" in name else 1e-2, 0.1), name
    assert_resumes_exactly(start, 3)


def test_the_head_is_given_supervised_positions_alone(make_trainer: MakeTrainer) -> None:
    model = build_rim(num_blocks=3)
    trainer = make_trainer(RefinementTrainer, model)
    batch = batch_of(trainer)
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.log_probs.shape == (1, int((batch["shift_labels"] >= 0).sum()))
    # Outside a step the model is as it was.
    assert model(input_ids=batch["input_ids"][:, :5]).logits.shape == (len(ROWS), 5, VOCAB_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_alike_and_are_compiled_once(
    checkpointing: bool, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler behind the graph takes half a minute.
    quick = functools.partial(CompiledLayers, backend="aot_eager")
    monkeypatch.setattr("rim_peft.training.readout_trainer.CompiledLayers", quick)
    rows = longer(ROWS * 3, most=12)
    shapes, models = set(), []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for chosen in ({}, {"compile_layers": True}):
        model = build_rim(num_blocks=3)
        model.base_model.memory.register_forward_pre_hook(lambda _, args: shapes.add(args[0].shape))
        options = {"rows": rows, "optim": "sgd", "max_steps": 6, "per_device_train_batch_size": 2, **chosen}
        options["gradient_checkpointing"] = checkpointing
        make_trainer(GroundingTrainer, model, **options).train()
        models.append(model)
    assert len(shapes) > 4
    # Two at most: a length that equals another size of the model is taken for a constant at first.
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled in (1, 2)
    models[1].generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled  # answers are not compiled
    torch.testing.assert_close(*(trained(model) for model in models), atol=1e-5, rtol=1e-4)


def test_flex_attention_gives_way_to_sdpa_on_a_cpu(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    model = build_rim(base=build_base(attn_implementation="flex_attention"), num_blocks=2)
    with caplog.at_level(logging.WARNING, logger="rim_peft"):
        make_trainer(RefinementTrainer, model, max_steps=1).train()
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert "flex_attention has no backward pass on a CPU" in caplog.text


def _uniform(trainer_class: Any) -> dict[str, str]:
    return {"schedule": "uniform"} if trainer_class is GroundingTrainer else {}


def test_readouts_whose_weight_is_zero_leave_the_row(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=3), max_steps=20, logging_steps=1)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    tokens = [lines[0]["num_tokens"]] + [
        after["num_tokens"] - before["num_tokens"] for before, after in itertools.pairwise(lines)
    ]
    assert tokens[-1] < tokens[0]
    assert lines[-1]["weight_by_block/1"] < 0.1 * lines[0]["weight_by_block/1"]


@every_stage
def test_the_base_stays_as_it_is(trainer_class: Any, make_trainer: MakeTrainer) -> None:
    model = build_rim(num_blocks=3)
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    make_trainer(trainer_class, model).train()
    assert frozen
    assert all(parameter.equal(before) for parameter, before in frozen)


@every_stage
def test_bf16_trains_the_memory_in_fp32(trainer_class: Any, make_trainer: MakeTrainer) -> None:
    model = build_rim(base=build_base().to(torch.bfloat16), num_blocks=3)
    before = trained(model)
    make_trainer(trainer_class, model, bf16=True, use_cpu=True, gradient_checkpointing=True).train()
    rows = model.base_model.memory.rows("default")
    assert rows.dtype == torch.float32
    assert (rows - before[next(name for name in before if "rim_memory" in name)]).abs().max() > 1e-3


def test_a_quantised_base_keeps_the_adapters_types_and_values(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    build_base(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = make_trainer(
        GroundingTrainer,
        str(tmp_path / "base"),
        peft_config=RiMConfig(num_blocks=3, r=4),
        model_init_kwargs={"quantization_config": quantization},
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=True,
    )
    model = trainer.model
    before = trained(model)
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    trainer.train()
    after = trained(model)
    name = next(name for name in before if "rim_memory" in name)
    assert after[name].dtype == torch.float32
    assert (after[name] - before[name]).abs().max() > 1e-3


def test_evaluation_weighs_as_the_first_step_and_adds_scores(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=3), validate=lambda model: {"accuracy": 0.25})
    trainer.state.max_steps = 4
    losses = []
    for step in (0, 3):
        trainer.state.global_step = step
        metrics = trainer.evaluate(Dataset.from_list(ROWS))
        losses.append(metrics["eval_loss"])
        assert metrics["eval_accuracy"] == 0.25
    assert losses[0] == losses[1]


def test_dropout_of_a_stage_is_set(make_trainer: MakeTrainer) -> None:
    model = build_rim(lora_dropout=0.0)
    make_trainer(RefinementTrainer, model, dropout=0.3)
    dropouts = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert 0.3 in dropouts


class _ReadsBlocks(TrainerCallback):
    """Looks into the blocks while a stage runs."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        read_blocks(kwargs["model"], kwargs["processing_class"], ["2+3"], max_new_tokens=2)


def test_callbacks_that_read_blocks_leave_the_training_as_it_is(make_trainer: MakeTrainer) -> None:
    lines = []
    for callbacks in ([], [_ReadsBlocks()]):
        trainer = make_trainer(RefinementTrainer, build_rim(num_blocks=2), max_steps=2, logging_steps=1)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        lines.append([line for line in trainer.state.log_history if "loss" in line])
    plain, reading = [[(line.keys(), line["loss"], line["loss_by_block/2"]) for line in found] for found in lines]
    assert reading == plain
    assert len(plain) == 2


@pytest.mark.parametrize(
    "model_type", ["mixtral", "phi3", "gemma2", "granite", "cohere", "olmo2", "modernbert-decoder", "bert"]
)
def test_other_architectures_train_the_formula(model_type: str, make_trainer: MakeTrainer) -> None:
    """A mixture of experts, logit scales and caps, fused projections, layers between the last state and the head."""
    small = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
    window = {"sliding_window": 6} if model_type in ("mixtral", "phi3", "gemma2") else {}
    decodes = {"is_decoder": True} if model_type == "bert" else {}
    config = AutoConfig.for_model(model_type, **small, **heads, **window, **decodes, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = build_rim(base=AutoModelForCausalLM.from_config(config), num_blocks=3)
    trainer = make_trainer(RefinementTrainer, model)
    readouts, weights = lambda row: [row["answer_ids"]] * 3, lambda row: [1 / 6, 2 / 6, 3 / 6]
    assert_trains_formula(trainer, readouts, weights, tolerance=1e-4)


def test_more_steps_than_blocks_get_a_block_each(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=1), schedule="uniform")
    assert_trains_formula(
        trainer,
        lambda row: [*row["step_ids"][1:], row["answer_ids"]],
        lambda row: [1.0] * len(row["step_ids"]),
    )


def test_the_active_adapter_is_trained(make_trainer: MakeTrainer) -> None:
    model = build_rim(num_blocks=2)
    model.add_adapter("second", RiMConfig(num_blocks=3, r=4))
    model.set_adapter("second")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(GroundingTrainer, model).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".second." in name for name in moved)


def test_chats_streams_and_worker_processes_train(
    make_trainer: MakeTrainer, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{**row, "question": [{"role": "user", "content": row["question"]}]} for row in ROWS]
    trainer = make_trainer(GroundingTrainer, build_rim(num_blocks=2), rows=rows, dataloader_num_workers=1)
    rendered = tokenizer.apply_chat_template(rows[0]["question"], add_generation_prompt=True, return_dict=False)
    assert trainer.train_dataset[0]["prompt_ids"] == rendered
    trainer.train()
    streamed = make_trainer(RefinementTrainer, build_rim(num_blocks=2), rows=stream(), max_steps=2)
    assert streamed.train().global_step == 2


def test_the_collator_travels_to_worker_processes(make_trainer: MakeTrainer) -> None:
    for trainer_class in (GroundingTrainer, RefinementTrainer):
        trainer = make_trainer(trainer_class, build_rim(num_blocks=3))
        again = pickle.loads(pickle.dumps(trainer.data_collator))  # noqa: S301 - our own bytes
        torch.testing.assert_close(again(list(trainer.train_dataset)), batch_of(trainer))


@every_stage
def test_a_trainer_used_alone_resumes_exactly(trainer_class: Any, make_trainer: MakeTrainer) -> None:
    options = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2}
    model = functools.partial(build_rim, num_blocks=3, lora_dropout=0.2)
    assert_resumes_exactly(lambda: make_trainer(trainer_class, model(), **options), 3)


def test_a_trainers_own_card_starts_with_the_import(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(), save_steps=2)
    trainer.train()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    code = card.split("```python\n")[1]
    assert code.startswith("import rim_peft")
    PeftModel.from_pretrained(build_base(), f"{trainer.args.output_dir}/checkpoint-2")


def test_quantization_given_to_the_trainer_is_used(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_base(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    config = GroundingConfig(str(tmp_path), max_steps=1, report_to="none", gradient_checkpointing=False)
    data: dict[str, Any] = {"train_dataset": Dataset.from_list(ROWS), "processing_class": tokenizer}
    trainer = GroundingTrainer(
        str(tmp_path / "base"),
        config,
        peft_config=RiMConfig(r=4),
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        **data,
    )
    assert trainer.model.get_base_model().is_loaded_in_8bit
    with pytest.raises(ValueError, match="quantization_config: must come with a model's id"):
        GroundingTrainer(build_rim(), config, quantization_config=BitsAndBytesConfig(load_in_8bit=True), **data)
