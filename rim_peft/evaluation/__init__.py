"""How well an adapter does."""

from rim_peft.evaluation.accuracy import AccuracyReport, evaluate_accuracy

__all__ = ["AccuracyReport", "evaluate_accuracy"]
