"""What the Hub refuses in a model card, as far as its documentation says."""

from __future__ import annotations

import re
from typing import Any

import yaml

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


def _is_text(data: dict[str, Any], name: str) -> bool:
    return isinstance(data.get(name, ""), str)
