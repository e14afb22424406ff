"""Answers and readouts from one pass over the trunk."""

from rim_peft.inference.readout import Readout, answer_questions, read_blocks

__all__ = ["Readout", "answer_questions", "read_blocks"]
