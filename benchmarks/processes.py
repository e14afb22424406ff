"""The cost of a second process per step: gradients are averaged, and there should be no other waiting.

The benchmark starts itself as ``python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.processes``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import ratio
from benchmarks.models import attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, at_most
from benchmarks.steps import RowSizes, random_rows, steps_on_batches

NUM_PROCESSES = 2
_CLONE = Path(__file__).parents[1]


@benchmark("processes", "stage 2's step in two processes (DDP) against one process, each on a thread of its own")
def run(settings: Settings) -> Iterator[Row]:
    """Start two processes, which take the same steps together and, in turn, the first by itself."""
    settings.tell(f"{NUM_PROCESSES} processes, gloo")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "samples.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(NUM_PROCESSES), "-m", "benchmarks.processes", str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RIM_BENCH_QUICK": str(int(settings.quick))}
        done = subprocess.run(command, cwd=_CLONE, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise RuntimeError(f"processes: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
        found = json.loads(result.read_text())
    samples = found["samples"]
    yield Row(
        benchmark="processes",
        case=found["case"],
        ways=(
            Measured.milliseconds("two processes", samples["two processes"]),
            Measured.milliseconds("one", samples["one"]),
        ),
        figure=ratio(samples["two processes"], samples["one"]),
        figure_name="two / one",
        bound=1.0,
        bound_text="each process has as many tokens as the one alone",
        target=at_most(1.2),
        num_rounds=len(samples["one"]),
        note="twice the samples in each step; on a shared machine the two cores are rarely equally fast",
    )


def worker(result: Path) -> None:
    """Time both ways in every process; the first one writes its samples."""
    import time

    import torch.distributed as dist

    settings = Settings(quick=os.environ["RIM_BENCH_QUICK"] == "1")
    base, batch = settings.choose(quick="tiny", cpu="small", cuda="small"), settings.choose(quick=1, cpu=2, cuda=2)
    sizes = RowSizes(batch=batch * NUM_PROCESSES, prompt=settings.choose(quick=8, cpu=128, cuda=128))
    model = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=8)
    rows = random_rows(model, sizes)
    (step,) = steps_on_batches(model, "stage 2", rows, batch=batch)
    rank, samples = dist.get_rank(), {"two processes": [], "one": []}  # type: ignore[var-annotated]
    for number in range(settings.rounds + 1):
        dist.barrier()
        started = time.perf_counter()
        step.forward_and_backward()
        together = time.perf_counter() - started
        dist.barrier()
        started = time.perf_counter()
        if rank == 0:
            step.alone()
        alone = time.perf_counter() - started
        if number:  # the first round warms up
            samples["two processes"].append(together)
            samples["one"].append(alone)
    if rank == 0:
        case = {"base": base, "n": sizes.prompt, "K": 8, "batch": batch, "tokens": step.tokens}
        result.write_text(json.dumps({"case": case, "samples": samples}), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
