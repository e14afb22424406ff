"""The README of an export."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from rim_peft.escaping import code_span, json_text, markdown, visible
from rim_peft.export.checking import CheckResult
from rim_peft.export.options import Prompts
from rim_peft.export.record import ExportRecord
from rim_peft.export.tokens import MemoryTokens
from rim_peft.tuner.card import hub_id

_BODY = """---
{metadata}
---

# {name}

{summary} It was exported by
rim-peft from the adapter {source}{on_base}, and needs plain transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
{snippet}
answer = model.generate(**inputs, max_new_tokens={max_new_tokens})[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

* **Prompts** are written as in training: {prompt}.
{blocks}* **Weights** are {dtype}{dequantized}.
* **Checked** in a fresh process with plain transformers, in float32: {checked}.
"""

_SUMMARY = """\
A language model that reasons in memory blocks (Reasoning in Memory, [arXiv 2605.30343](https://arxiv.org/abs/2605.30343)):
{num_blocks} blocks of {block_length} special tokens follow the prompt, and the answer follows them."""

_BLOCKS = """\
* **Blocks** {places} Texts that are no prompts, such as answers, take
  `add_special_tokens=False`. So does a chat that was rendered as text before: its blocks are in it. In an engine whose
  tokenizer does not do this, write them behind the prompt: {block_text}
* **Memory tokens** are {names} (ids {ids}). {guard}
"""


def render_card(folder: Path, record: ExportRecord, prompts: Prompts, result: CheckResult) -> str:
    """Return the README of a merged export, with the metadata that the Hub reads."""
    memory = record.memory
    template = prompts.templates.prompt
    is_text = isinstance(prompts.questions[0], str)
    behind = "" if record.places["prompt" if is_text else "chat"] else memory.block_text
    if is_text:
        snippet = f"prompt = {template!r}.format(question={str(prompts.questions[0])!r})"
        snippet += f" + {behind!r}" if behind else ""
        snippet += '\ninputs = tokenizer(prompt, return_tensors="pt")'
    else:
        chat = json_text(list(prompts.questions[0]))
        snippet = f"chat = {chat}\n"
        if behind:
            snippet += (
                "text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)\n"
                f'inputs = tokenizer(text + {behind!r}, add_special_tokens=False, return_tensors="pt")'
            )
        else:
            options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
            snippet += f"inputs = tokenizer.apply_chat_template(chat, {options})"
    base = hub_id(record.base)
    metadata = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rim", "latent-reasoning"] if memory.num_blocks else None,
        model_name=folder.name,
    )
    return _BODY.format(
        metadata=visible(metadata.to_yaml()),
        name=markdown(folder.name),
        folder=json_text(folder.name),
        summary=(
            _SUMMARY.format(num_blocks=memory.num_blocks, block_length=memory.block_size + 2)
            if memory.num_blocks
            else "A language model without memory blocks, with LoRA weights merged."
        ),
        source=code_span(Path(record.source).name),
        on_base=f" on {code_span(base)}" if base else "",
        snippet=snippet,
        max_new_tokens=prompts.max_new_tokens,
        prompt=code_span(repr(template)) if is_text else "chats, by the chat template",
        blocks=_blocks(record) if memory.num_blocks else "",
        dtype=markdown(record.dtype),
        dequantized=(
            f", dequantised from {markdown(record.dequantized_from)}, on which the adapter was trained, then merged"
            if record.dequantized_from
            else ""
        ),
        checked=describe(result),
    )


_ADAPTER_BODY = """---
{metadata}
---

# {name}

Plain LoRA for a model that reasons in memory blocks (Reasoning in Memory,
[arXiv 2605.30343](https://arxiv.org/abs/2605.30343)), exported by rim-peft. It fits the extended base that was exported
with it and no other: the base's vocabulary holds its memory tokens, {names} (ids {ids}).

* **Prompts** are written as in training: {prompt}.
* **Blocks** follow each prompt. This folder's tokenizer appends them; behind the base's own, write: {block_text}
* **Checked** in a fresh process with plain transformers and PEFT, in float32: {checked}.
"""


def render_adapter_card(name: str, memory: MemoryTokens, prompts: Prompts, result: CheckResult) -> str:
    """Return the README of a plain LoRA adapter."""
    is_text = isinstance(prompts.questions[0], str)
    metadata = ModelCardData(
        library_name="peft", pipeline_tag="text-generation", tags=["lora", "rim", "latent-reasoning"], model_name=name
    )
    return _ADAPTER_BODY.format(
        metadata=visible(metadata.to_yaml()),
        name=markdown(name),
        names=", ".join(code_span(token) for token in memory.names),
        ids=", ".join(map(str, memory.ids)),
        prompt=code_span(repr(prompts.templates.prompt)) if is_text else "chats, by the chat template",
        block_text=code_span(memory.block_text),
        checked=describe(result),
    )


def describe(result: CheckResult) -> str:
    """Return a check's result as a sentence."""
    ties = f", {result.num_near_ties} part from it at a near tie" if result.num_near_ties else ""
    other = result.num_prompts - result.num_equal - result.num_near_ties
    differ = f", {other} differ" if other else ""
    return (
        f"{result.num_equal} of {result.num_prompts} prompts give the adapter's greedy tokens{ties}{differ}; "
        f"{result.num_equal_unguarded} with nothing suppressed"
    )


def _blocks(record: ExportRecord) -> str:
    """Return what a user must know of blocks and memory tokens."""
    memory = record.memory
    return _BLOCKS.format(
        places=_places(record),
        block_text=code_span(memory.block_text),
        names=", ".join(code_span(name) for name in memory.names),
        ids=", ".join(map(str, memory.ids)),
        guard=(
            "The head is tied to the embedding, so that only `suppress_tokens` of the generation settings keeps the "
            "model from writing them: use engines that honour it."
            if record.head_is_tied
            else "The head scores each as the mean of all tokens, so that greedy decoding never writes one; the "
            "generation settings suppress them besides."
        ),
    )


def _places(record: ExportRecord) -> str:
    kinds = [name for name, key in (("texts", "prompt"), ("chats", "chat")) if record.places[key]]
    if not kinds:
        return "are not appended by the tokenizer: write them behind each prompt."
    return f"come from the tokenizer, for {' and '.join(kinds)}."
