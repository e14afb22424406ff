"""What the Hub refuses in a model card, as far as its documentation says."""

from __future__ import annotations

import re
from typing import Any

import yaml

COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
SPACE_FIELDS = {
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file"),
    *("models", "datasets", "tags", "pinned", "license", "short_description"),
}
LICENCES = {"apache-2.0", "mit", "llama3.2", "gemma", "cc-by-4.0", "other", "unknown"}


def card_problems(text: str) -> list[str]:
    """What the Hub would refuse in a card's front matter."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    problems = [f'"{name}" must be a string' for name in ("library_name", "pipeline_tag") if not _is_text(data, name)]
    if "license" in data and data["license"] not in LICENCES:
        problems.append(f'"license" must be one of {sorted(LICENCES)}')
    if "tags" in data and not (isinstance(data["tags"], list) and all(isinstance(tag, str) for tag in data["tags"])):
        problems.append('"tags" must be a list of strings')
    if "base_model" in data and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data["base_model"])):
        problems.append('"base_model" must be a model id')
    for model in data.get("model-index", []):
        for result in model.get("results", [{}]):
            if not isinstance(model.get("name"), str) or "type" not in result.get("task", {}):
                problems.append('"model-index" needs a name, and a type for each task')
            if not {"type", "name"} <= set(result.get("dataset", {})):
                problems.append('"model-index" needs type and name of each dataset')
            if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [{}])):
                problems.append('"model-index" needs type and value of each metric')
    return problems


def space_problems(text: str) -> list[str]:
    """What the Hub would refuse in a Space's front matter; its rules: ``spaces-config-reference`` of the Hub's docs."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["a Space needs metadata"]
    problems = [f'"{name}" is not allowed' for name in data.keys() - SPACE_FIELDS]
    problems += [
        f'"{name}" must be a string' for name in ("title", "sdk_version", "python_version") if not _is_text(data, name)
    ]
    problems += [f'"{name}" must be a colour' for name in ("colorFrom", "colorTo") if data.get(name) not in COLOURS]
    if data.get("sdk") not in ("gradio", "docker", "static"):
        problems.append('"sdk" must be gradio, docker or static')
    if not all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)) for model in data.get("models", [])):
        problems.append('"models" must be model ids')
    return problems


def _is_text(data: dict[str, Any], name: str) -> bool:
    return isinstance(data.get(name, ""), str)
