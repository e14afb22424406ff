"""Answers and readouts from a single pass over the trunk."""

from rim_peft.inference.answerer import Answerer
from rim_peft.inference.block_answerer import BlockAnswerer, answer_questions, read_blocks
from rim_peft.inference.coconut import ThoughtAnswerer, answer_with_thoughts, decode_with_thoughts
from rim_peft.inference.conversation import Conversation
from rim_peft.inference.decoding import BlockDecoder, Decoded
from rim_peft.inference.readout import Readout

__all__ = [
    "Answerer",
    "BlockAnswerer",
    "BlockDecoder",
    "Conversation",
    "Decoded",
    "Readout",
    "ThoughtAnswerer",
    "answer_questions",
    "answer_with_thoughts",
    "decode_with_thoughts",
    "read_blocks",
]
