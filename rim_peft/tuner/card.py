"""The model card of a RIM adapter: the same text for adapters saved by hand, by a trainer and by a recipe's run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from yaml import YAMLError

from rim_peft.escaping import code_span, json_text, markdown, one_line, visible
from rim_peft.values import check_yaml, cut

CARD_FILE = "README.md"
TAGS = ("peft", "rim", "latent-reasoning")
_CARD = """---
{front_matter}
---

# {name}

{description} Made with `rim-peft`.

## Use

Without the first import, PEFT does not know this kind of adapter and stops with `KeyError: 'RIM'`.

```python
import rim_peft  # registers RIM with PEFT
{loading}

prompt = {template}.format(question={question})
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
```

Or in a shell: {shell}.
{sections}
## Licence and citation

The adapter's licence is the one at the top of this card, if its author named one; its base has its own licence,
which may also apply to its adapters. The method is that of arXiv 2605.30343, implemented independently by `rim-peft`
(Apache-2.0):

```bibtex
@misc{{aichberger2026rim,
  title = {{Unlocking the Working Memory of Large Language Models for Latent Reasoning}},
  author = {{Aichberger and Hochreiter}},
  year = {{2026}},
  eprint = {{2605.30343}},
  archivePrefix = {{arXiv}}
}}
```
"""

_SEPARATE_BASE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = {adapter}{mark}
base = AutoModelForCausalLM.from_pretrained({base}{revision})
model = PeftModel.from_pretrained(base, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained({tokenizer})"""

_OWN_BASE = """from rim_peft.run import load_run

adapter = {adapter}{mark}
run = load_run(adapter)  # on the base that it was trained on
model, tokenizer = run.model, run.tokenizer"""

_MARK = "  # this folder, or its id on the Hub"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Usage:
    """How to load and prompt an adapter.

    Attributes:
        base: folder or Hub id of the base, empty if unknown; None if it is in the adapter's folder.
        revision: revision of the base.
        has_tokenizer: whether the adapter's folder contains the tokenizer.
        template: prompt template with ``{question}``.
        question: an example question.
    """

    base: str | None
    revision: str | None = None
    has_tokenizer: bool = False
    template: str = "{question}\n"
    question: str = "Ann has 3 apples and buys 4 more. How many does she have?"


@dataclass(frozen=True)
class CardText:
    """The text of one adapter's card.

    Attributes:
        description: one or two sentences on the adapter.
        usage: how to load and prompt it.
        sections: more sections, Markdown by heading.
        metadata: more front matter, as arguments of ``ModelCardData``.
    """

    description: str
    usage: Usage
    sections: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def render_card(name: str, card: CardText) -> str:
    """Return the text of ``README.md`` for an adapter; ``name`` is the name of its folder, or its Hub id."""
    usage = card.usage
    question = "'...'" if "\n" in usage.question else "'" + usage.question.replace("'", "'\\''") + "'"
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        model_name=name,
        **{"base_model": hub_id(usage.base), "tags": list(TAGS), **card.metadata},
    )
    return _CARD.format(
        front_matter=visible(data.to_yaml()),
        name=markdown(name),
        description=card.description,
        loading=_loading(name, usage),
        shell=code_span(f"{_command(name)}{question}"),
        template=json_text(usage.template),
        question=json_text(usage.question),
        sections="".join(f"\n## {heading}\n\n{text.strip()}\n" for heading, text in card.sections.items()),
    )


def describe_blocks(num_blocks: int, block_size: int) -> str:
    """Return a sentence that describes an adapter with memory blocks."""
    return (
        f"An adapter that lets its base reason in {num_blocks} memory blocks of {block_size} tokens each: the blocks "
        "follow the\nprompt, and the answer follows them after one forward pass."
    )


def hub_id(source: str | None) -> str | None:
    """Return a source if it can be a Hub id; None for folders and files, which the Hub could not link to."""
    return source if source and _HUB_ID.fullmatch(source) and not Path(source).exists() else None


def name_adapter(text: str, name: str) -> str:
    """Rename the adapter in a card's title and commands, for example to its id on the Hub.

    A user's changes of the card stay.
    """
    found = re.search(rf'^adapter = (".*"){_MARK}$', text, re.MULTILINE)
    if found is None:
        return text
    old = json.loads(found[1])
    quoted = "'" + old.replace("'", "''") + "'"  # YAML's form for names that look like numbers or dates
    for before, after in (
        (found[0], f"adapter = {json_text(name)}{_MARK}"),
        *((f"\n# {title}\n", f"\n# {markdown(name)}\n") for title in (markdown(old), old)),
        (_command(old), _command(name)),
        *(
            (f"\n{key}: {written}\n", f"\n{key}: {name}\n")
            for key in ("model_name", "- name")
            for written in (old, quoted)
        ),
    ):
        text = text.replace(before, after, 1)
    return text


def read_card(text: str) -> ModelCard:
    """Return a card with its metadata.

    Raises:
        ValueError: its front matter is not YAML, or would take unbounded time or memory.
    """
    try:
        if (front_matter := re.search(REGEX_YAML_BLOCK, text)) is not None:
            check_yaml(front_matter[2])
        return ModelCard(text, ignore_metadata_errors=True)
    except (YAMLError, ValueError) as error:
        raise ValueError(
            f"{CARD_FILE}: its front matter must be YAML, but is not ({cut(str(error))}). Correct it, or remove the "
            "file to get a new one."
        ) from error


def name_base(text: str, base: str) -> str:
    """Rename the base in a card's commands and metadata, for example to its id on the Hub."""
    quoted = json_text(base)
    for start in ("base = AutoModelForCausalLM", "tokenizer = AutoTokenizer"):
        pattern = rf'^({re.escape(start)}\.from_pretrained\()("(?:[^"\\\n]|\\.)*"|\.\.\.)'
        text = re.sub(pattern, lambda match: match[1] + quoted, text, count=1, flags=re.MULTILINE)
    card = read_card(text)
    card.data["base_model"] = base
    return str(card)


def complete_card(text: str, *, base: str | None = None, tags: Iterable[str] = (), license: str | None = None) -> str:
    """Add the metadata that every RIM adapter needs to a card, and more if given; its text stays.

    Args:
        base: folder or Hub id of the base, for a card that does not name it.
        license: id of the adapter's licence, instead of the card's.
    """
    card = read_card(text)
    data: Any = card.data
    data.library_name = "peft"
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS, *tags]))
    data.base_model = data.base_model or hub_id(base)
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.license = license or data.license
    return str(card)


def _command(name: str) -> str:
    """Return the shell command that asks an adapter, up to the question."""
    return f"rim-peft generate {one_line(shlex.quote(name))} "


def _loading(name: str, usage: Usage) -> str:
    if usage.base is None:
        return _OWN_BASE.format(adapter=json_text(name), mark=_MARK)
    base = json_text(usage.base) if usage.base else "..."
    return _SEPARATE_BASE.format(
        adapter=json_text(name),
        mark=_MARK,
        base=base,
        revision=f", revision={json_text(usage.revision)}" if usage.revision else "",
        tokenizer="adapter" if usage.has_tokenizer else base,
    )
