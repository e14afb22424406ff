"""The card beside a checkpoint of a trainer that is used on its own; a recipe's run writes a fuller one."""

from __future__ import annotations

from pathlib import Path

_CARD = """---
library_name: peft
pipeline_tag: text-generation
tags: [peft, rim, latent-reasoning, trl]
---

# {name}

An adapter trained by `rim_peft.{stage}`.

```python
import rim_peft  # registers RIM with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}").eval()
```
"""


def write_card(folder: Path, *, name: str | None, stage: str, base: str) -> None:
    """Write ``README.md``.

    Args:
        folder: the checkpoints' folder; made if need be.
        name: what to call the adapter; the folder's name if None.
        stage: the trainer's class.
        base: name of the base, to load the adapter on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = _CARD.format(name=name or folder.name, stage=stage, base=base)
    (folder / "README.md").write_text(text, encoding="utf-8")
