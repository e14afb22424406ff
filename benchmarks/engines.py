"""An answer on the engines of small machines, by type of weights: after blocks, directly, after a written chain.

Engines are transformers, CTranslate2 and llama.cpp, as far as they are installed (llama.cpp also needs ``LLAMA_CPP``,
the folder with its converter), and OpenVINO and ONNX Runtime in the environment whose Python ``RUNTIMES_PYTHON`` names.
Each runs in a process of its own, with as many threads as there are cores, which ``taskset`` can limit.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.measure import ratio, spread
from benchmarks.registry import BenchmarkError, Settings, benchmark
from benchmarks.report import Measured, Row
from rim_peft.demo import SHIPPED
from rim_peft.export.checking import LEAST_PROMPTS
from rim_peft.export.folder import ExportOptions
from rim_peft.run import export

_RUNNER = Path(__file__).with_name("engine_runner.py")
_HERE = {
    "transformers": ("float32", "bfloat16"),
    "CTranslate2": ("float32", "int8"),
    "llama.cpp": ("float32", "Q8_0", "Q4_K_M"),
}
_ELSEWHERE = {"OpenVINO": ("float32", "int8", "int4"), "ONNX Runtime": ("float32", "int4")}


@dataclass(frozen=True)
class Engine:
    """An engine with a type of weights, in an environment.

    Attributes:
        name: one that the runner knows.
        weights: type of the weights, as the engine's own tools call it.
        python: Python of the environment that has the engine.
    """

    name: str
    weights: str
    python: str = sys.executable

    def out(self, folder: Path) -> Path:
        """Return where the engine's own file or folder of an export is, beside it; transformers reads the export."""
        if self.name == "transformers":
            return folder
        return folder.with_name(f"{folder.name}-{self.name.replace(' ', '')}-{self.weights}")

    def run(self, folder: Path, *, threads: int = 1, **job: Any) -> Any:
        """Run a job as the runner describes it, after converting the export if that was not done.

        Raises:
            RuntimeError: the engine failed; the message has the end of what it said.
        """
        asked = {"engine": self.name, "weights": self.weights, "folder": str(folder), "out": str(self.out(folder))}
        done = subprocess.run(  # noqa: S603 - this package's own script, by a Python that the user names
            [self.python, "-c", _RUNNER.read_text(encoding="utf-8")],  # by its path, this folder's modules come first
            input=json.dumps({**asked, "threads": threads, **job}),
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{self.name}, {self.weights}: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def megabytes(self, folder: Path) -> float:
        """Return the size of a converted export's files, in 10^6 bytes, with a tokenizer where they have one."""
        path = self.out(folder).resolve()
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files) / 1e6


def find_engines() -> Iterator[Engine]:
    """Yield the engines that are there, with each type of weights."""
    modules = {"transformers": "transformers", "CTranslate2": "ctranslate2", "llama.cpp": "llama_cpp"}
    for name, types in _HERE.items():
        if find_spec(modules[name]) and (name != "llama.cpp" or os.environ.get("LLAMA_CPP")):
            yield from (Engine(name, weights) for weights in types)
    if python := os.environ.get("RUNTIMES_PYTHON"):
        for name, types in _ELSEWHERE.items():
            yield from (Engine(name, weights, python) for weights in types)


@benchmark("engines", "an answer on each engine and type of weights: RiM against direct answers and written chains")
def run(settings: Settings) -> Iterator[Row]:
    """Export the adapter that ships, and time it on each engine that is there."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        questions = [f"What is {number} plus {number + 1}?" for number in range(LEAST_PROMPTS)]
        options = ExportOptions(append_to="none", max_differing=LEAST_PROMPTS)  # speed is what is asked here
        try:
            export(str(SHIPPED), folder, options=options, questions=questions, max_new_tokens=1)
        except OSError as error:
            raise BenchmarkError(f"the base cannot be fetched: {error}") from error
        sizes = {
            "n": settings.choose(quick=4, cpu=96, cuda=96),
            "answer": 2,
            "chain": settings.choose(quick=4, cpu=40, cuda=40),
        }
        ways = make_ways(folder, sizes)
        sizes["K·B"] = len(ways["RiM"][0]) - sizes["n"]
        threads = settings.choose(quick=1, cpu=_num_cores(), cuda=_num_cores())
        for engine in find_engines():
            settings.tell(f"{engine.name}, {engine.weights}: is converted")
            engine.run(folder)
            settings.tell(f"{engine.name}, {engine.weights}, threads={threads}")
            most_seconds = settings.choose(quick=1.0, cpu=10.0, cuda=10.0)
            timed = engine.run(folder, threads=threads, ways=ways, rounds=settings.rounds, most_seconds=most_seconds)
            case = {"engine": engine.name, "weights": engine.weights, "threads": threads, **sizes}
            yield from _rows(case, timed, megabytes=engine.megabytes(folder))


def _num_cores() -> int:
    """Return how many cores this process may use; ``taskset`` says which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_ways(folder: Path, sizes: dict[str, int]) -> dict[str, tuple[list[int], int]]:
    """Return what an engine is asked, by name: token ids, and how many tokens it writes.

    A prompt of random ids: speed does not depend on what it says. The answers' last token is the end of the text.
    """
    record = json.loads((folder / "rim_export.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    blocks = tokenizer(record["block_text"], add_special_tokens=False)["input_ids"]
    size = tokenizer.vocab_size
    ids = [index for index in range(size // 4, size // 2) if index not in blocks]
    prompt = random.Random(0).choices(ids, k=sizes["n"])
    return {
        "RiM": ([*prompt, *blocks], sizes["answer"]),
        "direct": (prompt, sizes["answer"]),
        "written chain": (prompt, sizes["chain"] + sizes["answer"]),
        "RiM, first token": ([*prompt, *blocks], 1),
        "direct, first token": (prompt, 1),
    }


def _rows(case: dict[str, Any], timed: dict[str, Any], *, megabytes: float) -> Iterator[Row]:
    seconds, cpu = timed["seconds"], timed["cpu_seconds"]
    n, blocks, answer, chain = (case[name] for name in ("n", "K·B", "answer", "chain"))
    peak = "unknown" if timed["memory"] is None else f"{timed['memory'] / 1e6:.0f} MB"
    note = f"{megabytes:.0f} MB of files; the process's peak: {peak}"
    direct = (f"{n + blocks} tokens of prompt and blocks against {n}", (n + blocks) / n)
    written = (
        f"{n + blocks} tokens read and {answer} written, against {n} and {chain + answer}",
        (n + chain + answer - 1) / (n + blocks + answer - 1),
    )
    names = ("RiM, first token", "direct, first token")
    yield _row({**case, "measure": "first token"}, seconds, names, bound=direct, note=note)
    for measure, samples in (("whole answer", seconds), ("CPU time", cpu)):
        yield _row({**case, "measure": measure}, samples, ("RiM", "written chain"), bound=written)


def _row(
    case: dict[str, Any],
    samples: dict[str, Sequence[float]],
    names: tuple[str, str],
    *,
    bound: tuple[str, float],
    note: str = "",
) -> Row:
    """Return the row of two ways: RiM over the direct answer, or the written chain over RiM."""
    ours, theirs = (samples[name] for name in names)
    is_first = case["measure"] == "first token"
    other = names[1].split(",")[0]
    return Row(
        benchmark="engines",
        case=case,
        ways=(
            Measured("RiM", spread([1000 * value for value in ours]), "ms"),
            Measured(other, spread([1000 * value for value in theirs]), "ms"),
        ),
        figure=ratio(ours, theirs) if is_first else ratio(theirs, ours),
        figure_name="RiM / direct" if is_first else "written chain / RiM",
        bound=bound[1],
        bound_text=f"tokens through the layers: {bound[0]}",
        num_rounds=len(ours),
        note=note,
    )
