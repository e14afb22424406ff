"""Methods: RiM and its baselines. To add one, add a module here and an entry to ``METHODS``."""

from __future__ import annotations

from rim_peft.methods.baselines import Answer, Parallel, Pause, WrittenSteps
from rim_peft.methods.coconut import Coconut
from rim_peft.methods.method import Method
from rim_peft.methods.rim import RiM
from rim_peft.values import shown

__all__ = ["METHODS", "STAGES", "Method", "get_method"]

METHODS: dict[str, Method] = {
    method.name: method for method in (RiM(), Answer(), WrittenSteps(), Pause(), Parallel(), Coconut())
}
"""All methods by their names in recipes."""

STAGES = tuple(dict.fromkeys(stage for method in METHODS.values() for stage in method.stages))
"""Sections of a recipe with the options of a stage."""


def get_method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        ValueError: there is no method of this name.
    """
    if name not in METHODS:
        *others, last = map(repr, METHODS)
        raise ValueError(f"method: must be {', '.join(others)} or {last}, got {shown(name)}.")
    return METHODS[name]
