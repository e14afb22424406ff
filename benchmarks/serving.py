"""One vLLM server under load: answers after blocks, direct answers and written chains, from the same adapter.

The ways take turns in each round, with the same prompts. Only what a request asks for differs: blocks or none, and how
many tokens are written. The server's cache of prefixes is off: it would spare the second way the first one's prompts.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.load import Load, describe_errors, percentile, send_load
from benchmarks.measure import interleave, ratio, spread
from benchmarks.models import attach_rim, lora_rank
from benchmarks.registry import BenchmarkError, Settings, benchmark
from benchmarks.report import Measured, Row
from benchmarks.vllm_server import VllmServer, find_python
from rim_peft.data.examples import Templates
from rim_peft.export.checking import LEAST_PROMPTS
from rim_peft.export.embedding_lora import RANKS, export_embedding_lora
from rim_peft.export.folder import ExportOptions, Prompts
from rim_peft.run.named_bases import find_base
from rim_peft_vllm import Blocks, find_blocks

BASE = "smollm2-135m"
NUM_BLOCKS = 8
MOST_CHAIN_TOKENS = 512
"""Tokens of a chain that is written until EOS, at most."""

WAYS = ("RiM", "direct", "written chain")
_NAME = "adapter"

MEASURES: dict[str, tuple[str, Callable[[Load], float]]] = {
    "requests": ("1/s", lambda load: len(load.answers) / load.seconds),
    "first token, p50": ("ms", lambda load: 1000 * percentile([answer.first for answer in load.answers], 0.5)),
    "first token, p95": ("ms", lambda load: 1000 * percentile([answer.first for answer in load.answers], 0.95)),
    "end, p50": ("ms", lambda load: 1000 * percentile([answer.end for answer in load.answers], 0.5)),
    "end, p95": ("ms", lambda load: 1000 * percentile([answer.end for answer in load.answers], 0.95)),
}
"""Figures of a load by name: their unit, and how they are counted."""


@benchmark("serving", "one vLLM server under load: RiM against direct answers and written chains (needs vLLM)")
def run(settings: Settings) -> Iterator[Row]:
    """Start a server with an adapter, and ask it with more and more clients."""
    python = find_python(settings.serving.vllm_python)
    if python is None:
        settings.tell("skipped: needs vLLM in an environment of its own; make test-engines makes one, or --vllm-python")
        return
    with tempfile.TemporaryDirectory() as scratch:
        given = settings.serving.adapter
        adapter = Path(given).absolute() if given else make_adapter(Path(scratch) / _NAME, settings)
        sizes = Sizes.of(adapter, settings)
        settings.tell("vLLM starts")
        with VllmServer(python, sizes.server_options(settings), Path(scratch)) as server:
            case = {"engine": f"vLLM {server.version()}", "base": Path(sizes.base).name, **sizes.case()}
            for num_clients in sizes.num_clients:
                settings.tell(f"clients={num_clients}")
                yield from measure(server.port, sizes, num_clients, settings, case=case, check=server.check)


def make_adapter(folder: Path, settings: Settings) -> Path:
    """Export an untrained adapter on a small base, and return its folder.

    Raises:
        BenchmarkError: the base cannot be fetched.
    """
    settings.tell(f"an untrained adapter on {BASE}")
    try:
        base = find_base(BASE)
    except OSError as error:
        raise BenchmarkError(f"{error}. Or name an export (--adapter).") from error
    model = attach_rim(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), rank=lora_rank(settings), num_blocks=NUM_BLOCKS
    )
    questions = [f"What is {number} plus {number + 1}?" for number in range(LEAST_PROMPTS)]
    prompts = Prompts(questions, Templates(), max_new_tokens=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    export_embedding_lora(model.eval(), tokenizer, folder, prompts, ExportOptions(), source="untrained")
    return folder


@dataclass(frozen=True)
class Sizes:
    """What the server loads, and what it is asked.

    Attributes:
        adapter: the export's folder.
        base: folder or Hub id of its base.
        rank: its rank.
        blocks: its blocks.
        vocab_size: rows of the base's embedding.
        num_clients: numbers of clients.
        num_requests: requests of each way in a round, if there are not more clients.
        prompt, answer, chain: tokens of each; a chain of 0 is written until EOS.
    """

    adapter: Path
    base: str
    rank: int
    blocks: Blocks
    vocab_size: int
    num_clients: tuple[int, ...]
    num_requests: int
    prompt: int
    answer: int
    chain: int

    @classmethod
    def of(cls, adapter: Path, settings: Settings) -> Sizes:
        """Read an export, and choose the sizes of a run.

        Raises:
            BenchmarkError: the folder has no blocks that the server's plugin would append.
        """
        try:
            blocks = find_blocks(adapter)
            config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            base, rank = find_base(config["base_model_name_or_path"]), int(config["r"])
            shape = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise BenchmarkError(f"--adapter: {adapter} must be an adapter's export, but is not ({error}).") from error
        if blocks is None:
            raise BenchmarkError(
                f"--adapter: must be an export of the format embedding-lora or peft-lora, got {adapter}. Make one with "
                "rim-peft export --format embedding-lora."
            )
        asked, choose = settings.serving, settings.choose
        return cls(
            adapter,
            base,
            rank,
            blocks,
            shape.vocab_size,
            num_clients=asked.num_clients or choose(quick=(1, 2), cpu=(1, 8, 32, 128), cuda=(1, 8, 32, 128)),
            num_requests=asked.num_requests or choose(quick=2, cpu=8, cuda=256),
            prompt=asked.prompt_tokens or choose(quick=16, cpu=64, cuda=64),
            answer=asked.answer_tokens or choose(quick=2, cpu=8, cuda=8),
            chain=choose(quick=4, cpu=64, cuda=128) if asked.chain_tokens is None else asked.chain_tokens,
        )

    @property
    def num_memory(self) -> int:
        """Tokens of all blocks."""
        return len(self.blocks.after([]))

    def written(self, way: str) -> int:
        """Return how many tokens a way writes, at most."""
        return self.answer + ((self.chain or MOST_CHAIN_TOKENS) if way == "written chain" else 0)

    def case(self) -> dict[str, Any]:
        """Return the sizes for a row."""
        chain = f"{self.chain} tokens" if self.chain else f"until EOS, at most {MOST_CHAIN_TOKENS} tokens"
        return {"n": self.prompt, "K·B": self.num_memory, "answer": self.answer, "chain": chain}

    def server_options(self, settings: Settings) -> list[str]:
        """Return the options of a server that has room for all of it."""
        longest = self.prompt + self.num_memory + max(map(self.written, WAYS))
        rank = next((size for size in RANKS if size >= self.rank), self.rank)
        options = ["--model", self.base, "--served-model-name", "base", "--max-model-len", str(longest)]
        options += ["--dtype", settings.choose(quick="float32", cpu="float32", cuda="bfloat16")]
        options += ["--max-num-seqs", str(max(self.num_clients)), "--no-enable-prefix-caching"]
        options += ["--disable-uvicorn-access-log", "--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
        options += ["--lora-modules", f"{_NAME}={self.adapter}"]
        return options if settings.device == "cuda" else [*options, "--enforce-eager"]

    def requests(self, way: str, num_requests: int, *, seed: int) -> list[dict[str, Any]]:
        """Return a way's requests; the same seed gives all ways the same prompts."""
        rng = random.Random(seed)
        ids = [index for index in range(self.vocab_size // 4, self.vocab_size // 2) if index not in self.blocks.ids]
        return [
            {
                "model": _NAME,
                "prompt": rng.choices(ids, k=self.prompt),
                "max_tokens": self.written(way),
                "ignore_eos": way != "written chain" or self.chain > 0,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({} if way == "RiM" else {"vllm_xargs": {"num_blocks": 0}}),
            }
            for _ in range(num_requests)
        ]


def measure(
    port: int,
    sizes: Sizes,
    num_clients: int,
    settings: Settings,
    *,
    case: dict[str, Any],
    check: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Yield the rows of one number of clients, after a small load that is not counted.

    Args:
        port: the server's.
        sizes: what it is asked.
        num_clients: the clients.
        settings: the run.
        case: what the rows say of the server.
        check: raises an error if the server has ended.
    """
    num_requests = max(sizes.num_requests, num_clients)
    loads: dict[str, list[Load]] = {way: [] for way in WAYS}

    def send(way: str, number: int) -> Load:
        load = send_load(
            port,
            sizes.requests(way, number, seed=len(loads[way])),
            num_clients=num_clients,
            most_seconds=settings.choose(quick=120.0, cpu=300.0, cuda=300.0),
        )
        check()
        _check_load(load, way, sizes)
        return load

    def keep(way: str) -> None:
        loads[way].append(send(way, num_requests))

    for way in WAYS:
        send(way, min(num_clients, 8))
    interleave(
        {way: partial(keep, way) for way in WAYS},
        rounds=settings.choose(quick=2, cpu=3, cuda=7),
        warm_up=0,
        most_seconds=settings.choose(quick=1.0, cpu=60.0, cuda=60.0),
    )
    for other in WAYS[1:]:
        yield from _rows(loads, other, {**case, "clients": num_clients}, num_requests)


def _check_load(load: Load, way: str, sizes: Sizes) -> None:
    """Check that somebody was answered, and from as many tokens as the way has.

    Raises:
        BenchmarkError: nobody was, or the server has appended other blocks.
    """
    if not load.answers:
        raise BenchmarkError(f"{way}: no request was answered: {describe_errors(load.errors)}")
    wanted = sizes.prompt + (sizes.num_memory if way == "RiM" else 0)
    if found := {answer.num_prompt for answer in load.answers} - {wanted}:
        raise BenchmarkError(
            f"{way}: the server must read {wanted} tokens of prompt and blocks, got {found.pop()}. Is rim-peft "
            "installed in its environment (pip install --no-deps), and VLLM_PLUGINS not set?"
        )


def _rows(loads: dict[str, list[Load]], other: str, case: dict[str, Any], num_requests: int) -> Iterator[Row]:
    ours, theirs = loads["RiM"], loads[other]
    for name, (unit, count) in MEASURES.items():
        values = [list(map(count, ours)), list(map(count, theirs))]
        yield Row(
            benchmark="serving",
            case={**case, "measure": name},
            ways=(Measured("RiM", spread(values[0]), unit), Measured(other, spread(values[1]), unit)),
            figure=ratio(values[0], values[1]),
            figure_name=f"RiM / {other}",
            bound=_bound(name, ours, theirs),
            bound_text="tokens through the layers (to the first token: prompt and blocks; requests a second: the "
            "inverse). A server that waits for weights, not for operations, follows the number of passes instead",
            num_rounds=len(ours),
            note=_note(ours, other, theirs, num_requests) if name == "requests" else "",
        )


def _bound(name: str, ours: Sequence[Load], theirs: Sequence[Load]) -> float:
    def tokens(loads: Sequence[Load]) -> float:
        answers = [answer for load in loads for answer in load.answers]
        later = 0 if name.startswith("first") else 1
        return sum(answer.num_prompt + later * (answer.num_written - 1) for answer in answers) / len(answers)

    share = tokens(ours) / tokens(theirs)
    return 1 / share if name == "requests" else share


def _note(ours: Sequence[Load], other: str, theirs: Sequence[Load], num_requests: int) -> str:
    """Say how much was asked and failed, and whether the clients were fast enough."""
    parts = [f"{num_requests} requests a round"]
    for way, loads in (("RiM", ours), (other, theirs)):
        errors: Counter[str] = sum((load.errors for load in loads), Counter())
        written = [answer.num_written for load in loads for answer in load.answers]
        parts.append(f"{way}: {sum(written) / len(written):.3g} tokens written, errors: {describe_errors(errors)}")
    busy = max(load.busy for load in [*ours, *theirs])
    return "; ".join([*parts, f"the clients computed {busy:.0%} of the time at most"])
