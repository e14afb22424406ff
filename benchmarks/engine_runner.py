"""Convert an export for an engine and ask it, in that engine's environment; nothing imports this file.

A job is read as JSON from stdin: ``engine``, ``weights`` (their type), ``folder`` (the export), ``out`` (the engine's
own file or folder, made if it is not there), ``threads``, and what to do.

* ``prompts`` (token ids), ``eos_id`` and ``max_new_tokens``: stdout gets the greedy tokens of each answer.
* ``ways`` (by name, token ids and how many tokens to write, EOS or not), ``rounds`` and ``most_seconds``: stdout gets
  ``seconds`` and ``cpu_seconds`` of each round by way, and ``memory``, the process's peak in bytes (None where the
  system does not say). Ways take turns; each is run once before. Every prompt begins with another token, so that no
  engine finds it in a cache of prefixes.
* Neither: the export is converted, and nothing asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

Ask = Callable[[list[int], int, int | None], list[int]]
"""Token ids of a prompt, how many tokens to write at most, and EOS (None: write them all): the tokens written."""


def main() -> None:
    """Do the job on stdin."""
    job = json.load(sys.stdin)
    load, convert = ENGINES[job["engine"]]
    with contextlib.redirect_stdout(sys.stderr):
        if convert and not Path(job["out"]).exists():
            convert(job["folder"], job["out"], job["weights"])
        result: Any = None
        if "prompts" in job or "ways" in job:
            _keep_to_cores(job["threads"])
            ask = load(job["out"], job["weights"], job["threads"])
            result = _answer(ask, job) if "prompts" in job else _time(ask, job)
    json.dump(result, sys.stdout)


def _keep_to_cores(number: int) -> None:
    """Keep this process, whatever threads an engine makes, to as many cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def _answer(ask: Ask, job: dict[str, Any]) -> list[list[int]]:
    return [ask(ids, job["max_new_tokens"], job["eos_id"]) for ids in job["prompts"]]


def _time(ask: Ask, job: dict[str, Any]) -> dict[str, Any]:
    ways: dict[str, tuple[list[int], int]] = job["ways"]
    taken: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in ways} for clock in ("wall", "cpu")}
    numbers = count(1)
    for name, (ids, num_tokens) in ways.items():
        if (written := len(ask([next(numbers), *ids[1:]], num_tokens, None))) != num_tokens:
            raise RuntimeError(f"{name}: must write {num_tokens} tokens, wrote {written}")
    begun = time.perf_counter()
    for number in range(job["rounds"]):
        first = number % len(ways)
        for name in [*ways, *ways][first : first + len(ways)]:
            ids, num_tokens = ways[name]
            prompt = [next(numbers), *ids[1:]]
            wall, cpu = time.perf_counter(), time.process_time()
            ask(prompt, num_tokens, None)
            taken["wall"][name].append(time.perf_counter() - wall)
            taken["cpu"][name].append(time.process_time() - cpu)
        if number >= 2 and time.perf_counter() - begun > job["most_seconds"]:
            break
    return {"seconds": taken["wall"], "cpu_seconds": taken["cpu"], "memory": _peak()}


def _peak() -> int | None:
    """Return the most bytes that this process held; ``getrusage`` would count what the one that started it had."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=sys.stderr)


def _load_transformers(out: str, weights: str, threads: int) -> Ask:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=weights).eval()

    def ask(ids: list[int], num_tokens: int, eos_id: int | None) -> list[int]:
        prompt = torch.tensor([ids])
        written = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens if eos_id is None else None,
            eos_token_id=eos_id,
            do_sample=False,
        )
        return [int(token) for token in written[0, len(ids) :]]

    return ask


def _convert_for_ctranslate2(folder: str, out: str, weights: str) -> None:
    _run("ctranslate2.converters.transformers", "--model", folder, "--output_dir", out, "--quantization", weights)


def _load_ctranslate2(out: str, weights: str, threads: int) -> Ask:
    import ctranslate2

    generator = ctranslate2.Generator(out, device="cpu", compute_type=weights, intra_threads=threads)
    names = json.loads(Path(out, "vocabulary.json").read_text(encoding="utf-8"))

    def ask(ids: list[int], num_tokens: int, eos_id: int | None) -> list[int]:
        result = generator.generate_batch(
            [[names[token] for token in ids]],
            max_length=num_tokens,
            min_length=num_tokens if eos_id is None else 0,
            sampling_topk=1,
            include_prompt_in_result=False,
            **({} if eos_id is None else {"end_token": [eos_id], "return_end_token": True}),
        )
        return [int(token) for token in result[0].sequences_ids[0]]

    return ask


_CONVERT_FOR_LLAMA = """
import os, sys
sys.path[:0] = [os.environ["LLAMA_CPP"], os.environ["LLAMA_CPP"] + "/gguf-py"]
if os.environ.get("PRE_TOKENIZER"):
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: os.environ["PRE_TOKENIZER"]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
"""llama.cpp's converter knows tokenizers by a hash of what they make of a text; a test's own is not among them."""

LLAMA_TYPES = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
"""How llama.cpp names what its quantisation writes."""


def _convert_for_llama_cpp(folder: str, out: str, weights: str) -> None:
    plain = out if weights == "float32" else f"{out}-float32"
    command = [sys.executable, "-c", _CONVERT_FOR_LLAMA, folder, "--outfile", plain, "--outtype", "f32"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    if weights != "float32":
        import llama_cpp

        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, LLAMA_TYPES[weights])
        if llama_cpp.llama_model_quantize(plain.encode(), out.encode(), options):
            raise RuntimeError(f"llama.cpp cannot write {plain} as {weights}")
        Path(plain).unlink()


def _load_llama_cpp(out: str, weights: str, threads: int) -> Ask:
    import llama_cpp

    precise = {"type_k": 0, "type_v": 0} if weights == "float32" else {}  # by default keys and values have 16 bits
    model = llama_cpp.Llama(
        out, n_ctx=1024, n_threads=threads, n_threads_batch=threads, seed=0, verbose=False, **precise
    )

    def ask(ids: list[int], num_tokens: int, eos_id: int | None) -> list[int]:
        model.reset()
        answer: list[int] = []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            answer.append(int(token))
            if token == eos_id or len(answer) == num_tokens:
                break
        return answer

    return ask


def _convert_for_openvino(folder: str, out: str, weights: str) -> None:
    bits = {"float32": "fp32"}.get(weights, weights)
    groups = ("--group-size", "64") if weights == "int4" else ()  # by default 128, which does not divide 576
    task = ("--task", "text-generation-with-past", "--weight-format", bits, *groups)
    _run("optimum.commands.optimum_cli", "export", "openvino", "--model", folder, *task, out)


def _load_openvino(out: str, weights: str, threads: int) -> Ask:
    import numpy
    import openvino
    import openvino_genai

    # By default it computes in 16 bits and keeps 8 bits of each key, where the machine can.
    precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if weights == "float32" else {}
    pipeline: Any = openvino_genai.LLMPipeline(out, "CPU", {"INFERENCE_NUM_THREADS": threads, **precise})

    def ask(ids: list[int], num_tokens: int, eos_id: int | None) -> list[int]:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.do_sample, settings.ignore_eos = num_tokens, False, eos_id is None
        if eos_id is not None:
            settings.set_eos_token_id(eos_id)
        return [int(token) for token in pipeline.generate(openvino.Tensor(numpy.array([ids])), settings).tokens[0]]

    return ask


def _convert_for_onnxruntime(folder: str, out: str, weights: str) -> None:
    bits = {"float32": "fp32"}.get(weights, weights)
    _run("onnxruntime_genai.models.builder", "-i", folder, "-o", out, "-p", bits, "-e", "cpu")


def _load_onnxruntime(out: str, weights: str, threads: int) -> Ask:
    import onnxruntime_genai

    config: Any = onnxruntime_genai.Config(out)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model: Any = onnxruntime_genai.Model(config)

    def ask(ids: list[int], num_tokens: int, eos_id: int | None) -> list[int]:
        params = onnxruntime_genai.GeneratorParams(model)
        length = len(ids) + num_tokens
        params.set_search_options(max_length=length, min_length=length if eos_id is None else 0, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        answer: list[int] = []
        while len(answer) < num_tokens and (not answer or answer[-1] != eos_id):
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        return answer

    return ask


Load = Callable[[str, str, int], Ask]
Convert = Callable[[str, str, str], None]

ENGINES: dict[str, tuple[Load, Convert | None]] = {
    "transformers": (_load_transformers, None),
    "CTranslate2": (_load_ctranslate2, _convert_for_ctranslate2),
    "llama.cpp": (_load_llama_cpp, _convert_for_llama_cpp),
    "OpenVINO": (_load_openvino, _convert_for_openvino),
    "ONNX Runtime": (_load_onnxruntime, _convert_for_onnxruntime),
}
"""By an engine's name: how it is loaded, and how an export is converted for it, where it has to be."""

if __name__ == "__main__":
    main()
