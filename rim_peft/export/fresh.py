"""Answer an export's prompts greedily in a process with only plain transformers (and PEFT for LoRA adapters).

The package passes this file's text to ``python -c``; nothing imports it. A job is read as JSON from stdin, its answers
are written as JSON to stdout, everything else is printed to stderr.
"""

import contextlib
import json
import sys
from typing import Any


def main() -> None:
    """Read a job, answer its prompts one by one, and write the result."""
    with contextlib.redirect_stdout(sys.stderr):
        result = answer(json.load(sys.stdin))
    json.dump(result, sys.stdout)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Return each prompt's ids, and its answers with the export's own settings and by plain greedy search.

    Computes in float32 whatever the type of the weights, as the package does for the expected answers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"], trust_remote_code=False)
    options = {"revision": job["revision"], "dtype": torch.float32, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], **options)
    if job["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    base = model if job["adapter"] is None else model.get_base_model()
    plain = GenerationConfig()
    own = base.generation_config if job["settings"] is None else GenerationConfig(**job["settings"])
    lengths = {"eos_token_id": job["eos_id"], "pad_token_id": job["pad_id"], "max_new_tokens": job["max_new_tokens"]}

    def follow(ids: list[int], expected: list[int], settings: GenerationConfig) -> dict[str, Any]:
        base.generation_config = settings
        prompt = torch.tensor([ids], device=base.device)
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            output_logits=True,
            return_dict_in_generate=True,
            **lengths,
        )
        tokens = found.sequences[0, len(ids) :].tolist()
        gap = None  # score gap, relative to the largest score, between the two tokens where it first differs
        for place, (got, wanted) in enumerate(zip(tokens, expected, strict=False)):
            if got != wanted:
                scores = found.logits[place][0]
                gap = float((scores[got] - scores[wanted]).abs() / scores.abs().max())
                break
        margins = [
            float((scores.max() - scores[job["memory_ids"]].max()) / scores.abs().max())
            for (scores,) in found.logits
            if job["memory_ids"]
        ]
        return {"tokens": tokens, "gap": gap, "margin": min(margins, default=None)}

    answers = []
    for prompt, suffix, expected in job["prompts"]:
        ids = read(tokenizer, prompt)
        ids = [*ids, *(tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else [])]
        guarded, unguarded = (follow(ids, expected, settings) for settings in (own, plain))
        answers.append({"ids": ids, "guarded": guarded, "unguarded": unguarded})
    return {"answers": answers, "modules": sorted({name.split(".")[0] for name in sys.modules})}


def read(tokenizer: Any, prompt: Any) -> list[int]:
    """Return the ids that the export's tokenizer makes of a text or a chat, as clients ask it to."""
    ids: list[int]
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, dict):  # a chat with tools or variables of its template
        options = {**prompt["options"], "add_generation_prompt": True, "return_dict": True}
        ids = tokenizer.apply_chat_template(prompt["messages"], **options)["input_ids"]
    elif isinstance(prompt[0], int):  # ids with blocks: its text spells special tokens that are meant as text
        ids = prompt
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


if __name__ == "__main__":
    main()
