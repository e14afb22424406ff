"""Reasoning in Memory (RiM) as a PEFT tuner. Importing the package registers the PEFT type ``RIM``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"]:  # `python -m rim_peft ...` imports this before the module that it runs
    from rim_peft_command import quiet_bitsandbytes

    quiet_bitsandbytes()

from rim_peft.old_names import install
from rim_peft.tuner import RiMConfig, RiMModel
from rim_peft.version import __version__

if TYPE_CHECKING:
    from rim_peft.training import GroundingConfig, GroundingTrainer, RefinementConfig, RefinementTrainer

_TRAINING = ("GroundingConfig", "GroundingTrainer", "RefinementConfig", "RefinementTrainer")
"""Names imported on first use, since their module imports TRL."""

__all__ = [
    "GroundingConfig",
    "GroundingTrainer",
    "RefinementConfig",
    "RefinementTrainer",
    "RiMConfig",
    "RiMModel",
    "__version__",
]


install()


def __getattr__(name: str) -> Any:
    if name in _TRAINING:
        return getattr(import_module("rim_peft.training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
