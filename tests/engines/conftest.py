"""One adapter on SmolLM2-135M, what it answers in this package, and vLLM servers of its exports.

The adapter is the one that this package ships or, without it, one with random weights. vLLM has an environment of its
own, made by ``make test-engines``; ``VLLM_PYTHON`` names another one's Python.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.load import HOST
from benchmarks.vllm_server import VllmServer, find_python
from rim_peft.data.examples import Question
from rim_peft.export import embedding_lora, merged, peft_lora, weights
from rim_peft.export.checking import LEAST_PROMPTS, CheckResult, Expected
from rim_peft.export.folder import ExportOptions, Prompts
from rim_peft.export.record import EXPORT_FILE
from rim_peft.export.weights import on_stored_base, stored_at
from rim_peft.recipe import load_recipe
from rim_peft.recipe.reading import resolve
from rim_peft.recipe.syntax import write_yaml
from rim_peft.run import Run, load_run
from rim_peft.run.named_bases import find_base
from rim_peft.run.output_folder import RECIPE_FILE
from rim_peft.run.rows import first_questions
from rim_peft.run.sharing import FORMATS
from rim_peft.sequence.layout import BlockTokens
from rim_peft.tuner.config import active_config
from tests.documentation import read_blocks, read_page
from tests.real.conftest import CHATS, NAME, RECIPE, attach, load_smol

SHIPPED = Path(__file__).parents[2] / "rim_peft" / "demo" / "smollm2"
NUM_QUESTIONS = 200
NUM_CHATS = 8
_BATCH = 16

_SMALL = "--dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 32 --block-size 32"
"""Options of each server besides the documented ones.

float32, since rounding must not decide between two tokens; and the smallest block size that vLLM has on CPUs, shorter
than a prompt, so that prompts which are asked again are read from its cache, as on GPUs.
"""
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and what it answers in this package.

    Attributes:
        folder: as ``rim-peft train`` writes it.
        run: the adapter on its base as it is stored, in float32.
        expected: answers by number of blocks; with the adapter's own number also to chats, after the texts.
        num_texts: how many are answers to texts, with the adapter's own number.
    """

    folder: Path
    run: Run
    expected: dict[int, list[Expected]]
    num_texts: int

    @property
    def base(self) -> str:
        return stored_at(self.run.model.get_base_model())

    @property
    def num_blocks(self) -> int:
        return active_config(self.run.model).num_blocks

    @property
    def texts(self) -> list[Expected]:
        return self.expected[self.num_blocks][: self.num_texts]

    @property
    def chats(self) -> list[Expected]:
        return self.expected[self.num_blocks][self.num_texts :]

    @property
    def max_new_tokens(self) -> int:
        return self.run.answerer().max_new_tokens

    def text_of(self, item: Expected) -> str:
        return str(self.run.tokenizer.decode(item.answer, skip_special_tokens=True))

    def is_near_tie(self, item: Expected, answer: Sequence[int], *, num_blocks: int) -> bool:
        """Whether an answer first differs where two tokens score alike, as closely as in an export's check."""
        pairs = enumerate(zip(item.answer, answer, strict=False))
        place = next((index for index, (wanted, got) in pairs if wanted != got), None)
        if place is None:
            return False
        blocks = active_config(self.run.model).block_tokens.ids(num_blocks)
        with torch.no_grad():
            row = torch.tensor([[*item.ids, *blocks, *item.answer[:place]]])
            scores = self.run.model(input_ids=row).logits[0, -1]
        gap = (scores[item.answer[place]] - scores[answer[place]]).abs() / scores.abs().max()
        return bool(gap <= 2 * torch.finfo(torch.float32).eps)

    def write(self, form: str, folder: Path) -> Path:
        """Export it as ``rim-peft export`` does, without the check: here engines are asked instead."""
        known, again = self.expected[self.num_blocks], load_run(self.folder)
        prompts = Prompts([known[0].prompt], again.templates, max_new_tokens=self.max_new_tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "expect", lambda *_, **__: known)
            for module in (embedding_lora, merged, peft_lora):
                patch.setattr(module, "check", lambda *_, **__: CheckResult(0, 0, 0, 0, 0))
            FORMATS[form](
                on_stored_base(again.model), again.tokenizer, folder, prompts, ExportOptions(), source="potions"
            )
        return folder


def answer(folder: Path, *, num_texts: int, num_chats: int = 0, also: Sequence[int] = ()) -> Adapter:
    """Ask an adapter its task's questions, as texts and as chats, and some of them with other numbers of blocks."""
    loaded = load_run(folder)
    run = replace(loaded, model=on_stored_base(loaded.model))
    texts: Any = first_questions(run.task(), None, limit=num_texts)
    asked = [[{"role": "user", "content": text}] for text in texts]
    chats = [*CHATS, *asked][:num_chats]
    expected = {number: _ask(run, texts[:LEAST_PROMPTS], num_blocks=number) for number in also}
    expected[active_config(run.model).num_blocks] = _ask(run, [*texts, *chats])
    return Adapter(folder, run, expected, len(texts))


def _ask(run: Run, questions: Sequence[Question], *, num_blocks: int | None = None) -> list[Expected]:
    answerer = run.answerer(num_blocks=num_blocks)
    prompts = answerer.tokenize(questions)
    batches = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
    texts = [run.templates.prompt.format(question=asked) if isinstance(asked, str) else asked for asked in questions]
    answers = [answer for batch in batches for answer in answerer.decode(batch)]
    return [Expected(*item) for item in zip(texts, prompts, answers, strict=True)]


def make(folder: Path, **options: Any) -> Path:
    """Write an adapter with random weights as a training would, with its recipe."""
    asked = {"model.name_or_path": NAME, "output_dir": folder, "evaluation.max_new_tokens": 6}
    recipe = load_recipe(
        RECIPE, [*(f"{key}={value}" for key, value in asked.items()), f"adapter={json.dumps(options)}"]
    )
    attach(load_smol(find_base(NAME)), **options).save_pretrained(str(folder))
    (folder / RECIPE_FILE).write_text(write_yaml(resolve(recipe)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = SHIPPED if SHIPPED.exists() else make(tmp_path_factory.mktemp("made") / "potions", num_blocks=3, r=4)
    return answer(folder, num_texts=NUM_QUESTIONS, num_chats=NUM_CHATS, also=(0, 1))


@pytest.fixture(scope="session")
def other_adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Another adapter of the same base, with blocks of another size and number."""
    folder = tmp_path_factory.mktemp("made") / "other"
    options = {"num_blocks": 5, "block_size": 1, "r": 4, "init_memory": [40, 50, 60]}
    return answer(make(folder, **options), num_texts=LEAST_PROMPTS)


@dataclass(frozen=True)
class Server:
    """A running server that serves an adapter's export as the model ``potions``, and the process of its client."""

    vllm: VllmServer
    client: Any
    adapter: Adapter
    blocks: BlockTokens

    def ask(self, *requests: dict[str, Any], at_once: int = 1) -> list[Any]:
        """Send requests, each made by :func:`completion` or :func:`chat`, and return what comes back."""
        few = {"max_tokens": self.adapter.max_new_tokens}
        asked = [{**request, "options": {**few, **request["options"]}} for request in requests]
        self.client.stdin.write(json.dumps({"at_once": at_once, "requests": asked}) + "\n")
        self.client.stdin.flush()
        answers: list[Any] = json.loads(self.client.stdout.readline())
        return answers

    def compare(self, found: Any, items: Sequence[Expected], *, num_blocks: int | None = None) -> None:
        """Check that prompts are the expected ones with their blocks, and answers equal but for near ties."""
        number = self.adapter.num_blocks if num_blocks is None else num_blocks
        assert [one["prompt"] for one in found] == [[*item.ids, *self.blocks.ids(number)] for item in items]
        parted = [(item, one["tokens"]) for item, one in zip(items, found, strict=True) if one["tokens"] != item.answer]
        assert [
            (item.prompt, item.answer, tokens)
            for item, tokens in parted
            if not self.adapter.is_near_tie(item, tokens, num_blocks=number)
        ] == []


def completion(prompt: Any, *, model: str = "potions", hang_up: bool = False, **options: Any) -> dict[str, Any]:
    return {"kind": "completions", "hang_up": hang_up, "options": {"model": model, "prompt": prompt, **options}}


def chat(item: Expected, *, model: str = "potions", **options: Any) -> dict[str, Any]:
    messages = [dict(message) for message in item.prompt]
    return {"kind": "chat", "options": {"model": model, "messages": messages, **options}}


def documented(form: str) -> tuple[list[str], list[str]]:
    """Return the commands by which docs/vllm.md exports an adapter in a format and serves it, word by word."""
    (code,) = [
        block.code
        for block in read_blocks("docs/vllm.md", read_page("docs/vllm.md"))
        if "vllm serve" in block.code and f"--format {form}" in block.code
    ]
    export, served = (shlex.split(line, comments=True) for line in code.splitlines())
    return export, served


def blocks_of(export: Path) -> BlockTokens:
    """Return the blocks that an export's record names."""
    record = json.loads((export / EXPORT_FILE).read_text(encoding="utf-8"))
    memory = record["adapters"]["potions"]["memory"] if "adapters" in record else record["memory"]
    return BlockTokens(*memory["ids"], block_size=memory["block_size"])


@contextmanager
def serve(form: str, adapter: Adapter, folder: Path, **environment: str) -> Iterator[Server]:
    """Run the documented server of a format, of the adapter's export in a new folder."""
    python = find_python(None)
    if python is None:
        pytest.skip("vLLM has no environment: make test-engines creates it")
    export, (_, _, model, *options) = documented(form)
    out = folder / export[export.index("--output-dir") + 1]
    if form == "embedding-lora":  # as documented in every word, with the check
        shutil.copytree(adapter.folder, folder / export[2])
        subprocess.run([sys.executable, "-m", "rim_peft", *export[1:]], cwd=folder, check=True)
    else:
        adapter.write(form, out)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**_ENVIRONMENT, **environment}.items():
            patch.setenv(name, value)
        # vllm-cpu is not called vllm, and the command of that name asks for vllm's version before it starts anything.
        arguments = ["--model", adapter.base if model == "BASE" else model, *options, *_SMALL.split()]
        with VllmServer(python, arguments, folder) as server, _client(python, server.port) as client:
            yield Server(server, client, adapter, blocks_of(out))


def _client(python: Path, port: int) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("ask_server.py").read_text(encoding="utf-8")
    command = [python, "-c", script, f"http://{HOST}:{port}/v1"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
