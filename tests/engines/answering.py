"""Exports answered by engines that share no code with transformers, beside the plugin's greedy tokens.

``python -m tests.engines ADAPTER`` exports an adapter, and prints for each engine and type of weights
(:mod:`benchmarks.engines`) the size of its files, how many answers are the adapter's own, token by token, and how many
are right. In float32 the adapter computes as its recipe says (``model.dtype``), so a recipe in bfloat16 has differences
at near ties.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.engines import Engine, find_engines
from rim_peft.export.checking import LEAST_PROMPTS, Expected, expect
from rim_peft.export.folder import ExportOptions
from rim_peft.run import Run, export, load_run
from rim_peft.run.rows import read_examples
from rim_peft.tuner.config import active_config


def ask_engine(engine: Engine, folder: Path, expected: Sequence[Expected], *, max_new_tokens: int) -> list[list[int]]:
    """Return the tokens that an engine writes for an export, whose tokenizer may append the blocks or leave them.

    llama.cpp reads the texts by its own tokenizer, blocks included, and must find the ids that transformers has.

    Raises:
        RuntimeError: the engine failed, or reads a text differently.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = json.loads((folder / "rim_export.json").read_text(encoding="utf-8"))
    texts = [str(item.prompt) for item in expected]
    if tokenizer(texts[0])["input_ids"][-1] != record["memory"]["ids"][-1]:
        texts = [f"{text}{record['block_text']}" for text in texts]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    if engine.name == "llama.cpp":
        engine.run(folder)
        _check_llama_cpp_reads(engine.out(folder), texts, prompts, bos_id=tokenizer.bos_token_id)
    return list(engine.run(folder, prompts=prompts, eos_id=tokenizer.eos_token_id, max_new_tokens=max_new_tokens))


def _check_llama_cpp_reads(
    file: Path, texts: Sequence[str], prompts: Sequence[list[int]], *, bos_id: int | None
) -> None:
    import llama_cpp

    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text, wanted in zip(texts, prompts, strict=True):
        found = model.tokenize(text.encode(), add_bos=bos_id is not None and wanted[0] == bos_id, special=True)
        if found != wanted:
            raise RuntimeError(f"llama.cpp reads {text!r} as {found}, transformers as {wanted}")


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
    """Print a table of engines; 1 if one of them answers in float32 otherwise than the adapter."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=main.__doc__)
    parser.add_argument("adapter", help="output folder of a training")
    parser.add_argument("--num", type=int, default=200, help="questions, of its task's test split (%(default)s)")
    args = parser.parse_args(arguments)
    run = load_run(args.adapter)
    if run.recipe is None:
        parser.error(f"adapter: must be the output folder of a training, which says its task, got {args.adapter}")
    limit = run.recipe.evaluation.max_new_tokens
    examples = read_examples(run.task().load("test", path=run.recipe.data.path), on_bad_rows="drop", limit=args.num)
    questions = [example.question for example in examples]
    if len(questions) < LEAST_PROMPTS:
        parser.error(
            f"num: must be at least {LEAST_PROMPTS}, and the test split as long, got {len(questions)} questions"
        )
    expected = expect_of(run, questions, max_new_tokens=limit)

    def show(engine: str, weights: str, size: str, answers: Sequence[Sequence[int]]) -> bool:
        texts = [run.answerer().read(answer) for answer in answers]
        right = sum(
            run.task().about(example.question).is_correct(text, example.answer)
            for text, example in zip(texts, examples, strict=True)
        )
        equal = count_equal(expected, answers)
        print(f"{engine:14} {weights:9} {size:>6} {equal:>5} {right:>6}  of {len(expected)}", flush=True)
        return equal == len(expected)

    print(f"{'engine':14} {'weights':9} {'MB':>6} {'equal':>5} {'right':>6}")
    show("the adapter", run.recipe.model.dtype or "", "", [item.answer for item in expected])
    is_equal = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "export"
        # The blocks are left to whoever asks: llama.cpp's converter does not know a tokenizer that appends them.
        options = ExportOptions(append_to="none", max_differing=LEAST_PROMPTS)  # they are counted here
        export(args.adapter, folder, options=options, questions=questions[:LEAST_PROMPTS], max_new_tokens=limit)
        for engine in find_engines():
            answers = ask_engine(engine, folder, expected, max_new_tokens=limit)
            size = f"{engine.megabytes(folder):.0f}"
            is_equal &= show(engine.name, engine.weights, size, answers) or engine.weights != "float32"
    return 0 if is_equal else 1
