"""Answers and readouts from one pass over the trunk."""

from rim_peft.inference.coconut import answer_with_thoughts, decode_with_thoughts
from rim_peft.inference.decoding import BlockDecoder, Decoded
from rim_peft.inference.readout import Readout, answer_questions, read_blocks

__all__ = [
    "BlockDecoder",
    "Decoded",
    "Readout",
    "answer_questions",
    "answer_with_thoughts",
    "decode_with_thoughts",
    "read_blocks",
]
