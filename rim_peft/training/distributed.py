"""Several processes: what one does first, what launchers may ask for, and weights spread by FSDP2.

Whatever is gathered here looks as one process would have left it, so files do not tell how many processes wrote them.
Every process must call each of these functions, since the processes exchange their shards in it.
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


class MainProcessFailed(RuntimeError):  # noqa: N818 - of another process, which says what its error is
    """The main process has failed in what it does before the others, which stop too."""


def num_processes() -> int:
    """Return how many processes train together; known without setting anything up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this process is the one that writes and reports; known without setting anything up."""
    return int(os.environ.get("RANK", "0")) == 0


def check_resumed(checkpoint: Path) -> None:
    """Check that as many processes go on as have written a checkpoint, or the steps to come would be others.

    Raises:
        ValueError: there are more or fewer.
    """
    written = len(list(checkpoint.glob("rng_state_*.pth"))) or 1  # one process writes rng_state.pth
    if written != num_processes():
        raise ValueError(
            f"resume: must go on with as many processes as have written {checkpoint}, {written}, got "
            f"{num_processes()}, whose batches together have another size. Start {written}."
        )


def shards_weights() -> bool:
    """Tell whether the launcher asks for FSDP, which gives each process a part of the weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def on_main(function: Callable[[], T]) -> T:
    """Let the main process alone call a function, and return its result, which must be picklable, in every process.

    Raises:
        MainProcessFailed: the function failed; in the main process the error is the function's own.
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
    # Two messages, since a result may be none that a failed one could be told from.
    (has_failed,) = broadcast_object_list([failure is not None])
    if failure is not None:
        raise failure
    if has_failed:
        raise MainProcessFailed("the main process has failed, and says why. Look at its error.")
    broadcast_object_list(outcome)
    result: T = outcome[0]  # type: ignore[assignment]
    return result


def main_first(function: Callable[[], T]) -> T:
    """Call a function in the main process, then in the others, which find on the disk what it has left there.

    Raises:
        MainProcessFailed: the function failed in the main process, where the error is the function's own.
    """
    kept: list[T] = []
    on_main(lambda: kept.append(function()))
    return kept[0] if kept else function()


def _connect() -> None:
    """Let the processes find each other, and each of them its GPU.

    Raises:
        RuntimeError: each of them would train alone.
    """
    if PartialState().num_processes != num_processes():
        raise RuntimeError(
            f"processes: {num_processes()} were started, but accelerate finds no GPUs that they could share the work "
            "on. Start one process, or set ACCELERATE_USE_CPU=true for processes on the CPU."
        )


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


def is_sharded(model: nn.Module) -> bool:
    """Tell whether each process holds only a part of the model's weights."""
    return isinstance(model, FSDPModule)


def keep_memory(model: PeftModel) -> None:
    """Let memory rows that enter at a middle layer stay gathered until then, after the embedding that holds them."""
    memory = model.base_model.memory
    if active_config(model).insertion_layer and isinstance(memory, FSDPModule):
        memory.set_reshard_after_forward(False)


def gather_adapter(model: PeftModel) -> dict[str, Tensor] | None:
    """Return the adapters' whole tensors on the CPU by their names in the model, as ``save_pretrained`` takes them.

    None where the model is not sharded: it has them itself.
    """
    if not is_sharded(model):
        return None
    _reshard(model)
    return {name: _whole(parameter) for name, parameter in model.named_parameters() if PREFIX in name}


def fill_adapter(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors, by their names in an adapter's file, into the active adapter.

    Raises:
        ValueError: a tensor is missing, or the file is another adapter's; nothing is written then.
    """
    if not is_sharded(model):
        try:
            set_peft_model_state_dict(model, dict(tensors), adapter_name=model.active_adapter)
        except KeyError as error:  # a module that is trained in full
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
        f"adapter's file: must hold {name}, and does not: it is another adapter's. Use the adapter's own."
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
    """Load what :func:`gather_optimizer` returned into an optimiser of the same parameters, sharded or not."""
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
    """Call a function that uses the model in its own way, such as to answer questions; without gradients.

    Layers of a sharded model gather their weights when they are run, the rest is gathered for the whole call. So all
    processes must run the same layers in the same order: give each of them the same questions.
    """
    if not is_sharded(model):
        return function(model)
    results: list[T] = []
    # FSDP gathers around `forward` and around methods that it is told of; it also looks into what they return.
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
    """Let go of weights that are still gathered, after a pass without a backward one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def _like(whole: Tensor, part: Tensor) -> Tensor:
    """Return a whole tensor as another one is spread."""
    if not isinstance(part, DTensor):
        return whole
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)
