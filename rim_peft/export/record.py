"""The record and the model card of an export."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from rim_peft.data.chats import as_chat
from rim_peft.escaping import code_span, json_text, markdown, visible
from rim_peft.export.checking import CheckResult
from rim_peft.export.tokens import MemoryTokens
from rim_peft.export.weights import Prompts
from rim_peft.training.files import write_text
from rim_peft.tuner.card import hub_id
from rim_peft.tuner.files import check_digests, read_object
from rim_peft.values import shown
from rim_peft.version import __version__

EXPORT_FILE = "rim_export.json"
FORMAT_VERSION = 1
_AGAIN = "Copy the export again, or export the adapter again."

_CHECKSUM = "sha256"
"""Key of the checksum over all other keys; records of older versions have none."""


@dataclass(frozen=True)
class ExportRecord:
    """The content of a merged export's ``rim_export.json``.

    Attributes:
        memory: the memory tokens.
        places: what the tokenizer appends blocks to.
        source: name of the adapter.
        base: the base, as the adapter names it.
        dequantized_from: how the base was quantised in training; None if it was not.
        dtype: type of the weights.
        head_is_tied: whether memory rows are scored, so that only generation settings suppress them.
    """

    memory: MemoryTokens
    places: dict[str, bool]
    source: str
    base: str | None
    dequantized_from: str | None
    dtype: str
    head_is_tied: bool

    def write(self, folder: Path, **more: Any) -> None:
        """Write the file, with additional keys such as the result of the check."""
        memory = {"memory": self.memory.to_dict(), "block_text": self.memory.block_text}
        write_json(folder / EXPORT_FILE, {**new_record("merged"), **vars(self), **memory, **more})


def new_record(form: str) -> dict[str, Any]:
    """Return the keys that every record starts with."""
    return {"format": form, "format_version": FORMAT_VERSION, "rim_peft": __version__}


def read_record(folder: Path) -> ExportRecord:
    """Read a merged export's ``rim_export.json``.

    Raises:
        ValueError: the folder is an export of another format, or from a later version of this package.
    """
    path = folder / EXPORT_FILE
    record = read_export(path)
    if record["format"] != "merged":
        raise ValueError(
            f"{path}: format: must be 'merged' for an export that this package can load, got "
            f"{shown(record.get('format'))}. Load the adapter that it was made from."
        )
    if "check" not in record:  # which earlier versions added last
        raise ValueError(f"{path}: must be of a finished export, and is not. Export the adapter again.")
    check_digests(path, record.get("files"))
    names = [name for name in ExportRecord.__dataclass_fields__ if name != "memory"]
    try:
        return ExportRecord(memory=MemoryTokens(**record["memory"]), **{name: record[name] for name in names})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: must be the record of an export, but keys are missing or unexpected ({error}). {_AGAIN}"
        ) from error


def read_export(path: Path) -> dict[str, Any]:
    """Read a record of either format.

    Raises:
        ValueError: it is damaged, or a later version of this package wrote it.
    """
    record = read_object(path, keys=("format", "format_version"), remedy=_AGAIN)
    version = record["format_version"]
    if not isinstance(version, int):
        raise ValueError(f"{path}: format_version: must be an integer, got {shown(version)}. {_AGAIN}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: must have format version {FORMAT_VERSION} or lower, got {version}: a later "
            "rim-peft wrote it. Update rim-peft."
        )
    if record.get(_CHECKSUM, _checksum(record)) != _checksum(record):
        raise ValueError(f"{path}: must be unchanged, but its checksum does not match. {_AGAIN}")
    return record


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its checksum, atomically."""
    write_text(path, json_text({**record, _CHECKSUM: _checksum(record)}, indent=2) + "\n")


def _checksum(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a record's content."""
    said = {name: value for name, value in record.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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
* **Blocks** follow each prompt. This folder's tokenizer appends them; with the base's own tokenizer,
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
    base: str | None = None,
    knows_names: bool = True,
) -> str:
    """Return the README of a plain LoRA adapter.

    Args:
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
    kinds = [name for name, key in (("texts", "prompt"), ("chats", "chat")) if record.places[key]]
    if not kinds:
        return "are not appended by the tokenizer: write them after each prompt."
    return f"come from the tokenizer, for {' and '.join(kinds)}."
