"""Model cards of exports, and Ollama's Modelfile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from rim_peft.data.chats import as_chat
from rim_peft.escaping import code_span, json_text, markdown, visible
from rim_peft.export.checking import CheckResult
from rim_peft.export.folder import Prompts
from rim_peft.export.record import EXPORT_FILE, ExportRecord
from rim_peft.export.tokens import MemoryTokens
from rim_peft.tuner.card import hub_id

_BODY = """---
{metadata}
---

# {name}

{summary} It was exported by
rim-peft from the adapter {source}{on_base} and needs only plain transformers:

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
* **Blocks** {places} Tokenise texts other than prompts, such as answers, with
  `add_special_tokens=False`; also chats that were already rendered as text, since their blocks are in it. In an engine
  whose tokenizer does not append blocks, write them after the prompt: {block_text}
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
        first = as_chat(prompts.questions[0])
        beside = {**({"tools": first.tools} if first.tools else {}), **first.chat_template_kwargs}
        given = "".join(f"{name}={value!r}, " for name, value in beside.items())
        chat = json_text(list(first))
        snippet = f"chat = {chat}\n"
        if behind:
            snippet += (
                f"text = tokenizer.apply_chat_template(chat, {given}add_generation_prompt=True, tokenize=False)\n"
                f'inputs = tokenizer(text + {behind!r}, add_special_tokens=False, return_tensors="pt")'
            )
        else:
            options = f'{given}add_generation_prompt=True, return_dict=True, return_tensors="pt"'
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
        prompt=code_span(repr(template)) if is_text else _chats(prompts),
        blocks=_blocks(record) if memory.num_blocks else "",
        dtype=markdown(record.dtype),
        dequantized=(
            f", dequantised from {markdown(record.dequantized_from)}, on which the adapter was trained, then merged"
            if record.dequantized_from
            else ""
        ),
        checked=describe(result),
    )


_MODELFILE = '''\
# ollama create NAME -f Modelfile
FROM .
TEMPLATE """{template}"""
PARAMETER temperature 0
PARAMETER num_predict {max_new_tokens}
PARAMETER stop "{eos}"
'''


def render_modelfile(memory: MemoryTokens, prompts: Prompts, eos: str) -> str | None:
    """Return a Modelfile with which Ollama asks as in training; None for chats, whose templates have another form."""
    place = "{{ .Prompt }}"
    template = prompts.templates.prompt.format(question=place) + memory.block_text
    around = template.replace(place, "", 1)
    if not isinstance(prompts.questions[0], str) or any(mark in around + eos for mark in ("{{", '"')):
        return None
    return _MODELFILE.format(template=template, max_new_tokens=prompts.max_new_tokens, eos=eos)


_ADAPTER_BODY = """---
{metadata}
---

# {name}

Plain LoRA for a model that reasons in memory blocks (Reasoning in Memory,
[arXiv 2605.30343](https://arxiv.org/abs/2605.30343)), exported by rim-peft. {fits}, {names} (ids {ids}).

* **Prompts** are written as in training: {prompt}.
* **Blocks** follow each prompt. {appended}
  {otherwise}
* **Checked** in a fresh process with plain transformers and PEFT, in float32: {checked}.
"""

_EXTENDED = """\
It fits the extended base that was exported
with it and no other: the base's vocabulary holds its memory tokens"""

_UNMODIFIED = """\
It fits {base} as it is.
Its memory rows are LoRA on the input embedding, at three token ids that no text uses"""


def render_adapter_card(
    name: str,
    memory: MemoryTokens,
    prompts: Prompts,
    result: CheckResult,
    *,
    places: Mapping[str, bool],
    base: str | None = None,
    knows_names: bool = True,
) -> str:
    """Return the README of a plain LoRA adapter.

    Args:
        places: what the adapter's tokenizer appends blocks to.
        base: the unmodified base that it fits; None if it fits the extended base beside it.
        knows_names: whether the base's own tokenizer reads the memory tokens' names.
    """
    is_text = isinstance(prompts.questions[0], str)
    linked = hub_id(base)
    metadata = ModelCardData(
        base_model=linked,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "rim", "latent-reasoning"],
        model_name=name,
    )
    shown_base = code_span(linked) if linked else "its base"
    written = f"write after each prompt: {code_span(memory.block_text)}"
    as_ids = f"append the ids `block_ids` of `{EXPORT_FILE}` to the prompt's, since it does not know these tokens."
    return _ADAPTER_BODY.format(
        metadata=visible(metadata.to_yaml()),
        name=markdown(name),
        names=", ".join(code_span(token) for token in memory.names),
        ids=", ".join(map(str, memory.ids)),
        prompt=code_span(repr(prompts.templates.prompt)) if is_text else _chats(prompts),
        fits=_EXTENDED if base is None else _UNMODIFIED.format(base=shown_base),
        appended=(
            f"This folder's tokenizer appends them to {' and '.join(kinds)}; elsewhere, and with the base's tokenizer,"
            if (kinds := _kinds(places))
            else "No tokenizer appends them:"
        ),
        otherwise=written if knows_names else as_ids,
        checked=describe(result),
    )


def _chats(prompts: Prompts) -> str:
    """Say how chats are written."""
    variables = prompts.templates.chat_template_kwargs
    given = ", ".join(f"{name}={value!r}" for name, value in variables.items())
    return "chats, by the chat template" + (
        f", with {code_span(given)} unless a call gives other values" if given else ""
    )


def describe(result: CheckResult) -> str:
    """Return a check's result as a sentence."""
    ties = f", {result.num_near_ties} first differ at a near tie" if result.num_near_ties else ""
    other = result.num_prompts - result.num_equal - result.num_near_ties
    differ = f", {other} differ elsewhere" if other else ""
    return (
        f"{result.num_equal} of {result.num_prompts} prompts give the adapter's greedy tokens{ties}{differ}; "
        f"{result.num_equal_unguarded} with nothing suppressed"
    )


def _blocks(record: ExportRecord) -> str:
    """Return what a user must know about blocks and memory tokens."""
    memory = record.memory
    return _BLOCKS.format(
        places=_places(record),
        block_text=code_span(memory.block_text),
        names=", ".join(code_span(name) for name in memory.names),
        ids=", ".join(map(str, memory.ids)),
        guard=(
            "The head is tied to the embedding, so only `suppress_tokens` in the generation settings keeps the model "
            "from writing them: use engines that honour it."
            if record.head_is_tied
            else "The head scores each as the mean of all tokens, so greedy decoding never writes one; the generation "
            "settings also suppress them."
        ),
    )


def _places(record: ExportRecord) -> str:
    if not (kinds := _kinds(record.places)):
        return "are not appended by the tokenizer: write them after each prompt."
    return f"come from the tokenizer, for {' and '.join(kinds)}."


def _kinds(places: Mapping[str, bool]) -> list[str]:
    return [name for name, key in (("texts", "prompt"), ("chats", "chat")) if places[key]]
