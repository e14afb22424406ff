"""Answers and readouts from one pass over the trunk."""

from rim_peft.inference.decoding import BlockDecoder, Decoded
from rim_peft.inference.readout import Readout, answer_questions, read_blocks

__all__ = ["BlockDecoder", "Decoded", "Readout", "answer_questions", "read_blocks"]
