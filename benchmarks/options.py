"""The options shared by ``python -m benchmarks`` and ``rim-peft bench``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ServingOptions:
    """Options of the benchmark ``serving``; None is the run's own size.

    Attributes:
        vllm_python: Python of vLLM's environment.
        adapter: folder of an export of the format embedding-lora or peft-lora.
        num_clients: numbers of clients, one case each.
        num_requests: requests of each way in a round; at least one for each client.
        prompt_tokens: tokens of a prompt, without blocks.
        answer_tokens: tokens of an answer.
        chain_tokens: tokens of a written chain; 0 is until EOS.
    """

    vllm_python: str | None = None
    adapter: str | None = None
    num_clients: tuple[int, ...] | None = None
    num_requests: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    chain_tokens: int | None = None


def read_serving(args: argparse.Namespace) -> ServingOptions:
    """Return the options of the benchmark ``serving``."""
    return ServingOptions(**{field.name: getattr(args, field.name) for field in fields(ServingOptions)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="benchmarks to run (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and exit")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cpu: sizes for two cores; cuda: real sizes on one GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="smallest sizes, two rounds, to see whether everything runs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--save", metavar="FILE", help="also write the JSON document to a file")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead, print the five largest costs of a training step and of an answer",
    )
    _add_serving(parser.add_argument_group("serving", "options of the benchmark of that name, which starts vLLM"))


def _add_serving(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--vllm-python",
        metavar="PYTHON",
        help="Python of an environment with vLLM and rim-peft's plugin (default: VLLM_PYTHON, or what "
        "make test-engines has made)",
    )
    group.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="export of the format embedding-lora or peft-lora (default: an untrained one on SmolLM2-135M, since speed "
        "does not depend on what was learned)",
    )
    group.add_argument(
        "--clients",
        dest="num_clients",
        type=_numbers,
        metavar="N,N,...",
        help="numbers of clients (default: 1,8,32,128)",
    )
    group.add_argument(
        "--num-requests", type=_number, metavar="N", help="least number of requests of each way in a round"
    )
    group.add_argument("--prompt-tokens", type=_number, metavar="N", help="tokens of a prompt (default: 64)")
    group.add_argument("--answer-tokens", type=_number, metavar="N", help="tokens of every answer (default: 8)")
    group.add_argument(
        "--chain-tokens",
        type=lambda text: 0 if text == "eos" else _number(text),
        metavar="N|eos",
        help="tokens that a written chain has before its answer, or eos: whatever it writes (default: 64; cuda: 128)",
    )


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 100000, got {text!r}")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_number(part) for part in text.split(",")))
