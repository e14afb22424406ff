"""What launchers ask for and a training cannot do is refused by name, with a remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from rim_peft import GroundingConfig, RefinementConfig
from rim_peft.training import distributed as launch
from rim_peft.training.coconut import CoconutTrainer
from rim_peft.training.distributed import check_launch
from rim_peft.training.readout_config import ReadoutConfig
from rim_peft.training.rim import RefinementTrainer

CONFIGS = sorted((Path(__file__).parents[3] / "recipes" / "accelerate").glob("*.yaml"))


def spread(
    *,
    fsdp_version: int | None = None,
    zero_stage: int | None = None,
    num_gpus: int = 1,
    is_quantized: bool = False,
    trainer_class: Any = RefinementTrainer,
    config_class: type[ReadoutConfig] = GroundingConfig,
    **options: Any,
) -> Any:
    """A trainer as far as the check looks at it: its class, options, base, and accelerate's plugins."""
    fsdp = None if fsdp_version is None else SimpleNamespace(fsdp_version=fsdp_version)
    deepspeed = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    args = config_class(output_dir="out", report_to="none", **options)
    args._n_gpu = num_gpus
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)),
        is_deepspeed_enabled=deepspeed is not None,
        args=args,
        model=SimpleNamespace(get_base_model=lambda: SimpleNamespace(is_quantized=is_quantized)),
        trains_sharded=trainer_class.trains_sharded,
    )
    check_launch(trainer)
    return trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpus": 4}, r"n_gpu: each process must train on one GPU, got 4, .*CUDA_VISIBLE_DEVICES=0"),
        ({"fsdp_version": 1}, r"fsdp_version: must be 2, .* got 1\. Set it, as recipes/accelerate/fsdp2.yaml"),
        ({"fsdp_version": 2, "is_quantized": True}, r"quantization: must be none under FSDP, .*bnb_4bit_quant_storage"),
        ({"fsdp_version": 2, "compile_layers": True}, "compile_layers: must be False under FSDP"),
        ({"fsdp_version": 2, "optim": "paged_adamw_8bit"}, r"optim: must support sharded .* got paged_adamw_8bit"),
        ({"fsdp_version": 2, "trainer_class": CoconutTrainer}, r"distributed_type: .* more than one forward pass"),
        ({"zero_stage": 2, "trainer_class": CoconutTrainer}, r"distributed_type: .* more than one forward pass"),
        ({"zero_stage": 3}, r"zero_stage: must be at most 2, got 3: .*zero2.yaml"),
        (
            {"zero_stage": 2, "config_class": RefinementConfig, "reset_optimizer": False},
            "reset_optimizer: must be True under DeepSpeed",
        ),
    ],
)
def test_it_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spread(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainer_class": CoconutTrainer, "is_quantized": True, "optim": "paged_adamw_8bit"},  # by DDP
        {"fsdp_version": 2, "optim": "adamw_torch"},
        {"zero_stage": 2, "is_quantized": True},
    ],
)
def test_it_is_taken(options: dict[str, Any]) -> None:
    spread(**options)


def test_fsdp_needs_a_newer_accelerate_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LEAST_ACCELERATE", "99.0")
    spread()
    with pytest.raises(ValueError, match=r"accelerate: must be at least 99.0 under FSDP, .*Upgrade it"):
        spread(fsdp_version=2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_files(path: Path) -> None:
    config = load_config_from_file(str(path))  # which refuses unknown keys
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem]
    assert config.num_processes == 2
    assert config.mixed_precision == "no"  # which the recipe says, stage by stage
    known = {name for action in launch_command_parser()._actions for name in action.option_strings}
    assert {f"--{key}" for key in (*config.fsdp_config, *config.deepspeed_config)} <= known
