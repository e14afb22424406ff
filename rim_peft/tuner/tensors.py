"""An adapter's tensor file: write it with a checksum, and check that it contains this adapter and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rim_peft.values import cut

AGAIN = "Copy or download the adapter again (from the Hub with force_download=True), or save it again."

_CHECKSUM = "rim_sha256"
"""Key of the checksum in a file's metadata; files without it (older, or from other tools) are read unchecked."""

_CHUNK = 1 << 20
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Prefixes that wrappers add to parameter names; files do not have them."""

_BASE_PREFIX = "base_model.model."


def seal_tensors(path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Add a checksum to a safetensors file and sort its metadata, so that equal tensors give equal bytes.

    The file is replaced atomically.

    Args:
        notes: more metadata.
    """
    # safetensors writes metadata in random order.
    header, start = _read_header(path)
    metadata = {**header.pop("__metadata__", {}), **(notes or {})}
    metadata[_CHECKSUM] = _checksum(path, header, metadata, start)
    text = json.dumps(
        {"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    with path.open("rb") as old, partial.open("wb") as new:
        old.seek(start)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, _CHUNK)
    shutil.copymode(path, partial)
    partial.replace(path)


def check_tensors_file(path: Path) -> None:
    """Check by its header and length that a safetensors file is complete.

    Raises:
        ValueError: it is incomplete or damaged.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # opening a file reads its header and compares it with the file length
    except SafetensorError as error:
        raise damaged_file(str(path), error) from error


def check_checksum(path: Path) -> None:
    """Check the checksum of a safetensors file; files without one, and unreadable files, pass.

    Raises:
        ValueError: the file was changed since it was saved.
    """
    try:
        with safe_open(path, framework="pt") as file:
            noted = (file.metadata() or {}).get(_CHECKSUM)
    except (OSError, SafetensorError):  # reported when the file is read
        return
    if noted is None:
        return
    header, start = _read_header(path)
    metadata = header.pop("__metadata__")
    if noted != _checksum(path, header, metadata, start):
        raise ValueError(
            f"{path}: must be as it was saved, but its checksum ({_CHECKSUM}) shows that it was changed or damaged. "
            f"{AGAIN}"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a tensor file onto the CPU.

    Raises:
        ValueError: the file is damaged, or a tensor is not finite or has a dtype that weights do not have.
    """
    check_tensors_file(path)
    check_checksum(path)
    tensors: dict[str, Tensor] = load_file(path)
    check_values(tensors, source=str(path))
    return tensors


def read_notes(path: Path) -> dict[str, str]:
    """Return the metadata of a complete file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a complete file's tensors by name, without reading the tensors."""
    header, _ = _read_header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def damaged_file(source: str, error: Exception) -> ValueError:
    """Return an error that explains safetensors' own message."""
    return ValueError(f"{source}: must be a whole safetensors file, but is damaged or cut off ({error}). {AGAIN}")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the first tensor with a non-finite number, and the number; None if all are finite.

    >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf"), float("nan")])})
    'b holds inf'
    """
    for name, tensor in tensors.items():
        is_finite = tensor.isfinite()
        if not tensor.is_meta and not is_finite.all():
            return f"{name} holds {tensor[~is_finite][0].item()}"
    return None


def check_values(tensors: Mapping[str, Tensor], *, source: str = "adapter's file") -> None:
    """Check that tensors are finite and have a dtype of weights.

    Raises:
        ValueError: one is not or does not; the message names it.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{source}: its tensors must be float32, bfloat16 or float16, got {_plain(tensor.dtype)} in "
                f"{cut(name, most=200)}: adapter weights have other types. {AGAIN}"
            )
    if (found := not_finite(tensors)) is not None:
        raise ValueError(
            f"{source}: its tensors must be finite, got NaN or infinity: {cut(found, most=200)}: it is damaged, or its "
            "training failed. Use another checkpoint or copy of it, or train it again."
        )


def check_tensors(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], *, any_rank: bool = False
) -> dict[str, Tensor]:
    """Check that a file contains exactly an adapter's tensors for its base, and return them.

    Args:
        model: the base with the adapter attached, inside PEFT's model or not.
        tensors: the file's tensors, by their names in the model.
        any_rank: allow LoRA matrices with other ranks than the attached ones.

    Raises:
        ValueError: a tensor is missing, does not belong to the adapter, has another shape or dtype, or is not finite.
    """
    check_values(tensors)
    state = {**_named(model.named_parameters(remove_duplicate=False)), **_named(model.named_buffers())}
    if not any(name.startswith(_BASE_PREFIX) for name in state):
        tensors = {name.removeprefix(_BASE_PREFIX): tensor for name, tensor in tensors.items()}
    own = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")  # an adapter can also be named like a module
    in_full = {_unwrapped(attached) for attached in _names_in_full(model, adapter_name).values()}
    expected = {name: tuple(value.shape) for name, value in state.items() if own.search(name) or name in in_full}
    embeddings = _embeddings(model)
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected or not _is_copy(tensor, state.get(name), embeddings)
    }
    found = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    if any(name.endswith("_flat_param") for name in state):  # FSDP's first version hides parameter names
        expected = {name: shape for name, shape in found.items() if own.search(name)}
    _compare(expected, found, state, any_rank=any_rank)
    # A finite float64 may become infinite in the model's dtype.
    check_values({name: tensor.to(state[name].dtype) for name, tensor in kept.items() if name in state})
    return kept


def attached_names(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a file's tensors of fully trained modules to their names in the model."""
    names = _names_in_full(model, adapter_name)
    return {names.get(name, names.get(name.removeprefix(_BASE_PREFIX), name)): value for name, value in tensors.items()}


def _names_in_full(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Map names of fully trained tensors: in a file -> in the model."""
    return {
        f"{prefix}.{stored}": f"{prefix}.{attached}"
        for prefix, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for stored, attached in module.adapter_state_dict_load_map(adapter_name).items()
    }


def _compare(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
    *,
    any_rank: bool,
) -> None:
    foreign = [name for name in found if name not in expected]
    if of_base := [name for name in foreign if name in state]:
        raise ValueError(
            f"adapter's file: its tensors must be those of the adapter and no others, got one of the base, "
            f"{cut(of_base[0], most=200)}{_more(of_base)}: it would change the model that the adapter is attached to. "
            "Get the adapter from another source; whoever saved it must save the base separately."
        )
    wrong = [
        f"{cut(name, most=200)} {expected.get(name, 'not there')}, got {found.get(name, 'none')}"
        for name in {**expected, **found}
        if not _is_same_shape(name, expected.get(name), found.get(name), any_rank=any_rank)
    ]
    if wrong:
        raise ValueError(
            f"adapter's file: its tensors must be those of the adapter on this base, {wrong[0]}{_more(wrong)}: it was "
            f"made for another base, or is not the file of its {CONFIG_NAME}. Load its own base again, then the "
            "adapter with its own file."
        )


def _is_same_shape(
    name: str, expected: tuple[int, ...] | None, found: tuple[int, ...] | None, *, any_rank: bool
) -> bool:
    if not any_rank or expected is None or found is None or len(expected) != len(found):
        return expected == found
    rank = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
    return all(
        first == second or axis == rank for axis, (first, second) in enumerate(zip(expected, found, strict=True))
    )


def _embeddings(model: Any) -> set[int]:
    """Return the memory addresses of the base's input embedding and output head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = (
        [base.get_input_embeddings(), base.get_output_embeddings()] if hasattr(base, "get_input_embeddings") else []
    )
    return {
        weight.data_ptr()
        for layer in layers
        if layer is not None
        for weight in getattr(layer, "base_layer", layer).parameters()
    }


def _is_copy(tensor: Tensor, own: Tensor | None, embeddings: set[int]) -> bool:
    """Tell whether a tensor equals the base's embedding or head, which PEFT saves after a vocabulary resize."""
    if own is None or own.is_meta or own.shape != tensor.shape or own.data_ptr() not in embeddings:
        return False
    return torch.equal(tensor.to(own), own)


def _named(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {_unwrapped(name): tensor for name, tensor in tensors}


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a complete safetensors file, and the offset of its data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _checksum(path: Path, header: Mapping[str, Any], metadata: Mapping[str, str], start: int) -> str:
    noted = {name: value for name, value in metadata.items() if name != _CHECKSUM}
    digest = hashlib.sha256(json.dumps([noted, dict(header)], sort_keys=True).encode())
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _more(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return f" (and {count} more)" if count else ""
