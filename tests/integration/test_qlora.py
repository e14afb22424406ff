"""QLoRA through recipes, on the CPU: both stages on 4- and 8-bit bases, stopped and resumed, reloaded, and moved."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from benchmarks.measure import peak_memory
from benchmarks.steps import RowSizes, readout_step
from rim_peft import RefinementConfig, RefinementTrainer, RiMConfig
from rim_peft.recipe import ModelOptions, Recipe, load_recipe
from rim_peft.run import train
from rim_peft.run.base import build_meta_base, load_base
from rim_peft.run.loading import load_run
from rim_peft.run.scoring import evaluate
from rim_peft.training.attachment import checkpoint_for
from rim_peft.training.curriculum import Interrupted
from rim_peft.training.simulation import simulate_step
from tests.conftest import build_base, build_tokenizer, randomize_lora, save_base
from tests.integration import two_processes_8_bit
from tests.integration.test_curriculum import SignalAtStep
from tests.training import assert_equal, gradients

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # nf4 needs 64 or more
MEMORY = "rim_memory"

RECIPE = """
model: {{name_or_path: "{base}", quantization: {how}}}
output_dir: "{out}"
adapter: {{num_blocks: 3, r: 8}}
data: {{task: gsm8k, path: "{rows}", validation_rows: 4}}
grounding: &stage
  max_steps: 6
  per_device_train_batch_size: 4
  pack_length: 128
  learning_rate: 1e-2
  dropout: 0.1 # so that random state matters
  optim: {optim}
  save_steps: 2
  logging_steps: 1
refinement: *stage
evaluation: {{max_new_tokens: 4}}
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for split, first in (("train", 2), ("valid", 40), ("test", 60)):
        lines = [
            {
                "question": f"Tom has 3 bags of {n} nuts. How many?",
                "answer": f"<<3*{n}={3 * n}>> <<{3 * n}+0={3 * n}>>\n#### {3 * n}",
            }
            for n in range(first, first + 16)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama_tied", **WIDE)


def make_recipe(folder: Path, base: Path, rows: Path, how: str, *changes: str, optim: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(base=base, rows=rows, how=how, out=folder / "out", optim=optim))
    return load_recipe(path, changes)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "adapter_model.safetensors")


def memory(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.base_model.memory.rows("default").detach()
    return found


def logits(model: Any) -> torch.Tensor:
    tokens = torch.tensor([[20, 30, 40, 262, 263, 263, 264, 60]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


PAGED = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@PAGED
@pytest.mark.parametrize(("how", "optim"), [("nf4", "paged_adamw_32bit"), ("int8", "paged_adamw_8bit")])
def test_both_stages_evaluation_and_reload(how: str, optim: str, base: Path, rows: Path, tmp_path: Path) -> None:
    run = train(make_recipe(tmp_path, base, rows, how, optim=optim))
    stored = adapter(tmp_path)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert {p.dtype for name, p in run.model.named_parameters() if "lora_" in name} == {torch.float32}
    set_seed(0)
    start = get_peft_model(load_base(str(base), ModelOptions(name_or_path=str(base))), RiMConfig(num_blocks=3, r=8))
    assert not torch.allclose(memory(run.model), memory(start), atol=1e-3)
    for stage in ("grounding", "refinement"):
        lines = json.loads((tmp_path / "out" / stage / "history.json").read_text())
        losses = [line["loss"] for line in lines if "loss" in line]
        assert losses[-1] < losses[0]

    loaded = load_run(tmp_path / "out")
    quantization: Any = loaded.model.get_base_model().config.quantization_config
    assert quantization.load_in_4bit == (how == "nf4")
    assert torch.equal(memory(loaded.model), memory(run.model))
    torch.testing.assert_close(logits(loaded.model), logits(run.model), atol=1e-4, rtol=1e-4)
    reports = [evaluate(judged, path=str(rows), limit=8, by_block=True) for judged in (run, loaded)]
    assert reports[0] == reports[1]
    assert reports[0]["num_rows"] == 8


@PAGED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "optim", "stage"),
    [
        ("nf4", "paged_adamw_32bit", "grounding"),
        ("nf4", "paged_adamw_8bit", "refinement"),
        ("int8", "paged_adamw_32bit", "refinement"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights(
    how: str, optim: str, stage: str, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    train(make_recipe(unbroken, base, rows, how, optim=optim))
    SignalAtStep(monkeypatch, stage, 3, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(make_recipe(stopped, base, rows, how, optim=optim))
    train(make_recipe(stopped, base, rows, how, "resume=true", optim=optim))
    assert_equal(adapter(stopped), adapter(unbroken))


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_an_adapter_trained_on_quantised_weights_fits_the_full_base(
    how: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    run = train(make_recipe(tmp_path, base, rows, how, "data.validation_rows=0", optim="adamw_torch"))
    full: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")).eval()
    assert torch.equal(memory(full), memory(run.model))
    moved, trained = logits(full), logits(run.model)
    prompt = torch.tensor([[20, 30, 40]])
    with torch.no_grad(), full.disable_adapter():
        untrained = full(input_ids=prompt).logits
    # What is left of the difference is the weights' rounding; what was learned is many times as much.
    rounding = (moved - trained)[:, :3].norm()
    assert (moved - trained).norm() < {"nf4": 0.4, "int8": 0.06}[how] * trained.norm()
    assert (moved[:, :3] - untrained).norm() > {"nf4": 3, "int8": 20}[how] * rounding


def test_a_trainer_takes_the_name_of_a_base_that_is_stored_quantised(tmp_path: Path) -> None:
    build_base(hidden_size=64).save_pretrained(tmp_path / "full")
    options = ModelOptions(name_or_path=str(tmp_path / "full"), quantization="nf4")
    load_base(str(tmp_path / "full"), options).save_pretrained(tmp_path / "nf4")
    args = RefinementConfig(
        str(tmp_path), max_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True
    )
    rows = Dataset.from_list([{"question": "1+2", "answer": "3", "steps": ["3"]}])
    trainer = RefinementTrainer(
        str(tmp_path / "nf4"), args, rows, processing_class=build_tokenizer(), peft_config=RiMConfig(num_blocks=2, r=4)
    )
    assert trainer.train().training_loss > 0
    assert trainer.model.get_base_model().is_loaded_in_4bit


@PAGED
def test_moments_of_the_memory_rows_stay_float32_beside_8_bit_ones(tmp_path: Path) -> None:
    """bitsandbytes keeps small tensors in 32 bits anyway: the base is as wide as real ones, where the rows are not."""
    base = build_base(hidden_size=1536, intermediate_size=64, num_hidden_layers=1)
    model: Any = get_peft_model(base, RiMConfig(num_blocks=2, r=8))
    args = RefinementConfig(
        str(tmp_path), max_steps=1, optim="paged_adamw_8bit", report_to="none", disable_tqdm=True, save_strategy="no"
    )
    rows = Dataset.from_list([{"question": "1+2", "answer": "3", "steps": ["3"]}])
    trainer = RefinementTrainer(model, args, rows, processing_class=build_tokenizer())
    trainer.train()
    kept = {name: trainer.optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: state["state1"].dtype for name, state in kept.items()}
    assert memory(model).numel() > 4096
    assert {dtype for name, dtype in moments.items() if MEMORY in name} == {torch.float32}
    assert torch.uint8 in moments.values()


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_checkpointing_spares_memory_on_quantised_weights_too(how: Any, base: Path) -> None:
    def attach(loaded: Any) -> Any:
        return get_peft_model(loaded, RiMConfig(num_blocks=4, r=8))

    plain, quantised = (ModelOptions(name_or_path=str(base), quantization=name) for name in (None, how))
    steps = [
        readout_step(
            attach(load_base(str(base), options)), "stage 2", RowSizes(batch=4, prompt=100), checkpointing=True
        )
        for options in (plain, quantised)
    ]
    for step in steps:
        step()  # allocates the optimiser's state
    full, measured = (peak_memory(step.forward_and_backward) for step in steps)
    assert measured < 1.05 * full
    outline = attach(build_meta_base(AutoConfig.from_pretrained(base), quantised))
    simulated = simulate_step(outline, *steps[1].rows(), checkpointing=True)
    assert simulated.step == pytest.approx(measured, rel=0.1)


def test_the_kind_of_checkpointing_can_be_chosen_on_8_bit_weights(base: Path, tmp_path: Path) -> None:
    loaded = load_base(str(base), ModelOptions(name_or_path=str(base), quantization="int8"))
    args = RefinementConfig(str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": False})
    assert checkpoint_for(loaded, args) is args
    left = RefinementConfig(str(tmp_path))
    chosen = checkpoint_for(loaded, left)
    assert chosen.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert chosen.ddp_find_unused_parameters is False
    assert not left.gradient_checkpointing_kwargs
    off = RefinementConfig(str(tmp_path), gradient_checkpointing=False)
    assert checkpoint_for(loaded, off) is off


@pytest.mark.parametrize("variant", [{}, {"insertion_layer": 1}, {"bidirectional_blocks": True}], ids=str)
def test_checkpointing_8_bit_layers_changes_no_gradient(variant: dict[str, Any], base: Path) -> None:
    def run(*, checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        loaded = load_base(str(base), ModelOptions(name_or_path=str(base), quantization="int8"))
        model: Any = get_peft_model(loaded, RiMConfig(num_blocks=2, r=4, **variant))
        randomize_lora(model)
        step = readout_step(model, "stage 2", RowSizes(batch=2, prompt=12), checkpointing=checkpointing)
        torch.manual_seed(1)
        randomize_lora(model)  # what the step that began the training has changed
        step.loss().backward()
        return gradients(model)

    torch.testing.assert_close(run(checkpointing=True), run(checkpointing=False))


@pytest.mark.slow
def test_two_processes_on_an_8_bit_base_equal_one(base: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    module = ["-m", two_processes_8_bit.__name__, str(base), str(tmp_path)]
    subprocess.run([sys.executable, *launcher, *module], check=True, timeout=300, cwd=Path(__file__).parents[2])
    expected = two_processes_8_bit.train(base, tmp_path / "one", batch=4)
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        for name, tensor in expected.items():  # gradients are averaged in another order
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
