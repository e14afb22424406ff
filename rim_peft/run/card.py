"""The model card of a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

_CARD = """---
{front_matter}
---

# {name}

{description} Made with `rim-peft`.

## Use

```python
import rim_peft  # registers RIM with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}  # this folder, or its id on the Hub
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

prompt = {template}.format(question={question})
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
```

Or in a shell: `rim-peft generate {name} {shell_question}`.

## Results

{results}

## Training

Task `{task}`, {rows} rows, seed {seed}; {trainable:,} of {all:,} parameters trained in {seconds} s{resumed}.
`recipe.yaml` is the recipe as run and can be run again; `run.json` has metrics, versions, hardware and the fingerprint
of the data.
"""

_BLOCKS = (
    "An adapter that lets its base reason in {num_blocks} memory blocks of {block_size} tokens each: the blocks follow "
    "the\nprompt, and the answer follows them after one forward pass."
)

_DESCRIPTIONS = {
    "rim": _BLOCKS,
    "pause": f"{_BLOCKS} The answer after the last block alone trained them (pause tokens).",
    "answer": "A LoRA adapter that answers at once, without blocks, to compare with.",
    "coconut": "An adapter that reasons in continuous thoughts (Coconut), to compare with: ask it through this "
    "package, whose `rim-peft generate` takes its thoughts; plain `generate` knows nothing of them.",
    "cot": "A LoRA adapter that writes its reasoning out before the answer, without blocks, to compare with.",
}

_QUESTIONS = {
    "gsm8k": "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts does it take?",
    "potions": "Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?",
    "prosqa": "Every gerpus is a terpus. Bob is a gerpus. Is Bob a terpus or zhorpus?",
}


def render_card(folder: Path, record: Mapping[str, Any]) -> str:
    """Return the card of the adapter in a folder, from what ``run.json`` records about it."""
    name, data = folder.resolve().name, record["data"]
    question = _QUESTIONS.get(data["task"], "...")
    base = json.dumps(record["base"]) if record["base"] is not None else 'f"{folder}/base"'
    return _CARD.format(
        front_matter=_front_matter(name, record),
        name=name,
        description=_DESCRIPTIONS[record["method"]].format(**record["blocks"]),
        folder=json.dumps(name),
        base=base,
        template=json.dumps(data["prompt_template"], ensure_ascii=False),
        question=json.dumps(question),
        shell_question="'" + question.replace("'", "'\\''") + "'",
        results=_results(record),
        task=data["task"],
        rows=data["train"].get("num_rows", "streamed"),
        seed=record["seed"],
        **record["parameters"],
        seconds=record["wall_seconds"],
        resumed=" after it was last resumed" if record["resumed"] else "",
    )


def _front_matter(name: str, record: Mapping[str, Any]) -> str:
    validation = record["metrics"]["validation"]
    results = None
    if validation is not None:
        result = EvalResult(
            task_type="text-generation",
            dataset_type=_hub_id(record["data"]["path"]) or record["data"]["task"],
            dataset_name=record["data"]["task"],
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=f"accuracy (answer rule {validation['answer_rule']})",
            metric_value=validation["accuracy"],
            metric_args={"standard_error": validation["standard_error"], "num_rows": validation["num_rows"]},
        )
        results = [result]
    card = ModelCardData(
        base_model=_hub_id(record["base"]),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["peft", "rim", "latent-reasoning"],
        model_name=name,
        eval_results=results,
    )
    return card.to_yaml()


def _hub_id(source: str | None) -> str | None:
    """Return the source unless it is a folder or file, which the Hub could not link to."""
    return None if source is None or Path(source).exists() else source


def _results(record: Mapping[str, Any]) -> str:
    validation = record["metrics"]["validation"]
    if validation is None:
        return "The run had no validation rows, so the last weights were kept and nothing was measured."
    return (
        f"| rows | answer rule | accuracy | standard error |\n|---|---|---|---|\n"
        f"| {validation['num_rows']} for validation | {validation['answer_rule']} | {validation['accuracy']:.3f} "
        f"| {validation['standard_error']:.3f} |\n\n"
        "The same rows chose the best weights, so expect a little less on a test split: "
        f"`rim-peft evaluate FOLDER --task {record['data']['task']} --split test`."
    )
