"""Methods: RiM, and what it is compared with. One more is a file here, and a line in ``METHODS``."""

from __future__ import annotations

from rim_peft.methods.baselines import Answer, Pause, WrittenSteps
from rim_peft.methods.coconut import Coconut
from rim_peft.methods.method import Method
from rim_peft.methods.rim import RiM
from rim_peft.values import shown

__all__ = ["METHODS", "STAGES", "Method", "get_method"]

METHODS: dict[str, Method] = {method.name: method for method in (RiM(), Answer(), WrittenSteps(), Pause(), Coconut())}
"""Every method by what a recipe calls it."""

STAGES = tuple(dict.fromkeys(stage for method in METHODS.values() for stage in method.stages))
"""Sections of a recipe with the options of a stage."""


def get_method(name: str) -> Method:
    """Return a method.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METHODS:
        *others, last = map(repr, METHODS)
        raise ValueError(f"method: must be {', '.join(others)} or {last}, got {shown(name)}.")
    return METHODS[name]
