"""The keys of a recipe, and the checks before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from transformers.activations import ACT2FN

from rim_peft.methods import METHODS, STAGES
from rim_peft.recipe.problems import Problems, join
from rim_peft.recipe.sections import HARDWARE, DataOptions, EvaluationOptions, ModelOptions
from rim_peft.recipe.syntax import hints_of
from rim_peft.tuner import RiMConfig
from rim_peft.values import Range, shown

OWN_SECTIONS: dict[str, type] = {"model": ModelOptions, "data": DataOptions, "evaluation": EvaluationOptions}

_ADAPTER_ELSEWHERE = {
    "base_model_name_or_path": "model.name_or_path",
    "revision": "model.revision",
    **dict.fromkeys(("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode")),
    **dict.fromkeys(("first_memory_id", "base_architecture", "format_version")),
}
_STAGE_ELSEWHERE = {
    "output_dir": "output_dir",
    "seed": "seed",
    "resume_from_checkpoint": "resume",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    **{
        name: f"data.{name}"
        for name in (
            "prompt_template",
            "step_template",
            "answer_template",
            "step_separator",
            "allow_special_tokens",
            "chat_template_kwargs",
            "on_bad_rows",
            "max_length",
        )
    },
    "written_steps": "method",
}
SET_ELSEWHERE: dict[str, Mapping[str, str | None]] = {
    "adapter": _ADAPTER_ELSEWHERE,
    **dict.fromkeys(STAGES, _STAGE_ELSEWHERE),
}
"""By section, fields that are not keys of it, with the key that sets them (None: the package does)."""


@cache
def all_keys() -> list[str]:
    """List the full names of all keys, this package's own sections first."""
    sections = [(name, option_names(name)) for name in (*OWN_SECTIONS, "adapter", *STAGES)]
    return [join(name, option) for name, options in sections for option in options]


@cache
def option_names(section: str) -> list[str]:
    """List the keys of a section."""
    return [field.name for field in fields(section_class(section)) if field.name not in SET_ELSEWHERE.get(section, ())]


def section_class(name: str) -> type:
    """Return the dataclass whose fields are a section's keys."""
    if name in STAGES:
        method = next(method for method in METHODS.values() if name in method.stages)
        return method.trainer(name).config_class
    return RiMConfig if name == "adapter" else OWN_SECTIONS[name]


_SIZES = {
    "vocab_size": Range(1, 1 << 21),
    **dict.fromkeys(("hidden_size", "intermediate_size"), Range(1, 1 << 20)),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), Range(1, 1 << 12)),
    "head_dim": Range(1, 1 << 16),
    "max_position_embeddings": Range(1, 1 << 28),
    "sliding_window": Range(1, 1 << 28),
    "initializer_range": Range(0, 100),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), Range(0, 1)),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"), Range(0, 1, below=True)
    ),
}
"""Allowed sizes of a base, by their usual names. Whether they fit in memory is checked by rim-peft check."""


def check_classes(values: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Check adapter, stages, base and task by constructing them.

    Returns:
        The sections that could be read, with values converted to their fields' types.
    """
    read: dict[str, Any] = {}
    for name in ("adapter", *STAGES):
        inside = values.get(name)
        if isinstance(inside, dict):
            read[name] = _check_section(name, inside, problems)
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("config"), dict):
        _check_model_config(model["config"], problems)
    data = values.get("data")
    task = data.get("task", DataOptions.task) if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(task, str):
        options = data.get("options")
        if isinstance(options, dict):
            read["data"] = {**data, "options": _check_task(task, options, problems)}
        else:
            _check_task(task, {}, problems)
        if data.get("streaming") is True:
            _check_streaming(values, problems)
    return read


def _check_section(name: str, values: dict[str, Any], problems: Problems) -> dict[str, Any]:
    elsewhere = SET_ELSEWHERE[name]
    for key in [key for key in values if key in elsewhere]:
        pointer = elsewhere[key]
        message = f"is set as {pointer}." if pointer else "is set by the adapter itself, remove it."
        problems.add(join(name, key), message)
    values = {key: value for key, value in values.items() if key not in elsewhere}
    problems.check_keys(name, values, option_names(name))
    section = section_class(name)
    converted = problems.convert(name, hints_of(section), values)
    problems.build(name, section, {key: value for key, value in converted.items() if key not in HARDWARE})
    return converted


def _check_model_config(values: dict[str, Any], problems: Problems) -> None:
    """Check the fields of a base's configuration, since its class accepts any key silently."""
    from transformers import AutoConfig

    if not isinstance(values.get("model_type"), str):
        return  # reported by ModelOptions
    default = problems.build("model.config", AutoConfig.for_model, {"model_type": values["model_type"]})
    if default is None:
        return
    rest = {key: value for key, value in values.items() if key != "model_type"}
    known = {*default.to_dict(), *default.attribute_map}
    problems.check_keys("model.config", rest, sorted(known))
    made = problems.build("model.config", type(default), {key: value for key, value in rest.items() if key in known})
    if made is not None:
        _check_sizes(made, rest, problems)


def _check_sizes(config: Any, given: Mapping[str, Any], problems: Problems) -> None:
    """Check the sizes of a base, since its class silently accepts sizes that its layers cannot have."""
    own_names = {usual: own for usual, own in config.attribute_map.items() if own in given}

    def key(usual: str) -> str:
        return join("model.config", usual if usual in given else own_names.get(usual, usual))

    found = len(problems.lines)
    for usual, allowed in _SIZES.items():
        value = getattr(config, usual, None)
        if value is not None and isinstance(value, bool | int | float) and value not in allowed:
            problems.add(key(usual), f"must be {allowed}, got {shown(value)}.")
    for usual in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(config, usual, None)
        if usual in given and value not in ACT2FN:
            problems.add(key(usual), f"must be one of {', '.join(ACT2FN)}, got {shown(value)}.")
    sizes = [getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")]
    if len(problems.lines) > found or any(size is not None and type(size) is not int for size in sizes):
        return
    width, heads, pairs = sizes
    if width and heads and width % heads and "head_dim" not in given:
        problems.add(key("hidden_size"), f"must be a multiple of {key('num_attention_heads')}, {heads}, got {width}.")
    if heads and pairs and heads % pairs:
        problems.add(
            key("num_attention_heads"), f"must be a multiple of {key('num_key_value_heads')}, {pairs}, got {heads}."
        )


def _check_task(name: str, options: dict[str, Any], problems: Problems) -> dict[str, Any]:
    from rim_peft.tasks import get_task

    if problems.build("data", lambda task: get_task(task), {"task": name}) is None:
        return {}
    return check_task_options("data.options", name, options, problems)


def check_task_options(
    section: str, name: str, options: dict[str, Any], problems: Problems, *, others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Check a task's options, in any section.

    Args:
        section: full name of the section.
        name: name of the task.
        options: the section's values.
        others: options that apply unless the section overrides them.

    Returns:
        The options with values converted to their fields' types.
    """
    from rim_peft.tasks import get_task

    task = get_task(name)
    kind: Any = type(task)
    problems.check_keys(section, options, [field.name for field in fields(task)])  # type: ignore[arg-type]
    known = {field.name: options[field.name] for field in fields(task) if field.name in options}  # type: ignore[arg-type]
    converted = problems.convert(section, hints_of(kind), known)
    problems.build(section, lambda **own: get_task(name, **{**(others or {}), **own}), converted)
    return converted


def _check_streaming(values: Mapping[str, Any], problems: Problems) -> None:
    method = METHODS.get(str(values.get("method", "rim")))
    for name in () if method is None else method.stages:
        stage = values.get(name, {})
        if isinstance(stage, dict) and not stage.get("max_steps"):
            problems.add(join(name, "max_steps"), "must be given with data.streaming, since a stream has no length.")
