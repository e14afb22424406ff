"""Exports in engines that share no code with transformers: the plugin's greedy tokens on 40 prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rim_peft.data.examples import Templates
from rim_peft.export.checking import Expected
from rim_peft.export.folder import ExportOptions
from rim_peft.run import export, load_run
from rim_peft.run.built_base import train_tokenizer
from tests.conftest import build_base, build_rim
from tests.engines.answering import answer_by_ctranslate2, answer_by_llama_cpp, count_equal, expect_of, find_llama_cpp

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
    answers = answer_by_ctranslate2(adapter.export(tmp_path / "export"), adapter.expected, max_new_tokens=NEW_TOKENS)
    assert count_equal(adapter.expected, answers) == len(QUESTIONS)


def test_llama_cpp(adapter: Adapter, tmp_path: Path, record_property: Any) -> None:
    """Texts are read by llama.cpp's own tokenizer, blocks included, and answered from a GGUF file."""
    pytest.importorskip("llama_cpp")
    if find_llama_cpp() is None:
        pytest.skip("LLAMA_CPP does not name a folder with llama.cpp's convert_hf_to_gguf.py")
    folder = adapter.export(tmp_path / "export", append_to="none")
    answers = answer_by_llama_cpp(folder, adapter.expected, max_new_tokens=NEW_TOKENS, pre_tokenizer="gpt-2")
    memory = json.loads((folder / "rim_export.json").read_text())["memory"]
    num_equal = count_equal(adapter.expected, answers)
    record_property("num_equal", num_equal)
    assert not {token for answer in answers for token in answer} & set(memory["ids"])
    assert num_equal >= len(QUESTIONS) - 1  # its own kernels: one near tie may fall the other way
