"""Coconut: its trainer and its decoder against the definition, computed without cache and without batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, TrainerCallback

from rim_peft.data.tokenization import tokenize_prompts
from rim_peft.inference import answer_with_thoughts, decode_with_thoughts
from rim_peft.training.coconut import CoconutCollator, CoconutConfig, CoconutTrainer, chain_parts, cut_texts
from rim_peft.tuner.config import active_config
from rim_peft.tuner.thoughts import check_thinks, think
from tests.conftest import ARCHITECTURES, EOS_ID, PAD_ID, MakeTrainer, build_base, build_rim
from tests.training import ROWS, assert_resumes_exactly, assert_same_gradients, batch_of, train_mode, trained

TOKENIZED = [
    {"prompt_ids": [10, 11], "step_ids": [[20, 21, 2], [22, 2], [23, 2]], "answer_ids": [30, 2]},
    {"prompt_ids": [12], "step_ids": [[24, 2]], "answer_ids": [31, 32, 2]},
]


@pytest.fixture
def make_coconut(make_trainer: MakeTrainer) -> MakeTrainer:
    return partial(make_trainer, CoconutTrainer, max_steps=6, num_stages=2, thoughts_per_step=2)


def _at_stage(trainer: CoconutTrainer, stage: int) -> CoconutTrainer:
    """A trainer that stands where a stage begins, with equal shares, and without the base's own dropout."""
    trainer.state.global_step, trainer.state.max_steps = stage, trainer.args.num_stages + 1
    train_mode(trainer.model)
    return trainer


def _embedded_question(model: PeftModel, prompt: list[int], num_thoughts: int) -> Tensor:
    """``x <b> thoughts </b>`` as embeddings (1, S, H): everything is computed anew for every thought."""
    base: Any = model.get_base_model()
    blocks = active_config(model).block_tokens
    embed = base.get_input_embeddings()
    sequence = embed(torch.tensor([[*prompt, blocks.begin]]))
    for _ in range(num_thoughts):
        state = base.base_model(inputs_embeds=sequence, use_cache=False).last_hidden_state[:, -1:]
        sequence = torch.cat([sequence, state], dim=1)
    return torch.cat([sequence, embed(torch.tensor([[blocks.end]]))], dim=1)


def _slow_loss(model: PeftModel, rows: list[Any], texts: list[list[int]], num_thoughts: int) -> Tensor:
    base: Any = model.get_base_model()
    total = torch.zeros(())
    for row, text in zip(rows, texts, strict=True):
        begin = _embedded_question(model, row["prompt_ids"], num_thoughts)
        sequence = torch.cat([begin, base.get_input_embeddings()(torch.tensor([text]))], dim=1)
        logits = base(inputs_embeds=sequence, use_cache=False).logits[0]
        total = total - logits[begin.shape[1] - 1 : -1].log_softmax(-1)[range(len(text)), text].sum()
    return total / len(rows)


def _text(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], stage: int) -> list[int]:
    """What stage 0, 1 or 2 of two leaves of a row's chain."""
    steps = row["steps"][stage:] if stage < 2 else []
    return [*tokenizer.encode("".join(f"{step}\n" for step in steps) + row["answer"]), EOS_ID]


@pytest.mark.parametrize(
    ("architecture", "stage"),
    [("llama", 0), ("llama", 1), ("gpt2", 0), ("gpt2", 1), *((architecture, 2) for architecture in ARCHITECTURES)],
)
def test_loss_and_gradients_are_the_definitions(
    architecture: str, stage: int, make_coconut: MakeTrainer, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Thoughts feed rounding on: in double precision it stays small, but for the head's, which is in single.
    model = build_rim(architecture).double()
    trainer = _at_stage(make_coconut(model), stage)
    ours = trainer.compute_loss(trainer.model, batch_of(trainer)).double()
    texts = [_text(tokenizer, row, stage) for row in ROWS]
    theirs = _slow_loss(model, list(trainer.train_dataset), texts, 2 * stage)
    found = assert_same_gradients(model, ours, theirs)
    memory = found[next(name for name in found if "lora_rim_memory" in name)]
    assert [bool(row.any()) for row in memory] == [True, False, True]  # <b> and </b>, but not <m>


def test_stage_0_is_training_on_the_written_chain(make_coconut: MakeTrainer) -> None:
    model = build_rim()
    trainer = _at_stage(make_coconut(model), 0)
    blocks = active_config(model).block_tokens
    total = torch.zeros(())
    for row in trainer.train_dataset:
        text = [token for part in chain_parts(row, separator_ids=trainer.tokenizer.encode("\n")) for token in part]
        ids = torch.tensor([[*row["prompt_ids"], blocks.begin, blocks.end, *text]])
        labels = torch.tensor([[-100] * (ids.shape[1] - len(text)) + text])
        total = total + model(input_ids=ids, labels=labels).loss * len(text)
    ours = trainer.compute_loss(trainer.model, batch_of(trainer))
    torch.testing.assert_close(ours, total / len(ROWS), atol=1e-4, rtol=1e-5)


def test_batches_are_what_is_written_by_hand() -> None:
    def parts(row: Any) -> list[list[int]]:
        return chain_parts(row, separator_ids=[3])

    batch = CoconutCollator(parts, pad_id=PAD_ID)(TOKENIZED)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[10, 11], [0, 12]],
        "attention_mask": [[1, 1], [0, 1]],
        "text_ids": [[20, 21, 3, 22, 3, 23, 3, 30, 2], [24, 3, 31, 32, 2, -100, -100, -100, -100]],
        "part_starts": [[0, 3, 5, 7], [0, 2, 2, 2]],
    }
    assert cut_texts(batch, 0).tolist() == batch["text_ids"].tolist()
    assert cut_texts(batch, 1).tolist() == [[22, 3, 23, 3, 30, 2], [31, 32, 2, -100, -100, -100]]
    assert cut_texts(batch, 2).tolist() == [[23, 3, 30, 2], [31, 32, 2, -100]]
    for num_steps in (3, 5, None):
        assert cut_texts(batch, num_steps).tolist() == [[30, 2, -100], [31, 32, 2]]


@pytest.mark.parametrize(
    ("stage", "shapes", "num_tokens"), [(0, [6, 8], 15), (1, [6, 1, 7], 15), (2, [6, 1, 1, 1, 3], 13)]
)
def test_thoughts_take_a_pass_each_and_the_last_goes_with_the_text(
    stage: int, shapes: list[int], num_tokens: int, make_coconut: MakeTrainer
) -> None:
    # Five tokens and <b>; steps of two tokens; </b>, but not the answer's EOS, which predicts nothing.
    rows = [{"question": "1+2+3", "steps": ["1", "2", "3"], "answer": "6"}]
    trainer = _at_stage(make_coconut(build_rim(), rows=rows, prompt_template="{question}"), stage)
    found: list[int] = []
    layer = trainer.model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1]))
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert found == shapes
    assert trainer._new_tokens == num_tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_the_definitions_whatever_the_batch(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_rim(architecture)
    base = model.get_base_model()
    questions = ["2+3", "What is 1+1+7?", "4"]
    expected = []
    for prompt in tokenize_prompts(questions, tokenizer):
        sequence = _embedded_question(model, prompt, 3)
        answer: list[int] = []
        while len(answer) < 8 and EOS_ID not in answer:
            answer.append(int(base(inputs_embeds=sequence, use_cache=False).logits[0, -1].argmax()))
            sequence = torch.cat([sequence, base.get_input_embeddings()(torch.tensor([answer[-1:]]))], dim=1)
        expected.append(str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
    for batch_size in (1, 2, 8):
        found = answer_with_thoughts(
            model, tokenizer, questions, num_thoughts=3, max_new_tokens=8, batch_size=batch_size
        )
        assert list(found) == expected
    assert len(set(expected)) == 3


def test_answers_end_with_eos() -> None:
    model = build_rim()
    prompts = [[70, 71], [72, 73, 74]]
    free = decode_with_thoughts(model, prompts, num_thoughts=1, eos_id=None, max_new_tokens=6)
    assert [len(answer) for answer in free] == [6, 6]
    end = free[0][2]
    assert end not in free[0][:2] + free[1]
    ended = decode_with_thoughts(model, prompts, num_thoughts=1, eos_id=end, max_new_tokens=6)
    assert ended == [free[0][:3], free[1]]


def test_accumulation_trains_as_one_batch(make_coconut: MakeTrainer) -> None:
    models = []
    for options in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        model = build_rim()
        make_coconut(model, optim="sgd", **options).train()  # Adam would blow rounding up to whole steps
        models.append(trained(model))
    before = trained(build_rim())
    assert max(float((models[0][name] - before[name]).abs().max()) for name in before) > 1e-3
    torch.testing.assert_close(*models, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("save_step", [2, 3])
def test_it_resumes_exactly_within_a_stage_and_where_one_begins(save_step: int, make_coconut: MakeTrainer) -> None:
    options = {"save_steps": save_step, "per_device_train_batch_size": 2, "mix_share": 0.3}
    assert_resumes_exactly(lambda: make_coconut(build_rim(lora_dropout=0.2), **options), save_step)


class _OptimizerSteps(TrainerCallback):
    """Notes how many steps the optimiser's state has seen, after each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seen.append(max(int(values["step"]) for values in optimizer.state.values()))


@pytest.mark.parametrize(("reset_optimizer", "steps"), [(True, [1, 2, 1, 2, 1, 2]), (False, [1, 2, 3, 4, 5, 6])])
def test_the_optimiser_is_reset_where_a_stage_begins(
    reset_optimizer: bool, steps: list[int], make_coconut: MakeTrainer
) -> None:
    trainer = make_coconut(build_rim(), reset_optimizer=reset_optimizer)
    watch = _OptimizerSteps()
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == steps


def test_training_lowers_the_loss_and_logs_its_stage(
    make_coconut: MakeTrainer, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build_rim(fresh=True)
    questions = [str(row["question"]) for row in ROWS]

    def validate(model: PeftModel) -> dict[str, float]:
        answers = list(answer_with_thoughts(model, tokenizer, questions, num_thoughts=4, max_new_tokens=4))
        return {"accuracy": sum(found == row["answer"] for found, row in zip(answers, ROWS, strict=True)) / len(ROWS)}

    before = validate(model)["accuracy"]
    trainer = make_coconut(
        model, max_steps=60, logging_steps=1, stage_shares=[0.25, 0.25, 0.5], learning_rate=2e-2, validate=validate
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["stage"] for line in lines] == [0.0] * 15 + [1.0] * 15 + [2.0] * 30
    assert lines[14]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["loss"] < 0.3 * lines[30]["loss"]
    assert lines[-1]["token_accuracy"] > lines[30]["token_accuracy"]
    scores = trainer.evaluate(Dataset.from_list(ROWS))
    assert scores["eval_accuracy"] == 1.0 > before
    assert "stage" not in scores


def test_evaluation_is_of_the_last_stage_throughout(make_coconut: MakeTrainer) -> None:
    trainer = make_coconut(build_rim())
    losses = [_at_stage(trainer, stage).evaluate(Dataset.from_list(ROWS))["eval_loss"] for stage in (0, 2)]
    assert losses[0] == losses[1]
    last = _at_stage(trainer, 2).compute_loss(trainer.model, batch_of(trainer))
    assert losses[0] == pytest.approx(last.item(), rel=1e-5)


def test_mixed_steps_are_drawn_from_all_stages(make_coconut: MakeTrainer) -> None:
    trainer = make_coconut(build_rim(), mix_share=0.5, num_stages=3)
    trainer.state.max_steps = 4000
    stages = [trainer.stage(step) for step in range(1000)]  # of stage 0
    for stage in (1, 2, 3):
        assert stages.count(stage) == pytest.approx(125, abs=40)
    assert stages == [trainer.stage(step) for step in range(1000)]


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_reduced_bases_train_with_the_memory_in_fp32(
    kind: str, make_coconut: MakeTrainer, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = build_base(hidden_size=64, intermediate_size=64).to(torch.bfloat16)
    if kind == "nf4":
        base.save_pretrained(tmp_path / "base")
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    model = build_rim(base=base)
    before = trained(model)
    make_coconut(model, bf16=True, use_cpu=True, max_steps=3).train()
    rows = model.base_model.memory.rows("default")
    assert rows.dtype == torch.float32
    assert (rows - before[next(name for name in before if "rim_memory" in name)]).abs().max() > 1e-3
    assert len(list(answer_with_thoughts(model, tokenizer, ["1", "2+3"], num_thoughts=2, max_new_tokens=3))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing: must stay False for Coconut"),
        ({"pack_length": 64}, "pack_length: must stay None for Coconut"),
        ({"max_tokens_per_batch": 64}, "max_tokens_per_batch: must stay None for Coconut"),
        ({"compile_layers": True}, "compile_layers: must stay False for Coconut"),
        ({"num_stages": 0}, "num_stages: must be an integer of at least 1, got 0"),
        ({"thoughts_per_step": 1.5}, "thoughts_per_step: must be an integer of at least 1, got 1.5"),
        ({"mix_share": 1.0}, r"mix_share: must be a number in \[0, 1\)"),
        ({"stage_shares": [0.5, 0.5]}, "stage_shares: must be num_stages . 1 = 4 shares that sum to 1"),
        ({"stage_shares": [0.5, 0.5, 0.5, 0.5]}, "stage_shares: must be"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoconutConfig(**options)


@pytest.mark.parametrize(("max_length", "num_rows"), [(29, 1), (30, 2)])
def test_a_row_is_as_long_as_at_its_longest_stage(max_length: int, num_rows: int, make_coconut: MakeTrainer) -> None:
    # Bytes: question and line break 6, <b> and </b> 2, "1", "1+1=2" and "2+7=9" with " ; " 4 + 8 + 8, the answer 2.
    options = {"max_length": max_length, "on_bad_rows": "drop", "step_separator": " ; "}
    trainer = make_coconut(build_rim(), rows=ROWS[:2], **options)
    assert len(trainer.train_dataset) == num_rows


def test_what_does_not_fit_is_refused(make_coconut: MakeTrainer, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {**ROWS[0], "question": "1+" * 248}  # with thoughts 512 positions are too few
    with pytest.raises(ValueError, match=r"row 0: too long: it takes \d+ tokens, the model has 512 positions"):
        make_coconut(build_rim(), rows=[row], num_stages=9)
    with pytest.raises(ValueError, match="row 1: steps: there are none"):
        make_coconut(build_rim(), rows=[ROWS[0], {"question": "8+1", "steps": [], "answer": "9"}])
    model = build_rim()
    with pytest.raises(
        ValueError, match=r"questions\[1\]: prompt \(\d+ tokens\), thoughts and the tokens around them \(5\)"
    ):
        list(answer_with_thoughts(model, tokenizer, ["1", "1" * 500], num_thoughts=3))
    with pytest.raises(ValueError, match="active adapter is RIM"):
        check_thinks(model.get_base_model())
    model.train()
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing: must be off for continuous thoughts"):
        think(model, torch.tensor([[5]]), torch.tensor([[1]]), num_thoughts=1)
