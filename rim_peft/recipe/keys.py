"""Which keys the sections have, from the fields of the dataclasses behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache

from rim_peft.methods import METHODS, STAGES
from rim_peft.recipe.problems import join
from rim_peft.recipe.sections import DataOptions, EvaluationOptions, ModelOptions
from rim_peft.tuner import RiMConfig

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
"""By section, fields that are set under another key (None: by the package), and so are no keys of the section."""


@cache
def all_keys() -> list[str]:
    """List the full names of all keys, those of this package's own options first."""
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
