"""Exports answered by engines that share no code with transformers, beside the plugin's greedy tokens.

``python -m tests.engines ADAPTER`` exports an adapter, and prints for each engine and type of weights the size of its
file, how many answers are the adapter's own, token by token, and how many are right. Engines are transformers,
CTranslate2 and llama.cpp, as far as they are installed, and OpenVINO and ONNX Runtime in the environment whose Python
``RUNTIMES_PYTHON`` names. In float32 the adapter computes as its recipe says (``model.dtype``), so a recipe in bfloat16
has differences at near ties.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from rim_peft.export.checking import LEAST_PROMPTS, Expected, expect
from rim_peft.export.folder import ExportOptions
from rim_peft.inference.greedy import generate_greedily
from rim_peft.run import Run, export, load_run
from rim_peft.run.rows import read_examples
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


LLAMA_TYPES = {"float32": "f32", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
"""How llama.cpp names types of weights: its converter the first, its quantisation the others."""


def converted(folder: Path, engine: str, weights: str) -> Path:
    """Return where an engine's own file or folder of an export is."""
    return folder.with_name(f"{folder.name}-{engine}-{weights}")


def find_llama_cpp() -> str | None:
    """Return the folder with llama.cpp's converter (``LLAMA_CPP``); None where it or the engine is missing."""
    return os.environ.get("LLAMA_CPP") if find_spec("llama_cpp") else None


def answer_by_transformers(
    folder: Path, expected: Sequence[Expected], *, max_new_tokens: int, weights: str = "float32"
) -> list[list[int]]:
    """Return the tokens that a plain model of transformers writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights).eval()
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


def answer_by_ctranslate2(
    folder: Path, expected: Sequence[Expected], *, max_new_tokens: int, weights: str = "float32"
) -> list[list[int]]:
    """Return the tokens that CTranslate2 writes for an export whose tokenizer appends the blocks."""
    import ctranslate2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = str(converted(folder, "CTranslate2", weights))
    ctranslate2.converters.TransformersConverter(str(folder)).convert(out, quantization=weights, force=True)
    generator = ctranslate2.Generator(out, device="cpu", compute_type=weights)
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
    folder: Path,
    expected: Sequence[Expected],
    *,
    max_new_tokens: int,
    weights: str = "float32",
    pre_tokenizer: str = "",
) -> list[list[int]]:
    """Return the tokens that llama.cpp writes for an export whose tokenizer leaves the blocks to whoever asks.

    Texts are read by its own tokenizer, blocks included, and must give the ids that transformers has for them.

    Args:
        folder: the export.
        expected: prompts, and what is expected of them.
        max_new_tokens: tokens written at most.
        weights: one of :data:`LLAMA_TYPES`.
        pre_tokenizer: llama.cpp's name of the tokenizer's splitting rule, where its converter does not know it.
    """
    import llama_cpp

    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = str(_to_gguf(folder, weights, pre_tokenizer))
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


def _to_gguf(folder: Path, weights: str, pre_tokenizer: str) -> Path:
    """Write an export as a GGUF file."""
    import llama_cpp

    plain, out = (converted(folder, "llama.cpp", name) for name in ("float32", weights))
    command = [sys.executable, "-c", _CONVERT, str(find_llama_cpp()), pre_tokenizer, str(folder), "--outfile", plain]
    if not plain.exists():
        subprocess.run([*command, "--outtype", LLAMA_TYPES["float32"]], check=True, capture_output=True)
    if out != plain:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, LLAMA_TYPES[weights])
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(out).encode(), options):
            raise RuntimeError(f"llama.cpp cannot write {plain.name} as {weights}")
    return out


def answer_by_runtime(
    engine: str, folder: Path, expected: Sequence[Expected], *, max_new_tokens: int, weights: str = "float32"
) -> list[list[int]]:
    """Return the tokens that OpenVINO or ONNX Runtime writes in its own environment, which gets the prompts' ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    job = {
        "engine": engine,
        "weights": weights,
        "folder": str(folder),
        "out": str(converted(folder, engine.replace(" ", ""), weights)),
        "prompts": [tokenizer(item.prompt)["input_ids"] for item in expected],
        "eos_id": tokenizer.eos_token_id,
        "max_new_tokens": max_new_tokens,
    }
    script = Path(__file__).with_name("ask_runtime.py").read_text(encoding="utf-8")
    command = [os.environ["RUNTIMES_PYTHON"], "-c", script]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{engine}, {weights}: {done.stderr[-2000:]}")
    answers: list[list[int]] = json.loads(done.stdout)
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


def find_engines() -> Iterator[tuple[str, str, str, Callable[..., list[list[int]]]]]:
    """Yield each engine that is there with a type of weights, what its export appends blocks to, and how it answers."""
    yield "transformers", "float32", "auto", answer_by_transformers
    if find_spec("ctranslate2") is not None:
        for weights in ("float32", "int8"):
            yield "CTranslate2", weights, "auto", answer_by_ctranslate2
    if find_llama_cpp() is not None:
        for weights in LLAMA_TYPES:
            yield "llama.cpp", weights, "none", answer_by_llama_cpp
    if "RUNTIMES_PYTHON" in os.environ:
        for engine, types in {"OpenVINO": ("float32", "int8", "int4"), "ONNX Runtime": ("float32", "int4")}.items():
            for weights in types:
                yield engine, weights, "auto", partial(answer_by_runtime, engine)


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
        for engine, weights, append_to, answer in find_engines():
            out = Path(name) / f"append-to-{append_to}"
            if not out.exists():
                options = ExportOptions(append_to=append_to, max_differing=LEAST_PROMPTS)  # they are counted here
                export(args.adapter, out, options=options, questions=questions[:LEAST_PROMPTS], max_new_tokens=limit)
            answers = answer(out, expected, max_new_tokens=limit, weights=weights)
            size = _megabytes(converted(out, engine.replace(" ", ""), weights), otherwise=out)
            is_equal &= show(engine, weights, size, answers) or weights != "float32"
    return 0 if is_equal else 1


def _megabytes(path: Path, *, otherwise: Path) -> str:
    """Return the size of a model's files, tokenizer included where they have one."""
    found = path if path.exists() else otherwise
    files = [found] if found.is_file() else [file for file in found.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f}"
