"""Train both stages from Python with plain rows: attach, ground, refine, save, load, ask.

    python examples/train_both_stages.py OUTPUT_FOLDER

The base is the demo's, so nothing is downloaded; any causal language model works.
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_peft import GroundingConfig, GroundingTrainer, RefinementConfig, RefinementTrainer, RiMConfig
from rim_peft.demo import BASE

PROMPT = "{question} Answer:"


def main(folder: Path, *, max_steps: int = 60) -> str:
    """Train on three hundred stories, and answer one with the reloaded adapter."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), RiMConfig(num_blocks=4, r=32))
    model.print_trainable_parameters()
    rows = Dataset.from_list(
        [
            {
                "question": f"{a} stirs {b}'s brew. {b}'s brew is {before}. What colour is {a}'s brew?",
                "steps": [before],
                "answer": after,
            }
            for a in ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
            for b in ("Ida", "Jon", "Kim", "Liv", "Moe", "Nell", "Pam", "Tom")
            for before, after in (
                ("red", "gold"),
                ("gold", "green"),
                ("green", "blue"),
                ("blue", "plum"),
                ("plum", "red"),
            )
        ]
    )
    common: dict[str, Any] = {
        "prompt_template": PROMPT,
        "max_steps": max_steps,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    GroundingTrainer(
        model,
        GroundingConfig(str(folder / "grounding"), learning_rate=3e-3, **common),
        train_dataset=rows,
        processing_class=tokenizer,
    ).train()
    RefinementTrainer(
        model,
        RefinementConfig(str(folder / "refinement"), learning_rate=3e-4, **common),
        train_dataset=rows,
        processing_class=tokenizer,
    ).train()
    model.save_pretrained(str(folder / "adapter"))

    loaded = AutoPeftModelForCausalLM.from_pretrained(str(folder / "adapter"))
    inputs = tokenizer(PROMPT.format(question=rows[0]["question"]), return_tensors="pt")
    output = loaded.generate(**inputs, max_new_tokens=2, do_sample=False)
    answer = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(rows[0]["question"], "->", answer)
    return answer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
