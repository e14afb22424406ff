"""Training with several processes: work for the main process, checks of launcher settings, weights sharded by FSDP2.

Tensors gathered from shards look as if one process had trained, so files do not depend on the number of processes.
Every process must call the functions that gather, fill or run a sharded model, since they exchange shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, compare_versions
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rim_peft.tuner.config import active_config
from rim_peft.tuner.peft_plugin import PREFIX

T = TypeVar("T")


class MainProcessFailed(RuntimeError):  # noqa: N818 - another process has the error and reports it
    """The main process failed, so the others stop too."""


def num_processes() -> int:
    """Return how many processes train together, without initialising anything."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this process is the one that writes and reports, without initialising anything."""
    return int(os.environ.get("RANK", "0")) == 0


def check_resumed(checkpoint: Path) -> None:
    """Check that a checkpoint is resumed with as many processes as wrote it; otherwise later steps would differ.

    Raises:
        ValueError: there are more or fewer.
    """
    written = len(list(checkpoint.glob("rng_state_*.pth"))) or 1  # one process writes rng_state.pth
    if written != num_processes():
        raise ValueError(
            f"resume: needs as many processes as wrote {checkpoint}, {written}, got "
            f"{num_processes()}, which would change the total batch size. Start {written}."
        )


def shards_weights() -> bool:
    """Tell whether the launcher asks for FSDP, which shards the weights over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def on_main(function: Callable[[], T]) -> T:
    """Call a function in the main process only, and return its result, which must be picklable, in every process.

    Raises:
        MainProcessFailed: the function failed; the main process raises the function's own error.
    """
    if num_processes() == 1:
        return function()
    _connect()
    outcome: list[T | None] = [None]
    failure: Exception | None = None
    if is_main():
        try:
            outcome = [function()]
        except Exception as error:
            failure = error
    # Two messages: the result alone could not be told from a failure, since it may be None.
    (has_failed,) = broadcast_object_list([failure is not None])
    if failure is not None:
        raise failure
    if has_failed:
        raise MainProcessFailed("the main process failed. See its error for the cause.")
    broadcast_object_list(outcome)
    result: T = outcome[0]  # type: ignore[assignment]
    return result


def main_first(function: Callable[[], T]) -> T:
    """Call a function in the main process, then in the others, which find its files on disk.

    Raises:
        MainProcessFailed: the function failed in the main process, which raises the function's own error.
    """
    kept: list[T] = []
    on_main(lambda: kept.append(function()))
    return kept[0] if kept else function()


def _connect() -> None:
    """Connect the processes and assign each its GPU.

    Raises:
        RuntimeError: each of them would train alone.
    """
    if PartialState().num_processes != num_processes():
        raise RuntimeError(
            f"processes: {num_processes()} were started, but accelerate finds no GPUs for them. "
            "Start one process, or set ACCELERATE_USE_CPU=true for processes on the CPU."
        )


LEAST_ACCELERATE = "1.13"
"""Required by FSDP; everything else works with older versions."""


def check_launch(trainer: Any) -> None:
    """Check how accelerate distributes a training, which is known once the trainer exists.

    Raises:
        ValueError: its method, its base or an option does not support that.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: each process must train on one GPU, got {trainer.args.n_gpu}, for which the Trainer would use "
            "nn.DataParallel. Start it with accelerate launch (recipes/accelerate/ddp.yaml), or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    state = trainer.accelerator.state
    is_fsdp = getattr(state, "fsdp_plugin", None) is not None
    if (is_fsdp or trainer.is_deepspeed_enabled) and not trainer.trains_sharded:
        raise ValueError(
            f"distributed_type: {type(trainer).__name__} runs the base in more than one forward pass, which neither "
            "FSDP nor DeepSpeed supports. Use recipes/accelerate/ddp.yaml."
        )
    if is_fsdp:
        _check_fsdp(trainer, state.fsdp_plugin)
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer, state.deepspeed_plugin)


def _check_fsdp(trainer: Any, plugin: Any) -> None:
    args = trainer.args
    if compare_versions("accelerate", "<", LEAST_ACCELERATE):
        raise ValueError(
            f"accelerate: must be at least {LEAST_ACCELERATE} under FSDP, since older versions lose the optimiser's "
            f"parameters in a second stage, got {accelerate.__version__}. Upgrade it."
        )
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version: must be 2, the only one this package supports, got {plugin.fsdp_version}. Set it, as "
            "recipes/accelerate/fsdp2.yaml does."
        )
    if getattr(trainer.model.get_base_model(), "is_quantized", False):
        raise ValueError(
            "quantization: must be none under FSDP, which cannot shard packed weights (4 bits packed into a "
            "float type, bnb_4bit_quant_storage, are not supported here). Use recipes/accelerate/ddp.yaml, with a "
            "whole quantised base on each GPU, or omit quantization."
        )
    if args.compile_layers:
        raise ValueError(
            "compile_layers: must be False under FSDP, whose gathering would be compiled into the layers. Omit it."
        )
    name = str(getattr(args.optim, "value", args.optim))
    if "8bit" in name or "paged" in name or "bnb" in name:
        raise ValueError(
            f"optim: must support sharded weights under FSDP, got {name} of bitsandbytes. Use "
            "adamw_torch, whose state is sharded too."
        )


def _check_deepspeed(trainer: Any, plugin: Any) -> None:
    if plugin.zero_stage > 2:
        raise ValueError(
            f"zero_stage: must be at most 2, got {plugin.zero_stage}: answering validation questions needs whole "
            "layers. Use recipes/accelerate/zero2.yaml or, if the base is too large for one GPU, fsdp2.yaml."
        )
    if not getattr(trainer.args, "reset_optimizer", True):
        raise ValueError(
            "reset_optimizer: must be True under DeepSpeed, whose optimiser partitions its state in its own format. "
            "Omit it, or use recipes/accelerate/ddp.yaml."
        )


def is_sharded(model: nn.Module) -> bool:
    """Tell whether each process holds only a part of the model's weights."""
    return isinstance(model, FSDPModule)


def keep_memory(model: PeftModel) -> None:
    """Keep memory rows gathered after the embedding that holds them, if they enter only at a middle layer."""
    memory = model.base_model.memory
    if active_config(model).insertion_layer and isinstance(memory, FSDPModule):
        memory.set_reshard_after_forward(False)


def gather_adapter(model: PeftModel) -> dict[str, Tensor] | None:
    """Return the adapters' whole tensors on the CPU by their names in the model, as ``save_pretrained`` takes them.

    None if the model is not sharded, since it has them itself.
    """
    if not is_sharded(model):
        return None
    _reshard(model)
    return {name: _whole(parameter) for name, parameter in model.named_parameters() if PREFIX in name}


def fill_adapter(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors, by their names in an adapter's file, into the active adapter.

    Raises:
        ValueError: a tensor is missing, or the file belongs to another adapter; nothing is written then.
    """
    if not is_sharded(model):
        try:
            set_peft_model_state_dict(model, dict(tensors), adapter_name=model.active_adapter)
        except KeyError as error:  # a fully trained module
            raise _missing(str(error.args[0])) from error
        return
    _reshard(model)
    parts = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    if missing := sorted(parts.keys() - tensors.keys()):
        raise _missing(missing[0])
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(_like(tensors[name], part))


def _missing(name: str) -> ValueError:
    return ValueError(
        f"adapter's file: must hold {name}, but does not: it belongs to another adapter. Use this adapter's file."
    )


def gather_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return an optimiser's state with whole tensors on the CPU."""
    state = optimizer.state_dict()
    whole = {
        index: {name: _whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": whole}


def fill_optimizer(optimizer: Any, kept: Mapping[str, Any]) -> None:
    """Load the state from :func:`gather_optimizer` into an optimiser of the same parameters, sharded or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: _like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in kept["state"].items()
    }
    optimizer.load_state_dict({**kept, "state": state})


def run_whole(model: PeftModel, function: Callable[[PeftModel], T]) -> T:
    """Call a function that uses the model freely, for example to answer questions; without gradients.

    Layers of a sharded model gather their weights when they run; the rest is gathered for the whole call. So all
    processes must run the same layers in the same order: give each of them the same questions.
    """
    if not is_sharded(model):
        return function(model)
    results: list[T] = []
    # FSDP gathers around `forward` and around registered methods. It also inspects what they return, so return None.
    own: Any = vars(model)
    own["_run_whole"] = lambda: results.append(function(model))
    try:
        register_fsdp_forward_method(model, "_run_whole")
        with torch.no_grad():
            own["_run_whole"]()
    finally:
        del own["_run_whole"]
    return results[0]


def _reshard(model: nn.Module) -> None:
    """Release weights that are still gathered after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def _like(whole: Tensor, part: Tensor) -> Tensor:
    """Return a whole tensor, sharded like ``part``."""
    if not isinstance(part, DTensor):
        return whole
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)
