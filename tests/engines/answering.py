"""Exports answered by engines that share no code with transformers, beside the plugin's greedy tokens.

``python -m tests.engines ADAPTER`` exports an adapter, and prints how many answers of each engine are the adapter's
own, token by token: of transformers, CTranslate2 and llama.cpp, as far as they are installed. The engines compute in
float32, the adapter as its recipe says (``model.dtype``), so a recipe in bfloat16 has differences at near ties.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_peft.export.checking import LEAST_PROMPTS, Expected, expect
from rim_peft.export.weights import ExportOptions
from rim_peft.inference.decoding import generate_greedily
from rim_peft.run import Run, export, load_run
from rim_peft.tuner.config import active_config

_CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
name = sys.argv[2]
if name:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: name
import convert_hf_to_gguf
del sys.argv[1:3]
convert_hf_to_gguf.main()
"""
"""llama.cpp's converter knows tokenizers by a hash of what they make of a text; a test's own is not among them."""


def find_llama_cpp() -> str | None:
    """Return the folder with llama.cpp's converter (``LLAMA_CPP``); None where it or the engine is missing."""
    return os.environ.get("LLAMA_CPP") if find_spec("llama_cpp") else None


def answer_by_transformers(folder: Path, expected: Sequence[Expected], *, max_new_tokens: int) -> list[list[int]]:
    """Return the tokens that a plain model of transformers writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return [
        generate_greedily(
            model,
            [tokenizer(item.prompt)["input_ids"]],
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.eos_token_id,
            max_new_tokens=max_new_tokens,
        )[0]
        for item in expected
    ]


def answer_by_ctranslate2(folder: Path, expected: Sequence[Expected], *, max_new_tokens: int) -> list[list[int]]:
    """Return the tokens that CTranslate2 writes for an export whose tokenizer appends the blocks."""
    import ctranslate2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    converted = ctranslate2.converters.TransformersConverter(str(folder)).convert(f"{folder}-ctranslate2", force=True)
    generator = ctranslate2.Generator(converted, device="cpu", compute_type="float32")
    results = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(tokenizer(item.prompt)["input_ids"]) for item in expected],
        max_length=max_new_tokens,
        max_batch_size=16,
        sampling_topk=1,
        include_prompt_in_result=False,
        end_token=tokenizer.eos_token,
        return_end_token=True,
    )
    return [result.sequences_ids[0] for result in results]


def answer_by_llama_cpp(
    folder: Path, expected: Sequence[Expected], *, max_new_tokens: int, pre_tokenizer: str = ""
) -> list[list[int]]:
    """Return the tokens that llama.cpp writes for an export whose tokenizer leaves the blocks to whoever asks.

    Texts are read by its own tokenizer, blocks included, and must give the ids that transformers has for them.

    Args:
        folder: the export.
        expected: prompts, and what is expected of them.
        max_new_tokens: tokens written at most.
        pre_tokenizer: llama.cpp's name of the tokenizer's splitting rule, where its converter does not know it.
    """
    import llama_cpp

    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = f"{folder}.gguf"
    command = [sys.executable, "-c", _CONVERT, str(find_llama_cpp()), pre_tokenizer, str(folder), "--outfile", file]
    subprocess.run([*command, "--outtype", "f32"], check=True, capture_output=True)
    memory = json.loads((folder / "rim_export.json").read_text())["memory"]
    begin, middle, end = memory["names"]
    blocks = f"{begin}{middle * memory['block_size']}{end}" * memory["num_blocks"]
    model = llama_cpp.Llama(file, n_ctx=512, n_threads=1, type_k=0, type_v=0, seed=0, verbose=False)
    answers = []
    for item in expected:
        wanted = tokenizer(f"{item.prompt}{blocks}")["input_ids"]
        begins = tokenizer.bos_token_id is not None and wanted[0] == tokenizer.bos_token_id
        prompt = model.tokenize(f"{item.prompt}{blocks}".encode(), add_bos=begins, special=True)
        if prompt != wanted:
            raise RuntimeError(f"llama.cpp reads {item.prompt!r} as {prompt}, transformers as {wanted}")
        model.reset()
        answer: list[int] = []
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            answer.append(int(token))
            if token == tokenizer.eos_token_id or len(answer) == max_new_tokens:
                break
        answers.append(answer)
    return answers


def count_equal(expected: Sequence[Expected], answers: Sequence[Sequence[int]]) -> int:
    """Return how many answers are the adapter's, token by token."""
    return sum(item.answer == list(answer) for item, answer in zip(expected, answers, strict=True))


def expect_of(run: Run, questions: Sequence[str], *, max_new_tokens: int) -> list[Expected]:
    """Return an adapter's own prompts and answers."""
    return expect(
        run.model,
        run.tokenizer,
        questions,
        templates=run.templates,
        num_blocks=active_config(run.model).num_blocks,
        max_new_tokens=max_new_tokens,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of engines; 1 if one of them answers otherwise than the adapter."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=main.__doc__)
    parser.add_argument("adapter", help="output folder of a training")
    parser.add_argument("--num", type=int, default=200, help="questions, of its task's test split (%(default)s)")
    args = parser.parse_args(arguments)
    run = load_run(args.adapter)
    if run.recipe is None:
        parser.error(f"adapter: must be the output folder of a training, which says its task, got {args.adapter}")
    limit = run.recipe.evaluation.max_new_tokens
    rows = run.task(None).load("test", path=run.recipe.data.path)
    questions = [row["question"] for row in rows.select(range(min(args.num, len(rows))))]
    if len(questions) < LEAST_PROMPTS:
        parser.error(
            f"num: must be at least {LEAST_PROMPTS}, and the test split as long, got {len(questions)} questions"
        )
    expected = expect_of(run, questions, max_new_tokens=limit)
    engines: dict[str, tuple[str, Callable[..., Any]]] = {
        "transformers": ("auto", answer_by_transformers),
    }
    if find_spec("ctranslate2") is not None:
        engines["CTranslate2"] = ("auto", answer_by_ctranslate2)
    if find_llama_cpp() is not None:
        engines["llama.cpp"] = ("none", answer_by_llama_cpp)
    is_equal = True
    with tempfile.TemporaryDirectory() as name:
        for engine, (append_to, answer) in engines.items():
            out = Path(name) / f"append-to-{append_to}"
            if not out.exists():
                options = ExportOptions(append_to=append_to, max_differing=LEAST_PROMPTS)  # they are counted here
                export(args.adapter, out, options=options, questions=questions[:LEAST_PROMPTS], max_new_tokens=limit)
            num_equal = count_equal(expected, answer(out, expected, max_new_tokens=limit))
            is_equal &= num_equal == len(expected)
            print(f"{engine:14} {num_equal} of {len(expected)}", flush=True)
    return 0 if is_equal else 1
