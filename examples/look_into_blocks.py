"""Show what each block of an adapter holds: its readout and probability, and how like the block before it is.

python examples/look_into_blocks.py ADAPTER_FOLDER QUESTION [QUESTION ...]
"""

import math
import sys

import torch

from rim_peft.inference import read_blocks
from rim_peft.run import load_run


def main(adapter: str, questions: list[str]) -> list[str]:
    """Print and return one line per block of each question."""
    run = load_run(adapter)
    lines = []
    rows = read_blocks(run.model, run.tokenizer, questions, templates=run.templates, max_new_tokens=16)
    for question, readouts in zip(questions, rows, strict=True):
        lines.append(question)
        for before, readout in zip([None, *readouts], readouts, strict=False):
            probability = math.exp(sum(readout.token_log_probs))
            line = f"  block {readout.block}: {readout.text!r} with probability {probability:.3f}"
            if before is not None:
                alike = torch.cosine_similarity(before.hidden_state, readout.hidden_state, dim=0)
                line += f", state like the block's before by {alike:.2f}"
            lines.append(line)
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
