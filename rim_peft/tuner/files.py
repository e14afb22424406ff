"""Check the files of an adapter's folder before PEFT reads them: they must exist, be undamaged and be complete."""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from rim_peft.tuner.config import FORMAT_VERSION, RiMConfig
from rim_peft.tuner.peft_plugin import BLOCK_OPTIONS, NAME
from rim_peft.tuner.tensors import AGAIN, check_checksum, check_tensors_file, read_notes, tensor_shapes
from rim_peft.values import shown

RECORD_FILE = "run.json"
"""A training's record of itself and of the files beside it."""

MAX_JSON_BYTES = 16 << 20
"""Most bytes of a configuration or record; larger files are not parsed."""

_MAX_BLOCK_TOKENS = 1 << 16

_ALWAYS_SAID = ("num_blocks", "block_size", "first_memory_id", "r", "lora_alpha", "target_modules")
"""Options in each of our configuration files that answers depend on; a default would mean another adapter."""

_SAID_SINCE_1 = (
    *BLOCK_OPTIONS,
    "base_architecture",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
)
"""More such options, required in files with a ``format_version``; the first files had none."""

_HINTS = get_type_hints(RiMConfig)

OPTIONS_NOTE = "rim_options"
"""Metadata key in an adapter's weights: the options that its answers depend on, besides its tensors."""

_NOTED = (
    *BLOCK_OPTIONS,
    "first_memory_id",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)


def note_options(config: RiMConfig) -> dict[str, str]:
    """Return metadata with an adapter's options for its weights file, to tell files of two adapters apart."""
    return {OPTIONS_NOTE: json.dumps({name: getattr(config, name) for name in _NOTED}, sort_keys=True)}


def check_replacement(source: str, attached: RiMConfig, config: RiMConfig, *, adapter_name: str) -> None:
    """Check that an adapter's weights can replace those of an attached one, which keeps its own options.

    Raises:
        ValueError: an option that answers depend on is different.
    """
    for name in _NOTED:
        old, new = getattr(attached, name), getattr(config, name)
        if old != new:
            raise ValueError(
                f"{source}: {name}: must be {shown(old)}, as in the adapter {adapter_name!r} that is attached, got "
                f"{shown(new)}: PEFT replaces its weights alone. Load it under another name, or delete the attached "
                "one first."
            )


def read_json(path: Path, *, remedy: str = AGAIN, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    Args:
        remedy: what to do if the file is damaged.
        max_bytes: a larger file is not parsed.

    Raises:
        ValueError: it is too large, too deeply nested, or not JSON.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path}: must be at most {max_bytes:,} bytes, got {size:,}: it is another file. {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: must be JSON, but is nested too deeply. {remedy}") from None
    except ValueError as error:  # invalid JSON or UTF-8, or a number of thousands of digits
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}: must be JSON, but is damaged or cut off{where}. {remedy}") from error


def read_object(
    path: Path, *, keys: Sequence[str] = (), remedy: str = AGAIN, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Args:
        keys: keys that it must have.
        remedy: what to do if the file is damaged.
        max_bytes: a larger file is not parsed.

    Raises:
        ValueError: it is too large, too deeply nested, not JSON, not an object, or lacks a key.
        OSError: it cannot be read.
    """
    value = read_json(path, remedy=remedy, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {shown(value)}. {remedy}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path}: must have {', '.join(missing)}, but has {shown(', '.join(value))}. {remedy}")
    return value


def check_folder_path(name: str, path: Path) -> None:
    """Check that an output path can be a folder.

    Raises:
        ValueError: the path, or a parent of it, is a file.
    """
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        raise ValueError(f"{name}: must be a folder, {there} is a file. Use another path, or move the file away.")


def check_files(folder: Path) -> None:
    """Check that a folder contains an adapter with undamaged files.

    Raises:
        FileNotFoundError: the configuration, or the weights as safetensors, are missing.
        ValueError: the configuration cannot be read or lacks something, or the weights file is damaged.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: must hold an adapter ({CONFIG_NAME}), but does not. Name its folder.")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{path}: must be a configuration of PEFT, but names no peft_type. {AGAIN}")
    check_weights(folder)
    check_checksum(folder / SAFETENSORS_WEIGHTS_NAME)
    if config["peft_type"] == NAME:
        check_config(path, config)


def check_weights(folder: Path) -> None:
    """Check that a folder contains an adapter's complete weights as safetensors.

    Raises:
        FileNotFoundError: there are no weights, or only a pickle.
        ValueError: the file is damaged or cut off.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        pickled = f"; {WEIGHTS_NAME} is a pickle, which can run code, and is not read"
        also = pickled if (folder / WEIGHTS_NAME).is_file() else ""
        raise FileNotFoundError(f"{folder}: must hold the adapter's weights ({path.name}), but does not{also}. {AGAIN}")
    check_tensors_file(path)


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check the content of an adapter's configuration file: complete, of the right types, and fit for its weights.

    Args:
        path: the file, for messages; the weights are expected beside it.
        config: its content.

    Raises:
        ValueError: something is missing, has a wrong type or value, or is too large for the weights.
    """
    version = config.get("format_version", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        return  # RiMConfig refuses later formats; their requirements are unknown here
    for name in (*_ALWAYS_SAID, *(_SAID_SINCE_1 if version != 0 else ())):
        if name not in config:
            raise ValueError(f"{path}: must hold {name}, but does not: a default would change the answers. {AGAIN}")
    known = {field.name: config[field.name] for field in fields(RiMConfig) if field.name in config}
    try:
        checked, problem = RiMConfig(**known), None
    except ValueError as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    except (TypeError, AttributeError) as error:  # because of a value's type, which is reported below
        checked, problem = None, error
    for name, value in known.items():
        if not _fits(value, hint := _HINTS[name]):
            raise ValueError(f"{path}: {name}: must be {_describe(hint)}, got {shown(value)}. {AGAIN}")
    if checked is None:
        raise ValueError(
            f"{path}: must be a configuration that {NAME} was saved with, but is not. {AGAIN}"
        ) from problem
    _check_sizes(path, checked)


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files in a folder by their relative path, as records list them."""
    return {name: file_hash(folder / name) for name in sorted(names)}


def file_hash(*paths: Path) -> str:
    """Return the SHA-256 of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def renew_digest(path: Path) -> None:
    """Remove a rewritten file from the record beside it, if its SHA-256 changed.

    For example, continued training in a run's folder replaces the run's weights.
    """
    record_path = path.parent / RECORD_FILE
    try:
        record = read_object(record_path)
        listed = record["files"][path.name]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if listed != file_hash(path):
        del record["files"][path.name]
        partial = record_path.with_name(f".{RECORD_FILE}.partial")
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(record_path)


def check_digests(record_path: Path, listed: Any) -> None:
    """Check that files match a record's list; records of older versions have none.

    Raises:
        ValueError: a file is missing or does not match, or the list is invalid.
    """
    if listed is None:
        return
    if not isinstance(listed, Mapping) or not all(isinstance(digest, str) for digest in listed.values()):
        raise ValueError(f"{record_path}: files: must list each file's SHA-256, but does not. {AGAIN}")
    for name, digest in listed.items():
        path = record_path.parent / name
        if not path.is_file():
            raise ValueError(f"{path}: must be there, since {record_path.name} lists it, but is not. {AGAIN}")
        if file_hash(path) != digest:
            raise ValueError(
                f"{path}: must be as it was written, but {record_path.name} shows that it is another run's, changed or "
                f"damaged. {AGAIN} If you changed it on purpose, remove it from files in {record_path.name}."
            )


def explain(source: str, error: Exception) -> Exception:
    """Turn PEFT's error about an adapter's files into one that names them; return this package's errors unchanged."""
    of_files = ValueError | TypeError | LookupError | AttributeError | ArithmeticError | AssertionError | re.error
    if is_ours(error) or not isinstance(error, of_files):
        return error
    return ValueError(
        f"{source}: {CONFIG_NAME} must describe an adapter of this base, but does not ({brief(error)}). Load it onto "
        f"its own base. {AGAIN}"
    )


def brief(error: Exception) -> str:
    """Return another library's error for a message: its first line, or its type if that is clearer."""
    return _first_line(error) if type(error) in (ValueError, OSError) else type(error).__name__


def is_ours(error: Exception) -> bool:
    """Tell whether this package raised an error, so that its message is already clear."""
    inner = error.__traceback__
    while inner is not None and inner.tb_next is not None:
        inner = inner.tb_next
    package = __name__.partition(".")[0]
    return inner is not None and str(inner.tb_frame.f_globals.get("__name__")).startswith(f"{package}.")


def _check_sizes(path: Path, config: RiMConfig) -> None:
    """Refuse sizes that would exhaust memory before the weights are checked."""
    tokens = config.num_blocks * (config.block_size + 2)
    if tokens > _MAX_BLOCK_TOKENS:
        raise ValueError(
            f"{path}: num_blocks, block_size: must make at most {_MAX_BLOCK_TOKENS:,} tokens, got {tokens:,}. {AGAIN}"
        )
    weights = path.parent / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():  # no weights, or the configuration is in the Hub's cache and the weights come later
        return
    if config.first_memory_id is None:
        raise ValueError(f"{path}: first_memory_id: must have its saved value, got null. {AGAIN}")
    check_tensors_file(weights)
    for name, value in _noted_options(weights).items():
        if value != getattr(config, name, value):
            raise ValueError(
                f"{path}: {name}: must be {shown(value)}, as saved with the weights beside it, got "
                f"{shown(getattr(config, name))}: the files belong to two adapters, or were changed. {AGAIN} To change "
                "an option, load the adapter, set it in peft_config, and save that."
            )
    largest = max((max(shape, default=0) for shape in tensor_shapes(weights).values()), default=0)
    for name, rank in {
        "r": config.r,
        **{f"rank_pattern.{key}": rank for key, rank in (config.rank_pattern or {}).items()},
    }.items():
        if rank > largest:
            raise ValueError(
                f"{path}: {name}: must be a rank of the adapter's weights, which have no dimension above {largest}, "
                f"got {rank}. {AGAIN}"
            )


def _noted_options(weights: Path) -> dict[str, Any]:
    try:
        noted = json.loads(read_notes(weights).get(OPTIONS_NOTE, "{}"))
    except (ValueError, RecursionError):
        noted = None
    if not isinstance(noted, dict):
        raise ValueError(f"{weights}: {OPTIONS_NOTE} in its metadata must be a JSON object, but is not. {AGAIN}")
    return noted


def _fits(value: object, hint: Any) -> bool:
    """Tell whether a JSON value fits a field's type; PEFT checks nested configurations."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str)
    if origin in (list, tuple):
        item = arguments[0] if arguments else Any
        return isinstance(value, list) and all(_fits(entry, item) for entry in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if isinstance(hint, type) and not issubclass(hint, str | bool | types.NoneType):
        return value is None or isinstance(value, dict)
    return hint is Any or isinstance(value, str if issubclass(hint, str) else hint)


def _describe(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    names = {str: "a text", bool: "true or false", int: "an integer", float: "a number", types.NoneType: "null"}
    if hint in names:
        return names[hint]
    origin = get_origin(hint) or hint
    return "a list" if origin in (list, tuple) else "a text" if issubclass(origin, str) else "an object"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
