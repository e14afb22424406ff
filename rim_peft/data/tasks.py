"""Deprecated name of :mod:`rim_peft.tasks`; importing it warns."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

warnings.warn("rim_peft.data.tasks is rim_peft.tasks now.", FutureWarning, stacklevel=2)
for _name in ("", ".task", ".answers"):
    sys.modules[__name__ + _name] = import_module(f"rim_peft.tasks{_name}")
