"""A model whose weights are spread over processes by FSDP2: gathered, filled, and run outside of a training step.

Whatever is gathered here looks as one process would have left it, so files do not tell how many processes wrote them.
Every process must call each of these functions, since the processes exchange their shards in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rim_peft.tuner.config import active_config
from rim_peft.tuner.registration import PREFIX

T = TypeVar("T")


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
