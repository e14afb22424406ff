"""Decoders: the answers of all blocks side by side, and compiled passes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.answering import generate
from benchmarks.measure import Way
from benchmarks.models import attach_rim, build_base, lora_rank, random_prompts
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Row, above, below
from rim_peft.inference import BlockDecoder

NUM_BLOCKS, BLOCK_LENGTH, ANSWER_TOKENS = 8, 4, 4


@benchmark("all_readouts", "the answers of all K blocks against the last block's alone, and against K generations")
def run_all_readouts(settings: Settings) -> Iterator[Row]:
    """Decode four tokens of every answer; each equals the output of ``generate(num_blocks=k)``."""
    base = settings.choose(quick="tiny", cpu="small", cuda="llama-3.2-1b")
    prompt = settings.choose(quick=16, cpu=64, cuda=128)
    model = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=NUM_BLOCKS).eval()
    for batch in settings.choose(quick=[1], cpu=[1, 8], cuda=[1, 8, 32]):
        settings.tell(f"{base}, batch={batch} n={prompt}")
        prompts = random_prompts(model, batch=batch, length=prompt)
        one_by_one = [generate(model, prompts, count, tokens=ANSWER_TOKENS) for count in range(1, NUM_BLOCKS + 1)]
        ways: dict[str, Way] = {
            "all blocks": _decoder(model, prompts, every_block=True),
            "last block": _decoder(model, prompts),
            "one by one": partial(_each, one_by_one),
        }
        samples = settings.time(ways)
        case = {"base": base, "batch": batch, "n": prompt, "K": NUM_BLOCKS, "answer": ANSWER_TOKENS}
        later = ANSWER_TOKENS - 1  # the trunk's pass gives the first token
        trunk = prompt + NUM_BLOCKS * BLOCK_LENGTH
        side_by_side, alone = trunk + NUM_BLOCKS * later, trunk + later
        each = sum(prompt + block * BLOCK_LENGTH + later for block in range(1, NUM_BLOCKS + 1))
        most = 1.3 if settings.device == "cuda" else 2.0
        yield Row.of_times(
            "all_readouts",
            case,
            samples,
            ("all blocks", "last block"),
            is_cost=True,
            bound=side_by_side / alone,
            bound_text="tokens of all passes, of which there are as many; a pass of 8 tokens costs more than of one",
            target=below(most, f"at most {most:g} times the last block's"),
        )
        yield Row.of_times(
            "all_readouts",
            case,
            samples,
            ("all blocks", "one by one"),
            bound=each / side_by_side,
            bound_text="tokens of K generations / tokens side by side",
            target=above(4.0, "at least 4 times faster"),
        )


@benchmark("compiled", "time to the first token with compiled passes, which on a GPU are CUDA graphs")
def run_compiled(settings: Settings) -> Iterator[Row]:
    """Time a compiled decoder against an uncompiled one, and against answering directly, also compiled."""
    if settings.device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        settings.tell("skipped: torch compiles for a CPU with a C++ compiler, and finds none")
        return
    for base in settings.choose(quick=["tiny"], cpu=["small"], cuda=["gpt2-124m", "llama-3.2-1b", "llama-3.2-3b"]):
        settings.tell(f"{base}, n=100, compiling")
        model = attach_rim(build_base(base, settings), rank=lora_rank(settings), num_blocks=NUM_BLOCKS).eval()
        model.merge_adapter()  # as for the lowest latency
        prompts = random_prompts(model, batch=1, length=100)
        ways = {
            "compiled": _decoder(model, prompts, tokens=1, compiled=True),
            "direct": _decoder(model, prompts, tokens=1, compiled=True, num_blocks=0),
            "as it comes": _decoder(model, prompts, tokens=1),
        }
        samples = settings.time(ways)
        case = {"base": base, "batch": 1, "n": 100, "K": NUM_BLOCKS, "LoRA": "merged"}
        is_goal = base == "llama-3.2-1b"
        yield Row.of_times(
            "compiled",
            case,
            samples,
            ("compiled", "as it comes"),
            bound=1.0,
            bound_text="the same operations; what is saved is Python, and reads and writes between operations",
            note="goal on an H200 at a prompt of 100 tokens: 4 ms or less" if is_goal else "",
        )
        yield Row.of_times(
            "compiled",
            case,
            samples,
            ("compiled", "direct"),
            is_cost=True,
            bound=(128 + NUM_BLOCKS * BLOCK_LENGTH) / 128,
            bound_text="tokens of the passes, whose prompts are padded to 128",
            target=below(1.05, "within 5 % of answering directly") if settings.device == "cuda" else None,
        )


def _decoder(model: Any, prompts: Tensor, *, tokens: int = ANSWER_TOKENS, **options: Any) -> Way:
    decoder = BlockDecoder(model, eos_id=None, pad_id=0, max_new_tokens=tokens, batch_size=len(prompts), **options)
    return partial(decoder, prompts.tolist())


def _each(ways: list[Way]) -> None:
    for way in ways:
        way()
