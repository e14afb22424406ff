"""What both trainers refuse, with the option, the rule and the remedy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rim_peft import GroundingConfig, GroundingTrainer, RefinementConfig, RefinementTrainer, RiMConfig
from rim_peft.training.coconut import CoconutConfig
from tests.conftest import EOS_ID, VOCAB_SIZE, MakeTrainer, build_base, build_rim, build_tokenizer
from tests.objectives import prepare_rows
from tests.training import ROWS, every_stage, stream, trained


def test_batches_by_tokens_need_lengths(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(RefinementTrainer, build_rim(), max_tokens_per_batch=20)
    with pytest.raises(ValueError, match="max_tokens_per_batch: must be at least twice the longest row's"):
        trainer.train()
    streamed = make_trainer(RefinementTrainer, build_rim(), rows=stream(), max_tokens_per_batch=500)
    with pytest.raises(ValueError, match="max_tokens_per_batch: needs the rows' lengths"):
        streamed.train()


@pytest.mark.parametrize("config_class", [GroundingConfig, RefinementConfig, CoconutConfig])
def test_checkpointing_is_set_by_either_name_without_a_warning(config_class: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        default = config_class(str(tmp_path)).gradient_checkpointing
        off = config_class(str(tmp_path), gradient_checkpointing=False)
    assert default is (config_class is not CoconutConfig)
    assert not off.gradient_checkpointing
    if hasattr(off, "activation_checkpointing"):  # what the Trainer reads in later versions of transformers
        assert off.activation_checkpointing is False
        assert config_class(str(tmp_path)).activation_checkpointing is default
        assert not config_class(str(tmp_path), activation_checkpointing=False).gradient_checkpointing


def test_loraplus_needs_an_optimiser_without_groups_of_its_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim(), loraplus_lr_ratio=4.0)
    grouped = (torch.optim.AdamW, {"lr": 1e-3, "params": []})  # as transformers gives it for GaLore, for instance
    trainer.get_optimizer_cls_and_kwargs = lambda *args: grouped  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="loraplus_lr_ratio: must be null with optim 'adamw_torch"):
        trainer.train()


def test_models_without_a_rim_adapter_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="active adapter is RIM, got LlamaForCausalLM"):
        make_trainer(GroundingTrainer, build_base())
    with pytest.raises(ValueError, match="active adapter is RIM, got LoraConfig"):
        make_trainer(GroundingTrainer, get_peft_model(build_base(), LoraConfig(target_modules="all-linear")))
    with pytest.raises(ValueError, match="training needs at least one block, got 0"):
        make_trainer(RefinementTrainer, build_rim(num_blocks=0))
    with pytest.raises(ValueError, match="peft_config: the model has an adapter already"):
        make_trainer(RefinementTrainer, build_rim(), peft_config=RiMConfig())


def test_bad_rows_are_named_before_training(make_trainer: MakeTrainer) -> None:
    rows = [*ROWS, {"question": "8+1", "steps": [], "answer": "9"}]
    with pytest.raises(ValueError, match=r"row 4: steps: there are none"):
        make_trainer(GroundingTrainer, build_rim(), rows=rows)
    trainer = make_trainer(GroundingTrainer, build_rim(), rows=rows, on_bad_rows="drop")
    assert len(trainer.train_dataset) == len(ROWS)
    assert len(make_trainer(RefinementTrainer, build_rim(), rows=rows).train_dataset) == len(rows)


def test_rows_beyond_the_models_positions_are_named(make_trainer: MakeTrainer) -> None:
    rows = [{**ROWS[0], "question": "1+" * 255}]
    with pytest.raises(ValueError, match=r"row 0: too long: readouts reach \d+ positions, the model has 512"):
        make_trainer(RefinementTrainer, build_rim(), rows=rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "packing: must stay False"),
        ({"torch_compile": True}, r"torch_compile: must stay False.*Use compile_layers"),
        ({"pack_length": 0}, "pack_length: must be from 1 to [0-9]+, got 0"),
        ({"max_tokens_per_batch": "512"}, "max_tokens_per_batch: must be an integer of at least 1, got '512'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: must be from 1 to [0-9]+, got 0"),
        ({"loss_type": "dft"}, "loss_type: must stay 'nll'"),
        ({"completion_only_loss": True}, "completion_only_loss: must stay None"),
        ({"on_bad_rows": "skip"}, "on_bad_rows: must be 'error' or 'drop'"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef: must stay 0.0"),
        ({"activation_offloading": True}, "activation_offloading: must stay False"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: must be 'random' or 'sequential'"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio: must be above 0"),
        ({"length_shares": []}, r"length_shares: must be a list of shares.*got \[\]"),
        ({"length_shares": [0.5, 0.6]}, "length_shares: must be a list of shares"),
        ({"length_shares": [1.0, 0.0]}, "length_shares: must be a list of shares"),
        ({"length_shares": [-0.5, 1.5]}, "length_shares: must be a list of shares"),
        ({"length_shares": 0.5}, "length_shares: must be a list of shares"),
        ({"length_accuracy": 0.9}, "length_accuracy: must come with length_shares"),
        ({"layer_shares": [1.0]}, "layer_shares: must come with length_shares"),
        *(
            ({"length_shares": [0.5, 0.5], "layer_shares": shares}, "layer_shares: must be a list of 2 numbers")
            for shares in ([1.0], [0, 1.0], [0.6, 0.5], [0.5, 0.9], ["0.5", 1.0], 0.5)
        ),
        (
            {"length_shares": [1.0], "train_sampling_strategy": "sequential"},
            "train_sampling_strategy: must stay",
        ),
        ({"length_shares": [1.0], "ignore_data_skip": True}, "ignore_data_skip: must stay False with length_shares"),
        ({"length_shares": [1.0], "length_accuracy": 0.5, "logging_strategy": "no"}, "logging_strategy: must not be"),
        ({"length_shares": [1.0], "length_accuracy": 1.5}, r"length_accuracy: must be a number in \(0, 1\]"),
        ({"length_shares": [0.5, 0.5], "max_tokens_per_batch": 99}, "length_shares: must be null with max_tokens_per"),
        ({"dropout": "0.1"}, r"dropout: must be a number in \[0, 1\), got '0.1'"),
        ({"dropout": 1.0}, r"dropout: must be a number in \[0, 1\)"),
        ({"answer_template": "#### "}, r"answer template: must hold \{answer\}"),
    ],
)
@every_stage
def test_options_out_of_range_are_named(trainer_class: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_class.config_class(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "schedule: must be one of relative"),
        ({"readout_step": "last"}, "readout_step: must be one of next, own, got 'last'"),
        ({"hold": 1.0}, r"hold: must be a number in \[0, 1\)"),
        (
            {"hold": 0.5, "schedule": "linear"},
            "hold: must be 0 with schedule='linear', since only 'relative' falls, got 0.5",
        ),
    ],
)
def test_grounding_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroundingConfig(**options)


def test_arguments_that_do_not_fit_are_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    with pytest.raises(TypeError, match="GroundingTrainer takes a GroundingConfig, got RefinementConfig"):
        GroundingTrainer(build_rim(), RefinementConfig(), train_dataset=dataset)
    with pytest.raises(ValueError, match="data_collator: cannot be given"):
        GroundingTrainer(build_rim(), GroundingConfig(), train_dataset=dataset, data_collator=lambda x: x)
    model = build_rim()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        make_trainer(GroundingTrainer, model)


def test_adapters_loaded_for_inference_are_not_trained_in_vain(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    build_rim().save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(build_base(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is loaded for inference, with its weights frozen.*is_trainable=True"):
        make_trainer(GroundingTrainer, frozen)
    trainable = PeftModel.from_pretrained(build_base(), tmp_path / "adapter", is_trainable=True)
    before = trained(trainable)
    make_trainer(GroundingTrainer, trainable).train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained(trainable).items())


def test_rows_tokenised_for_the_other_stage_are_checked(make_trainer: MakeTrainer) -> None:
    rows = [{key: value for key, value in row.items() if key != "steps"} for row in ROWS]
    refinement = make_trainer(RefinementTrainer, build_rim(), rows=rows)
    with pytest.raises(ValueError, match="already tokenised must have steps for this training"):
        make_trainer(GroundingTrainer, build_rim(), rows=list(refinement.train_dataset))


def test_predictions_are_refused_with_what_to_use(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GroundingTrainer, build_rim())
    with pytest.raises(ValueError, match=r"Use rim_peft\.inference\.read_blocks"):
        trainer.predict(Dataset.from_list(ROWS))
    with pytest.raises(ValueError, match=r"compute_metrics: cannot be given.*Use validate"):
        GroundingTrainer(
            build_rim(), GroundingConfig(), train_dataset=Dataset.from_list(ROWS), compute_metrics=lambda x: {}
        )


def _sft(model: Any, tokenizer: Any, folder: Path) -> SFTTrainer:
    options: dict[str, Any] = {"max_steps": 1, "report_to": "none", "use_cpu": True, "gradient_checkpointing": False}
    rows = Dataset.from_list([{"text": "1+1=2"}] * 4)
    return SFTTrainer(model, SFTConfig(str(folder), **options), train_dataset=rows, processing_class=tokenizer)


def test_trainers_of_others_do_not_train_past_the_blocks(
    make_trainer: MakeTrainer, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build_rim(num_blocks=2)
    before = trained(model)
    message = (
        rf"input_ids: must hold memory ids \(from {VOCAB_SIZE} on\) .* num_blocks=2 is trained, got none.*Grounding"
    )
    with pytest.raises(ValueError, match=message):
        _sft(model, tokenizer, tmp_path).train()
    torch.testing.assert_close(trained(model), before, atol=0, rtol=0)
    make_trainer(RefinementTrainer, model).train()
    with pytest.raises(ValueError, match=message):  # also behind our own
        _sft(model, tokenizer, tmp_path).train()
    assert _sft(build_rim(num_blocks=0), tokenizer, tmp_path).train().global_step == 1


def test_passes_without_blocks_that_train_nothing_are_left_alone() -> None:
    model = build_rim(num_blocks=2)
    plain, with_memory = torch.tensor([[20, 30]]), torch.tensor([[20, VOCAB_SIZE, VOCAB_SIZE + 2]])
    model(input_ids=plain)  # in evaluation mode
    model.train()
    with torch.no_grad():
        model(input_ids=plain)
    with model.disable_adapter():
        model(input_ids=plain)
    with pytest.raises(ValueError, match="input_ids: must hold memory ids"):
        model(input_ids=plain)
    model(input_ids=with_memory)
    model(input_ids=plain)  # a loop that knows of blocks may have passes without
    frozen = build_rim(num_blocks=2).train()
    frozen.requires_grad_(False)
    frozen(input_ids=plain)


def test_tokens_that_the_base_has_no_rows_for_are_refused(make_trainer: MakeTrainer) -> None:
    larger = build_tokenizer()
    larger.add_tokens(["<think>"])
    rows = [*ROWS, {**ROWS[0], "answer": "<think>"}]
    message = rf"row {len(ROWS)}: tokens must have ids below {VOCAB_SIZE}, .*'<think>'"
    for on_bad_rows in ("error", "drop"):
        with pytest.raises(ValueError, match=message):
            make_trainer(GroundingTrainer, build_rim(), rows=rows, processing_class=larger, on_bad_rows=on_bad_rows)
    tokenized = prepare_rows(
        Dataset.from_list(rows), larger, needs_steps=True, num_blocks=2, block_length=3, max_length=None
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(GroundingTrainer, build_rim(), rows=tokenized, processing_class=larger)
    larger.pad_token = larger.convert_ids_to_tokens(VOCAB_SIZE)  # masked wherever it stands
    trainer = make_trainer(GroundingTrainer, build_rim(), processing_class=larger, max_steps=1)
    trainer.train()
    assert trainer.data_collator.pad_id == EOS_ID
