"""The cost that looking up memory rows adds to the input embedding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import repeated, spread
from benchmarks.models import attach_rim, build_base, lora_rank, random_prompts
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Measured, Row, below
from rim_peft.tuner.config import active_config

_CALLS = 50
"""Embedding calls per sample: a single one is shorter than the clock's noise."""


@benchmark("embedding", "the memory rows' look-up against the plain input embedding, as a share of a forward pass")
def run(settings: Settings) -> Iterator[Row]:
    """Time the tuner's input embedding and the base's own on the same prompt and blocks.

    The base's own gets ids of its vocabulary instead of memory ids, which it does not know.
    """
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    model = attach_rim(build_base(base, settings), rank=lora_rank(settings)).eval()
    memory, blocks = model.base_model.memory, active_config(model).block_tokens
    for batch, prompt in settings.choose(quick=[(1, 16)], cpu=[(1, 128), (8, 128)], cuda=[(1, 128), (32, 512)]):
        settings.tell(f"{base}, batch={batch} n={prompt}")
        prompts = random_prompts(model, batch=batch, length=prompt)
        ids = torch.cat([prompts, torch.tensor(blocks.ids(8), device=prompts.device).expand(batch, -1)], dim=1)
        known = ids.masked_fill(ids >= memory.first_memory_id, 0)
        with torch.no_grad():
            samples = settings.time(
                {
                    "memory": repeated(partial(memory, ids), _CALLS),
                    "plain": repeated(partial(memory.base_layer, known), _CALLS),
                    "forward": partial(model, input_ids=ids, use_cache=False),
                }
            )
        rounds = list(zip(samples["memory"], samples["plain"], samples["forward"], strict=True))
        forward = Measured.milliseconds("forward", samples["forward"]).spread.median
        yield Row(
            benchmark="embedding",
            case={"base": base, "batch": batch, "n": prompt, "K": 8},
            ways=(
                Measured.milliseconds("with memory rows", [sample / _CALLS for sample in samples["memory"]]),
                Measured.milliseconds("plain", [sample / _CALLS for sample in samples["plain"]]),
            ),
            figure=spread([100 * (ours - plain) / _CALLS / whole for ours, plain, whole in rounds]),
            figure_name="extra, % of a forward",
            bound=0.0,
            bound_text="0: no operation of a matrix is added",
            target=below(1.0, "under 1 % of a forward pass"),
            num_rounds=len(rounds),
            note=f"a forward pass takes {forward:.1f} ms",
        )
