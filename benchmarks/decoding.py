"""Time answers after the last block, after every block side by side, and after every block one `generate` at a time.

On a random Llama, since time does not depend on what weights say: a small one, or with `--shape llama-3.2-1b` that
model's sizes. Each way is run in turn, so that other work on the machine slows all of them alike; medians are printed.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --shape llama-3.2-1b --device cuda --dtype bfloat16 --prompt-tokens 100 --compiled
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rim_peft import RiMConfig
from rim_peft.inference import BlockDecoder

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 32000,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}


def build_model(arguments: argparse.Namespace) -> PeftModel:
    """A random Llama with an adapter that does nothing yet, which takes as long as one that does."""
    with torch.device(arguments.device):
        base = LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape], max_position_embeddings=4096))
    base = base.to(getattr(torch, arguments.dtype)).eval()
    config = RiMConfig(num_blocks=arguments.num_blocks, r=arguments.rank)
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    if arguments.merged:
        model.merge_adapter()
    return model.eval()


def make_ways(model: PeftModel, prompts: torch.Tensor, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return by name what is timed; all read the same (B, n) prompts."""
    tokens, rows = arguments.answer_tokens, prompts.tolist()

    def decode(most: int, **options: Any) -> Callable[[], Any]:
        decoder = BlockDecoder(model, eos_id=None, pad_id=0, max_new_tokens=most, batch_size=len(rows), **options)
        return lambda: decoder(rows)

    def generate(num_blocks: int) -> Any:
        options: Any = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        mask = torch.ones_like(prompts)
        return model.generate(input_ids=prompts, attention_mask=mask, num_blocks=num_blocks, **options)

    counts = range(1, arguments.num_blocks + 1)
    ways: dict[str, Callable[[], Any]] = {
        "first token": decode(1),
        "last block": decode(tokens),
        "every block": decode(tokens, every_block=True),
        "last block, generate": lambda: generate(arguments.num_blocks),
        "every block, generate each": lambda: [generate(count) for count in counts],
    }
    if arguments.compiled:
        ways["first token, compiled"] = decode(1, compiled=True)
        ways["last block, compiled"] = decode(tokens, compiled=True)
        ways["every block, compiled"] = decode(tokens, every_block=True, compiled=True)
    return ways


def measure_ms(ways: dict[str, Callable[[], Any]], *, repeats: int, warm_up: int = 3) -> dict[str, float]:
    """Median time of each way; a decoder's result lies on the CPU, so that its work on a device is done."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(warm_up + repeats):
        for name, run in ways.items():
            _synchronize()
            started = time.perf_counter()
            run()
            _synchronize()
            if repeat >= warm_up:
                taken[name].append(1000 * (time.perf_counter() - started))
    return {name: median(times) for name, times in taken.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--num-blocks", type=int, default=8)
    parser.add_argument("--answer-tokens", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--merged", action="store_true", help="merge LoRA into the base first")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compiled", action="store_true", help="time compiled passes too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(arguments)
    for batch_size in arguments.batch_sizes:
        prompts = torch.randint(10, 1000, (batch_size, arguments.prompt_tokens), device=arguments.device)
        found = measure_ms(make_ways(model, prompts, arguments), repeats=arguments.repeats)
        for name, time_ms in found.items():
            print(f"batch {batch_size:3}  {name:28} {time_ms:9.2f} ms  {time_ms / found['last block']:6.2f}")


if __name__ == "__main__":
    main()
