"""What quantised bases save and cost in a training step."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from benchmarks.measure import Spread, peak_memory, ratio, tensor_bytes
from benchmarks.models import attach_rim, build_base, lora_rank
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row
from benchmarks.steps import RowSizes, TrainingStep, readout_step

NUM_BLOCKS = 8
_MIB = 2**20


@benchmark("qlora", "a training step on nf4 and int8 bases against one in full precision: memory and time")
def run(settings: Settings) -> Iterator[Row]:
    """Compare whole steps of stage 2 on the same base, with checkpointing as in the recipes."""
    if find_spec("bitsandbytes") is None:
        settings.tell("skipped: bitsandbytes is not installed")
        return
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    full = settings.choose(quick="fp32", cpu="fp32", cuda="bf16")
    sizes = settings.choose(
        quick=RowSizes(batch=1, prompt=16), cpu=RowSizes(batch=4, prompt=100), cuda=RowSizes(batch=32, prompt=100)
    )
    steps: dict[str, TrainingStep] = {}
    peaks: dict[str, int] = {}
    for weights in (full, "nf4", "int8"):
        settings.tell(f"{base}, {weights}")
        model = attach_rim(build_base(base, settings, weights=weights), rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
        step = readout_step(model, "stage 2", sizes, checkpointing=True)
        step()  # allocates what persists
        steps[weights] = step
        peaks[weights] = tensor_bytes(step.held_tensors()) + peak_memory(step, device=settings.device)
    samples = settings.time(dict(steps))
    for weights in ("nf4", "int8"):
        case = {"base": base, "weights": weights, "tokens": steps[weights].tokens}
        share, held = peaks[weights] / peaks[full], _base_bytes(steps[weights]) / _base_bytes(steps[full])
        yield Row(
            benchmark="qlora",
            case=case,
            ways=(_peak(weights, peaks[weights]), _peak(full, peaks[full])),
            figure=Spread(share, share, share),
            figure_name=f"peak, {weights} / {full}",
            bound=held,
            bound_text="the base's own bytes, as if a step needed nothing else",
        )
        yield Row(
            benchmark="qlora",
            case=case,
            ways=(Measured.milliseconds(weights, samples[weights]), Measured.milliseconds(full, samples[full])),
            figure=ratio(samples[weights], samples[full]),
            figure_name=f"time, {weights} / {full}",
            bound=1.0,
            bound_text="as if reading quantised weights cost nothing",
            num_rounds=len(samples[full]),
        )


def _peak(name: str, size: int) -> Measured:
    return Measured(name, Spread(size / _MIB, size / _MIB, size / _MIB), "MiB")


def _base_bytes(step: TrainingStep) -> int:
    return tensor_bytes(parameter for parameter in step.model.parameters() if not parameter.requires_grad)
