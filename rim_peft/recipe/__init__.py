"""Recipes: a run as data, read from YAML and ``key=value`` arguments, and checked as a whole."""

from rim_peft.recipe.problems import RecipeError
from rim_peft.recipe.reading import load_recipe
from rim_peft.recipe.sections import DataOptions, EvaluationOptions, ModelOptions, Recipe

__all__ = ["DataOptions", "EvaluationOptions", "ModelOptions", "Recipe", "RecipeError", "load_recipe"]
