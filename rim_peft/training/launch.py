"""What a launcher asks for and this training cannot do, refused with a way out."""

from __future__ import annotations

from typing import Any

import accelerate
from accelerate.utils import compare_versions

LEAST_ACCELERATE = "1.13"
"""For FSDP; everything else works with older ones."""


def check_launch(trainer: Any) -> None:
    """Check how accelerate spreads a training over processes, which is known once the trainer has been made.

    Args:
        trainer: one of this package's trainers.

    Raises:
        ValueError: its method, its base or an option cannot be trained that way.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: one process must train on one GPU, got {trainer.args.n_gpu}, which the Trainer would use by "
            "nn.DataParallel. Start it through accelerate launch (recipes/accelerate/ddp.yaml), or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    state = trainer.accelerator.state
    is_fsdp = getattr(state, "fsdp_plugin", None) is not None
    if (is_fsdp or trainer.is_deepspeed_enabled) and not trainer.trains_sharded:
        raise ValueError(
            f"distributed_type: {type(trainer).__name__} runs the base in more than one forward pass, which neither "
            "FSDP nor DeepSpeed follow. Use recipes/accelerate/ddp.yaml."
        )
    if is_fsdp:
        _check_fsdp(trainer, state.fsdp_plugin)
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer, state.deepspeed_plugin)


def _check_fsdp(trainer: Any, plugin: Any) -> None:
    args = trainer.args
    if compare_versions("accelerate", "<", LEAST_ACCELERATE):
        raise ValueError(
            f"accelerate: must be at least {LEAST_ACCELERATE} under FSDP, where older ones lose the optimiser's "
            f"parameters in a second stage, got {accelerate.__version__}. Upgrade it."
        )
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version: must be 2, whose shards this package gathers, got {plugin.fsdp_version}. Set it, as "
            "recipes/accelerate/fsdp2.yaml does."
        )
    if getattr(trainer.model.get_base_model(), "is_quantized", False):
        raise ValueError(
            "quantization: must be none under FSDP, which cannot cut packed weights into shards (4 bits packed into a "
            "float type, bnb_4bit_quant_storage, are not supported here). Use recipes/accelerate/ddp.yaml, with a "
            "whole quantised base on each GPU, or leave quantization out."
        )
    if args.compile_layers:
        raise ValueError(
            "compile_layers: must be False under FSDP, whose gathering would be compiled into the layers. Leave it out."
        )
    name = str(getattr(args.optim, "value", args.optim))
    if "8bit" in name or "paged" in name or "bnb" in name:
        raise ValueError(
            f"optim: must be one that steps on sharded weights under FSDP, got {name} of bitsandbytes. Use "
            "adamw_torch, whose state is sharded too."
        )


def _check_deepspeed(trainer: Any, plugin: Any) -> None:
    if plugin.zero_stage > 2:
        raise ValueError(
            f"zero_stage: must be at most 2, got {plugin.zero_stage}: answers to the validation questions need whole "
            "layers. Use recipes/accelerate/zero2.yaml or, where the base is too large for one GPU, fsdp2.yaml."
        )
    if not getattr(trainer.args, "reset_optimizer", True):
        raise ValueError(
            "reset_optimizer: must be True under DeepSpeed, whose optimiser keeps its state in parts of its own. Leave "
            "it out, or use recipes/accelerate/ddp.yaml."
        )
