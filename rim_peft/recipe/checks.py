"""Checks of what configures other classes than this package's sections: adapter, stages, base and task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from rim_peft.recipe.keys import SET_ELSEWHERE, STAGES, option_names, section_class
from rim_peft.recipe.problems import Problems, join
from rim_peft.recipe.sections import HARDWARE, METHODS


def check_classes(values: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Check adapter, stages, base and task by constructing them.

    Returns:
        The sections with each value in its field's type, as far as they could be read.
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
    if isinstance(data, dict) and isinstance(data.get("task"), str):
        options = data.get("options")
        if isinstance(options, dict):
            read["data"] = {**data, "options": _check_task(data["task"], options, problems)}
        else:
            _check_task(data["task"], {}, problems)
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
    converted = problems.convert(name, get_type_hints(section), values)
    problems.build(name, section, {key: value for key, value in converted.items() if key not in HARDWARE})
    return converted


def _check_model_config(values: dict[str, Any], problems: Problems) -> None:
    """Check the fields of a base's configuration, whose classes take any key without a word."""
    from transformers import AutoConfig

    if not isinstance(values.get("model_type"), str):
        return  # which ModelOptions says
    default = problems.build("model.config", AutoConfig.for_model, {"model_type": values["model_type"]})
    if default is None:
        return
    rest = {key: value for key, value in values.items() if key != "model_type"}
    known = {*default.to_dict(), *default.attribute_map}
    problems.check_keys("model.config", rest, sorted(known))
    problems.build("model.config", type(default), {key: value for key, value in rest.items() if key in known})


def _check_task(name: str, options: dict[str, Any], problems: Problems) -> dict[str, Any]:
    from rim_peft.data.tasks import get_task

    if problems.build("data", lambda task: get_task(task), {"task": name}) is None:
        return {}
    return check_task_options("data.options", name, options, problems)


def check_task_options(
    section: str, name: str, options: dict[str, Any], problems: Problems, *, others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Check options of a task, in whatever section they stand.

    Args:
        section: its full name.
        name: of the task.
        options: what the section holds.
        problems: where problems are noted.
        others: options that hold unless the section has its own.

    Returns:
        The options with each value in its field's type.
    """
    from rim_peft.data.tasks import get_task

    task = get_task(name)
    problems.check_keys(section, options, [field.name for field in fields(task)])  # type: ignore[arg-type]
    known = {field.name: options[field.name] for field in fields(task) if field.name in options}  # type: ignore[arg-type]
    converted = problems.convert(section, get_type_hints(type(task)), known)
    problems.build(section, lambda **own: get_task(name, **{**(others or {}), **own}), converted)
    return converted


def _check_streaming(values: Mapping[str, Any], problems: Problems) -> None:
    for name in METHODS.get(str(values.get("method", "rim")), ()):
        stage = values.get(name, {})
        if isinstance(stage, dict) and not stage.get("max_steps"):
            problems.add(join(name, "max_steps"), "must be given with data.streaming, since a stream has no length.")
