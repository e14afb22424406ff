"""Time to an answer: after blocks, directly, after pause tokens, after a chain of thought."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.measure import Way
from benchmarks.models import attach_rim, build_base, lora_rank, random_prompts
from benchmarks.registry import Settings, benchmark
from benchmarks.report import Row, above, at_most
from rim_peft.tuner.bases import CACHE

NUM_BLOCKS = 8
MEMORY_TOKENS = NUM_BLOCKS * 4
STEP_TOKENS = 27
"""Tokens of a chain of thought before the answer; the paper's factor between CoT and RiM."""

ANSWER_TOKENS = 2


@benchmark("first_token", "time to the answer's first token: RiM against answering directly and against CoT")
def run_first_token(settings: Settings) -> Iterator[Row]:
    """Time ``generate`` to the first token; the same LoRA is active in every way."""
    for name in settings.choose(quick=["tiny"], cpu=["small"], cuda=["gpt2-124m", "llama-3.2-1b", "llama-3.2-3b"]):
        model = _answering(name, settings)
        for batch in settings.choose(quick=[1], cpu=[1, 8, 32], cuda=[1, 8, 32]):
            for prompt in settings.choose(quick=[16], cpu=[32, 128, 512], cuda=[32, 128, 512]):
                settings.tell(f"{name}, batch={batch} n={prompt}")
                prompts = random_prompts(model, batch=batch, length=prompt)
                samples = settings.time(
                    {
                        "RiM": generate(model, prompts, NUM_BLOCKS, tokens=1),
                        "direct": generate(model, prompts, 0, tokens=1),
                        "CoT": generate(model, prompts, 0, tokens=STEP_TOKENS + 1),
                    }
                )
                case = {"base": name, "batch": batch, "n": prompt}
                yield Row.of_times(
                    "first_token",
                    case,
                    samples,
                    ("RiM", "direct"),
                    is_cost=True,
                    bound=(prompt + MEMORY_TOKENS) / prompt,
                    bound_text="prompt and memory tokens / prompt tokens, (n + K·B) / n with K·B = 32",
                    target=at_most(1.1),
                )
                yield Row.of_times(
                    "first_token",
                    case,
                    samples,
                    ("RiM", "CoT"),
                    bound=STEP_TOKENS + 1,
                    bound_text=f"forward passes, {STEP_TOKENS + 1} / 1; CoT's are shorter, of one token each",
                )


@benchmark("full_answer", "time of a whole answer: RiM against CoT and against as many pause tokens")
def run_full_answer(settings: Settings) -> Iterator[Row]:
    """Time ``generate`` to the end of the answer; pause tokens are ordinary ids after the prompt, without insertion."""
    for name in settings.choose(quick=["tiny"], cpu=["small"], cuda=["gpt2-124m", "llama-3.2-1b", "llama-3.2-3b"]):
        model = _answering(name, settings)
        cases = settings.choose(quick=[(1, 16)], cpu=[(1, 32), (1, 64), (8, 64)], cuda=[(1, 64), (8, 64), (32, 64)])
        for batch, prompt in cases:
            settings.tell(f"{name}, batch={batch} n={prompt}")
            prompts = random_prompts(model, batch=batch, length=prompt)
            paused = random_prompts(model, batch=batch, length=prompt + MEMORY_TOKENS)
            samples = settings.time(
                {
                    "RiM": generate(model, prompts, NUM_BLOCKS, tokens=ANSWER_TOKENS),
                    "CoT": generate(model, prompts, 0, tokens=STEP_TOKENS + ANSWER_TOKENS),
                    "pause": generate(model, paused, 0, tokens=ANSWER_TOKENS),
                    "prompt": _forward(model, prompts),
                    "trunk": _forward(model, paused),
                    "token": _forward(model, prompts[:, :1], DynamicCache()),
                }
            )
            case = {"base": name, "batch": batch, "n": prompt, "answer": ANSWER_TOKENS}
            prompt_pass, trunk_pass, token_pass = (median(samples[name]) for name in ("prompt", "trunk", "token"))
            later = ANSWER_TOKENS - 1  # the pass over the prompt or trunk gives the first token
            yield Row.of_times(
                "full_answer",
                case,
                samples,
                ("RiM", "CoT"),
                bound=(prompt_pass + (STEP_TOKENS + later) * token_pass) / (trunk_pass + later * token_pass),
                bound_text="bare forward passes in the same rounds: the prompt's and 28 of one token, against the "
                "trunk's and one of one token",
                # The target is for a single question: a larger batch makes better use of a one-token pass.
                target=above(8.0, "at least 8 times faster") if batch == 1 else None,
                note=f"a pass over the trunk takes as long as {trunk_pass / token_pass:.1f} of one token",
            )
            yield Row.of_times(
                "full_answer",
                case,
                samples,
                ("RiM", "pause"),
                is_cost=True,
                bound=1.0,
                bound_text="the same number of tokens in the same number of passes",
                target=at_most(1.1),
            )


def _answering(name: str, settings: Settings) -> Any:
    model = attach_rim(build_base(name, settings), rank=lora_rank(settings), num_blocks=NUM_BLOCKS)
    return model.eval()


def _forward(model: Any, ids: torch.Tensor, cache: DynamicCache | None = None) -> Way:
    """Return a bare forward pass; with a cache, after the tokens that the first call leaves in it."""

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=cache is not None, logits_to_keep=1, **{CACHE: cache})

    return run


def generate(model: Any, prompts: torch.Tensor, num_blocks: int, *, tokens: int) -> Way:
    """Return a call of ``generate`` for this many tokens; with ``num_blocks=0`` it answers directly."""
    mask = torch.ones_like(prompts)
    return partial(
        model.generate,
        input_ids=prompts,
        attention_mask=mask,
        num_blocks=num_blocks,
        max_new_tokens=tokens,
        do_sample=False,
    )
