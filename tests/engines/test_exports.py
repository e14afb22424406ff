"""Exports in engines that share no code with transformers: the plugin's greedy tokens on 40 prompts."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import engines
from benchmarks.engines import Engine, find_engines
from benchmarks.registry import Settings
from rim_peft.data.examples import Templates
from rim_peft.demo import SHIPPED
from rim_peft.export.checking import LEAST_PROMPTS, Expected
from rim_peft.export.folder import ExportOptions
from rim_peft.run import export, load_run
from rim_peft.run.built_base import train_tokenizer
from tests.conftest import build_base, build_rim
from tests.engines.answering import ask_engine, count_equal, expect_of

pytestmark = pytest.mark.slow

QUESTIONS = [f"What is {number} and {number * number} and {number % 7}?" for number in range(40)]
NEW_TOKENS = 8


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and what the plugin answers."""

    folder: Path
    expected: list[Expected]

    def export(self, out: Path, **options: Any) -> Path:
        export(str(self.folder), out, options=ExportOptions(**options), questions=QUESTIONS, max_new_tokens=NEW_TOKENS)
        return out


@pytest.fixture(scope="module", params=["llama_tied", "qwen3"])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp(request.param)
    rows = [{"question": question, "steps": None, "answer": "7"} for question in QUESTIONS]
    tokenizer = train_tokenizer(rows, Templates(), vocab_size=300)
    tokenizer.bos_token = tokenizer.eos_token
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    base = build_base(request.param, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    build_rim(base=AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder)
    run = load_run(folder)
    expected = expect_of(run, QUESTIONS, max_new_tokens=NEW_TOKENS)
    assert len({tuple(item.answer) for item in expected}) > 20
    return Adapter(folder, expected)


def test_ctranslate2(adapter: Adapter, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    engine, folder = Engine("CTranslate2", "float32"), adapter.export(tmp_path / "export")
    answers = ask_engine(engine, folder, adapter.expected, max_new_tokens=NEW_TOKENS)
    assert count_equal(adapter.expected, answers) == len(QUESTIONS)


def test_llama_cpp(adapter: Adapter, tmp_path: Path, record_property: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are read by llama.cpp's own tokenizer, blocks included, and answered from a GGUF file."""
    engine = Engine("llama.cpp", "float32")
    if engine not in find_engines():
        pytest.skip("needs llama_cpp, and LLAMA_CPP, the folder with llama.cpp's convert_hf_to_gguf.py")
    folder = adapter.export(tmp_path / "export", append_to="none")
    monkeypatch.setenv("PRE_TOKENIZER", "gpt-2")
    answers = ask_engine(engine, folder, adapter.expected, max_new_tokens=NEW_TOKENS)
    memory = json.loads((folder / "rim_export.json").read_text())["memory"]
    num_equal = count_equal(adapter.expected, answers)
    record_property("num_equal", num_equal)
    assert not {token for written in answers for token in written} & set(memory["ids"])
    assert num_equal >= len(QUESTIONS) - 1  # its own kernels: one near tie may fall the other way


@dataclass(frozen=True)
class ShippedFile:
    """The adapter that ships as a GGUF file, with what it answers itself to questions as texts and as chats."""

    file: Path
    prompts: list[str]
    texts: list[str]
    chats: list[list[dict[str, str]]]
    replies: list[str]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> ShippedFile:
    engine = Engine("llama.cpp", "float32")
    if engine not in find_engines():
        pytest.skip("needs llama_cpp, and LLAMA_CPP, the folder with llama.cpp's convert_hf_to_gguf.py")
    run = load_run(SHIPPED)
    questions = [row["question"] for row in run.task().load("test")][:LEAST_PROMPTS]
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts, replies = (list(run.answerer(max_new_tokens=4).answer(asked)) for asked in (questions, chats))
    folder = tmp_path_factory.mktemp("shipped") / "export"
    options = ExportOptions(append_to="chat")
    export(str(SHIPPED), folder, options=options, questions=chats, max_new_tokens=4)
    engine.run(folder)
    blocks = json.loads((folder / "rim_export.json").read_text(encoding="utf-8"))["block_text"]
    prompts = [run.templates.prompt.format(question=question) + blocks for question in questions]
    return ShippedFile(engine.out(folder), prompts, texts, chats, replies)


@pytest.mark.real
def test_llama_cpp_writes_chats_by_the_template_in_its_file(shipped: ShippedFile) -> None:
    import llama_cpp

    model = llama_cpp.Llama(str(shipped.file), n_ctx=512, n_threads=1, type_k=0, type_v=0, verbose=False)
    settings = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 4}
    for chat, reply in zip(shipped.chats, shipped.replies, strict=True):
        answer = model.create_chat_completion(chat, **settings)["choices"][0]["message"]["content"]
        assert answer.strip() == reply


@pytest.mark.real
def test_llamas_server_answers_chats_and_texts(shipped: ShippedFile) -> None:
    """llama.cpp's own HTTP server: chats by the template in the file, texts with the blocks written behind them."""
    server_of_llama = pytest.importorskip("xllamacpp", reason="needs xllamacpp, which holds llama.cpp's server")
    options = server_of_llama.CommonParams()
    options.model.path, options.n_ctx, options.port = str(shipped.file), 1024, 0
    options.cpuparams.n_threads, options.use_jinja, options.warmup = 1, True, False
    server = server_of_llama.Server(options)

    def ask(path: str, **body: Any) -> Any:
        data = json.dumps({**body, "temperature": 0}).encode()
        request = urllib.request.Request(  # noqa: S310 - on the loopback interface
            f"{server.listening_address}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            return json.load(answer)

    for chat, reply in zip(shipped.chats, shipped.replies, strict=True):
        answer = ask("/v1/chat/completions", messages=chat, max_tokens=4)["choices"][0]["message"]["content"]
        assert answer.strip() == reply
    for prompt, text in zip(shipped.prompts, shipped.texts, strict=True):
        assert ask("/completion", prompt=prompt, n_predict=4)["content"].strip() == text
        assert ask("/v1/completions", prompt=prompt, max_tokens=4)["choices"][0]["text"].strip() == text


def test_each_engine_is_timed(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ctranslate2")
    monkeypatch.setattr(engines, "SHIPPED", adapter.folder)
    monkeypatch.delenv("RUNTIMES_PYTHON", raising=False)
    found = [engine for engine in find_engines() if engine.weights == "float32" and engine.name != "llama.cpp"]
    monkeypatch.setattr(engines, "find_engines", lambda: iter(found))
    rows = list(engines.run(Settings(quick=True)))
    cases = [(row.case["engine"], row.case["measure"]) for row in rows]
    measures = ("first token", "whole answer", "CPU time")
    assert cases == [(name, measure) for name in ("transformers", "CTranslate2") for measure in measures]
    for row in rows:
        # A prompt of 4 tokens, blocks, an answer of 2 after a chain of 4.
        blocks = row.case["K·B"]
        assert blocks > 0
        assert row.bound == ((4 + blocks) / 4 if row.case["measure"] == "first token" else 9 / (5 + blocks))
        assert all(way.spread.lower > 0 for way in row.ways)
        assert row.figure.lower > 0


def test_a_failing_engine_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)transformers, float32: .*config\.json"):
        Engine("transformers", "float32").run(tmp_path, prompts=[[1]], eos_id=0, max_new_tokens=1)
