"""The embedded example: a tiny base that comes along, its task, and what RiM makes of it."""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
"""The frozen base, made by ``python -m rim_peft.demo.base``."""
RECIPE = FOLDER / "recipe.yaml"
"""How the demo trains."""
SHIPPED = FOLDER / "smollm2"
"""An adapter for a pretrained base, made by ``python -m rim_peft.demo.shipped``."""

__all__ = ["BASE", "RECIPE", "SHIPPED"]
