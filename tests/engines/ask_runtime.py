"""Convert an export for OpenVINO or ONNX Runtime and ask it, in their environment; nothing imports this file.

A job is read as JSON from stdin: ``engine``, ``weights`` (their type), ``folder`` (the export), ``out`` (the converted
model), ``prompts`` (token ids, blocks included), ``eos_id`` and ``max_new_tokens``. Stdout gets the tokens of each
answer.
"""

import contextlib
import json
import subprocess
import sys
from typing import Any


def main() -> None:
    job = json.load(sys.stdin)
    ask = {"OpenVINO": ask_openvino, "ONNX Runtime": ask_onnxruntime}[job["engine"]]
    with contextlib.redirect_stdout(sys.stderr):
        answers = ask(**{name: value for name, value in job.items() if name != "engine"})
    json.dump(answers, sys.stdout)


def ask_openvino(
    weights: str, folder: str, out: str, prompts: list[list[int]], eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    import numpy
    import openvino
    import openvino_genai

    bits = {"float32": "fp32"}.get(weights, weights)
    command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", folder]
    command += ["--task", "text-generation-with-past", "--weight-format", bits]
    command += ["--group-size", "64"] if weights == "int4" else []  # by default 128, which does not divide 576
    command.append(out)
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    # By default it computes in 16 bits and keeps 8 bits of each key, where the machine can.
    precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if weights == "float32" else {}
    pipeline: Any = openvino_genai.LLMPipeline(out, "CPU", precise)
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens, settings.eos_token_id, settings.do_sample = max_new_tokens, eos_id, False
    settings.set_eos_token_id(eos_id)
    return [
        [int(token) for token in pipeline.generate(openvino.Tensor(numpy.array([ids])), settings).tokens[0]]
        for ids in prompts
    ]


def ask_onnxruntime(
    weights: str, folder: str, out: str, prompts: list[list[int]], eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    import onnxruntime_genai

    bits = {"float32": "fp32"}.get(weights, weights)
    command = ["-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", out, "-p", bits, "-e", "cpu"]
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    model: Any = onnxruntime_genai.Model(out)
    answers = []
    for ids in prompts:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + max_new_tokens, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        answer: list[int] = []
        while len(answer) < max_new_tokens and (not answer or answer[-1] != eos_id):
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        answers.append(answer)
    return answers


if __name__ == "__main__":
    main()
