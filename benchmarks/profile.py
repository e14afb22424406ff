"""``--profile``: the five largest costs of a training step and of an answer, to show where to look."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.answering import NUM_BLOCKS, generate
from benchmarks.measure import Way
from benchmarks.models import attach_rim, build_base, lora_rank, random_prompts
from benchmarks.registry import Settings
from benchmarks.steps import RowSizes, readout_step

NUM_COSTS = 5
NUM_RUNS = 3


def find_costs(settings: Settings) -> str:
    """Profile a step of stage 2 and an answer, and return their costs as text."""
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    sizes = settings.choose(
        quick=RowSizes(batch=1, prompt=16), cpu=RowSizes(batch=4, prompt=128), cuda=RowSizes(batch=16, prompt=128)
    )
    settings.tell(f"{base}: a training step, then an answer")
    model = attach_rim(build_base(base, settings), rank=lora_rank(settings))
    step = readout_step(model, "stage 2", sizes)
    title = f"training step of stage 2: {base}, {step.tokens} tokens in {sizes.batch} rows"
    parts = [costs(step, title=title, device=settings.device)]
    model.eval()
    answer = generate(model, random_prompts(model, batch=1, length=100), NUM_BLOCKS, tokens=2)
    parts.append(costs(answer, title=f"answer of two tokens: {base}, prompt of 100 tokens", device=settings.device))
    return "\n\n".join(parts)


def costs(way: Way, *, title: str, device: str) -> str:
    """Return the operators with the most time of their own, with their share of the whole."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    way()
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(NUM_RUNS):
            way()
        if device == "cuda":
            torch.cuda.synchronize()
    events = [event for event in profiler.key_averages(group_by_input_shape=True) if _self_us(event, device) > 0]
    total = sum(_self_us(event, device) for event in events)
    merged: dict[str, list[float]] = {}
    for event in events:
        entry = merged.setdefault(event.key, [0.0, 0.0])
        entry[0] += _self_us(event, device)
        entry[1] += event.count
    lines = [f"{title} ({total / NUM_RUNS / 1000:.1f} ms of operators)"]
    for name, (microseconds, count) in sorted(merged.items(), key=lambda item: -item[1][0])[:NUM_COSTS]:
        largest = max((event for event in events if event.key == name), key=lambda event: _self_us(event, device))
        lines.append(
            f"  {microseconds / total:6.1%}  {microseconds / NUM_RUNS / 1000:8.2f} ms  {count / NUM_RUNS:6.0f} calls  "
            f"{name}, most on {_shapes(largest)}"
        )
    phases = [
        (event.key, event.cpu_time_total) for event in profiler.key_averages() if event.key.startswith("rim_peft.")
    ]
    lines.extend(f"  {name}: {us / NUM_RUNS / 1000:.2f} ms on the host" for name, us in phases)
    return "\n".join(lines)


def _self_us(event: Any, device: str) -> float:
    return float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)


def _shapes(event: Any) -> str:
    return " × ".join(str(shape) for shape in event.input_shapes if shape) or "no tensors"
