"""Files of an adapter, checked before PEFT reads them: are they there, whole, and of this base?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What others put into the names of parameters, and leave out of the names in a file."""

_BASE_PREFIX = "base_model.model."
_AGAIN = "Copy or download the adapter again (from the Hub with force_download=True), or save it again."


def check_files(folder: Path) -> None:
    """Check that a folder holds an adapter whose files are whole.

    Raises:
        FileNotFoundError: there is no configuration, or no weights as safetensors.
        ValueError: the configuration is not JSON, or the weights' file is damaged or cut off.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: must hold an adapter ({CONFIG_NAME}), and does not. Name its folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path}: must be JSON, and is damaged or cut off ({error}). {_AGAIN}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{path}: must be a configuration of PEFT, and names no peft_type. {_AGAIN}")
    check_weights(folder)


def check_weights(folder: Path) -> None:
    """Check that a folder holds an adapter's weights, as safetensors and whole.

    Values are not checked: a file of the right length has no checksum.

    Raises:
        FileNotFoundError: there are none, or only a pickle.
        ValueError: their file is damaged or cut off.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        pickled = f"; {WEIGHTS_NAME} is a pickle, which can run code, and is not read"
        also = pickled if (folder / WEIGHTS_NAME).is_file() else ""
        raise FileNotFoundError(
            f"{folder}: must hold the adapter's weights ({path.name}), and does not{also}. {_AGAIN}"
        )
    try:
        with safe_open(path, framework="pt"):
            pass  # opening a file reads its header and compares it with the file's length
    except SafetensorError as error:
        raise damaged_weights(str(path), error) from error


def damaged_weights(source: str, error: Exception) -> ValueError:
    """Return the error that tells a user what safetensors' own message means."""
    return ValueError(f"{source}: must be a whole safetensors file, and is damaged or cut off ({error}). {_AGAIN}")


def read_json(path: Path, *, keys: Sequence[str] = (), remedy: str = _AGAIN) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        keys: what it must have.
        remedy: what to do where it is damaged.

    Raises:
        ValueError: it is no JSON, no object, or lacks a key.
        FileNotFoundError: there is no file.
    """
    value = read_json_value(path, remedy=remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {repr(value)[:60]}. {remedy}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path}: must have {', '.join(missing)}, and has {_some(value)}. {remedy}")
    return value


def read_json_value(path: Path, *, remedy: str) -> Any:
    """Read a JSON file, whatever it holds.

    Raises:
        ValueError: it is no JSON.
        FileNotFoundError: there is no file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        where = f"at byte {error.start}, which is no UTF-8"
    except RecursionError:
        where = "nested too deeply"
    raise ValueError(f"{path}: must be JSON, and is damaged or cut off ({where}). {remedy}")


def check_folder_path(name: str, path: Path) -> None:
    """Check that a path to write to can be a folder.

    Raises:
        ValueError: it, or what it would lie in, is a file.
    """
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        raise ValueError(f"{name}: must be a folder, {there} is a file. Give another one, or move the file away.")


def read_tensors(path: Path, *, remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file that must be whole and finite.

    Raises:
        ValueError: it is not.
        FileNotFoundError: there is no file.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: must be a whole safetensors file, and is damaged or cut off. {remedy}") from error
    if (found := not_finite(tensors)) is not None:
        raise ValueError(f"{path}: its tensors must be finite, {found}: the training had diverged. {remedy}")
    return tensors


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "nothing"


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return which tensor holds a number that is not finite, and the number; None if there is none.

    >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf"), float("nan")])})
    'b holds inf'
    """
    for name, tensor in tensors.items():
        is_finite = tensor.isfinite()
        if not is_finite.all():
            return f"{name} holds {tensor[~is_finite][0].item()}"
    return None


def check_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that a file's tensors are those of an adapter on its base, in name and shape.

    Args:
        model: the base with the adapter attached, within PEFT's model or not.
        adapter_name: name of the adapter.
        tensors: the file's, by their names in the model.

    Raises:
        ValueError: a tensor is missing, is none of the adapter's, or has another shape.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".lora_" in name}
    expected = _shapes(model, adapter_name)
    if any(name.endswith("_flat_param") for name in expected):
        return  # FSDP's first version flattens parameters
    if not any(name.startswith(_BASE_PREFIX) for name in expected):
        found = {name.removeprefix(_BASE_PREFIX): shape for name, shape in found.items()}
    wrong = [
        f"{name} {expected.get(name, 'not there')}, got {found.get(name, 'none')}"
        for name in {**expected, **found}
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(
            f"adapter's file: its tensors must be those of the adapter on this base, {wrong[0]}{more}: it was made for "
            f"another base, or is not the file of its {CONFIG_NAME}. Load it onto its own base, "
            "loaded anew, with its own file."
        )


def _shapes(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    own = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(\.|$)")  # "layers" may be an adapter's name, too
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith("_flat_param") or own.search(name):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            shapes[name] = tuple(parameter.shape)
    return shapes
