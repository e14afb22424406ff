"""Whole runs: train a recipe, load the result, evaluate it, export it."""

from rim_peft.run.loading import Run, load_run
from rim_peft.run.scoring import evaluate, evaluate_text
from rim_peft.run.sharing import export, push
from rim_peft.run.training import train, train_or_load

__all__ = ["Run", "evaluate", "evaluate_text", "export", "load_run", "push", "train", "train_or_load"]
