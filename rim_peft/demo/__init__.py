"""The embedded example: a tiny base that comes along, its task, and what RiM makes of it."""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
"""The frozen base, made by ``python -m rim_peft.demo.base``."""
RECIPE = FOLDER / "recipe.yaml"
"""How the demo trains."""

__all__ = ["BASE", "RECIPE"]
