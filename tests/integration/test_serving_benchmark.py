"""The load on a server and the benchmark ``serving``, with a small server in vLLM's place. No speed is judged here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command_line
from benchmarks import serving
from benchmarks.load import percentile, send_load
from benchmarks.options import ServingOptions
from benchmarks.registry import BenchmarkError, Settings
from rim_peft_vllm import find_blocks
from tests.conftest import VOCAB_SIZE, build_base, build_tokenizer
from tests.integration import streaming_server
from tests.integration.streaming_server import stream

Capture = pytest.CaptureFixture[str]
IDS = [VOCAB_SIZE - 3, VOCAB_SIZE - 2, VOCAB_SIZE - 1]
ROOT = Path(__file__).parents[2]


def requests(number: int, *, num_prompt: int = 3, num_tokens: int = 4) -> list[dict[str, Any]]:
    return [{"prompt": [1] * num_prompt, "max_tokens": num_tokens} for _ in range(number)]


def test_times_are_those_of_the_server() -> None:
    with stream(first=0.1, gap=0.05, num_memory=8) as server:
        load = send_load(server.port, requests(6, num_tokens=5), num_clients=3, most_seconds=60)
    assert not load.errors
    assert len(load.answers) == 6
    assert server.most_at_once == 3
    assert all((answer.num_prompt, answer.num_written) == (11, 5) for answer in load.answers)
    assert all(answer.first >= 0.1 and answer.end - answer.first >= 3.9 * 0.05 for answer in load.answers)
    # A busy machine is late now and then, not with every answer.
    assert min(answer.first for answer in load.answers) < 0.1 + 0.09
    assert min(answer.end for answer in load.answers) < 0.3 + 0.09
    assert 2 * 0.3 <= load.seconds < 6 * 0.3
    assert 0 < load.busy < 1


def test_more_clients_are_answered_at_once() -> None:
    with stream(first=0.2) as server:
        load = send_load(server.port, requests(32, num_tokens=1), num_clients=32, most_seconds=60)
    assert len(load.answers) == 32
    assert server.most_at_once > 16
    assert load.seconds < 32 * 0.2 / 2


def test_parts_of_a_body_end_anywhere() -> None:
    with stream(piece=7, faults=[None, "to_the_end"]) as server:
        load = send_load(server.port, requests(2), num_clients=1, most_seconds=60)
    assert not load.errors
    assert [answer.num_written for answer in load.answers] == [4, 4]


def test_every_request_is_answered_or_an_error() -> None:
    faults = ["refuse", None, "fail", "break", "hang_up", "refuse", "nonsense", None]
    with stream(faults=faults) as server:
        load = send_load(server.port, requests(9), num_clients=1, most_seconds=60)
    assert len(load.answers) == 3
    assert sorted(load.errors.values()) == [1, 1, 1, 1, 2]
    assert load.errors['HTTP 500: {"error": {"message": "out of memory"}}'] == 2
    reasons = " | ".join(load.errors)
    for part in ("engine died", "the stream broke off", "closed before an answer", "JSONDecodeError"):
        assert part in reasons


def test_what_takes_too_long_is_an_error_like_what_was_not_sent() -> None:
    with stream(faults=["sleep"]) as server:
        load = send_load(server.port, requests(3), num_clients=1, most_seconds=0.3)
    assert load.seconds < 2
    assert load.errors == {"no answer within 0.3 s of the load": 3}
    assert len(server.asked) == 1


def test_a_percentile_is_a_value() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 1.0)] == [50.0, 95.0, 100.0]
    assert percentile([3.0], 0.95) == 3.0


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What the benchmark reads of an export: two blocks of two memory tokens."""
    build_base("llama").config.save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    record = {"format": "embedding-lora", "memory": {"ids": IDS, "num_blocks": 2, "block_size": 2}}
    (folder / "rim_export.json").write_text(json.dumps(record))
    config = {"base_model_name_or_path": str(tmp_path / "base"), "r": 9}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def sizes_of(adapter: Path, **options: Any) -> tuple[serving.Sizes, Settings]:
    settings = Settings(quick=True, serving=ServingOptions(**options))
    return serving.Sizes.of(adapter, settings), settings


def test_the_ways_differ_in_blocks_and_tokens_alone(adapter: Path) -> None:
    sizes, settings = sizes_of(adapter, prompt_tokens=5, answer_tokens=3, chain_tokens=7)
    rim, direct, chain = (sizes.requests(way, 4, seed=1) for way in serving.WAYS)
    assert len({tuple(request["prompt"]) for request in rim}) == 4
    no_blocks = {"vllm_xargs": {"num_blocks": 0}}
    assert direct == [{**request, **no_blocks} for request in rim]
    assert chain == [{**request, "max_tokens": 10} for request in direct]
    assert {(request["max_tokens"], request["ignore_eos"]) for request in rim} == {(3, True)}
    assert not {*IDS} & {index for request in rim for index in request["prompt"]}
    assert rim != sizes.requests("RiM", 4, seed=2)
    options = sizes.server_options(settings)
    assert options[options.index("--max-model-len") + 1] == str(5 + 8 + 10)
    assert options[options.index("--max-lora-rank") + 1] == "16"
    free, _ = sizes_of(adapter, chain_tokens=0)
    assert {
        (request["max_tokens"], request["ignore_eos"]) for request in free.requests("written chain", 2, seed=0)
    } == {(serving.MOST_CHAIN_TOKENS + free.answer, False)}
    assert free.case()["chain"] == "until EOS, at most 512 tokens"


def test_rows_are_ratios_of_rounds_with_their_errors(adapter: Path) -> None:
    sizes, settings = sizes_of(adapter, prompt_tokens=4, answer_tokens=2, chain_tokens=10, num_requests=4)
    warm_up = [None] * 6  # two of each way
    with stream(first=0.01, gap=0.01, num_memory=8, faults=[*warm_up, "refuse"]) as server:
        rows = list(serving.measure(server.port, sizes, 2, settings, case={"engine": "none"}))
    assert len(server.asked) == 3 * 2 + 2 * 3 * 4
    assert len(rows) == 2 * len(serving.MEASURES)
    found = {(row.figure_name, row.case["measure"]): row for row in rows}
    assert all(row.case["clients"] == 2 and row.num_rounds == 2 for row in rows)
    requests = found["RiM / direct", "requests"]
    assert requests.note.startswith("4 requests a round; RiM: 2 tokens written, errors: 1 (1 × HTTP 500: ")
    assert "; direct: 2 tokens written, errors: none; the clients computed " in requests.note
    assert "written chain: 12 tokens written, errors: none" in found["RiM / written chain", "requests"].note
    # 4 tokens of prompt, 8 of blocks; the last token written goes through no layer.
    assert requests.bound == pytest.approx((4 + 1) / (12 + 1))
    assert found["RiM / direct", "first token, p50"].bound == pytest.approx(12 / 4)
    assert found["RiM / written chain", "end, p95"].bound == pytest.approx((12 + 1) / (4 + 11))
    assert found["RiM / written chain", "end, p50"].figure.median < 1  # 20 ms of waiting against 120
    assert found["RiM / written chain", "requests"].figure.median > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_memory": 0}, "RiM: the server must read 24 tokens of prompt and blocks, got 16. Is rim-peft"),
        ({"faults": ["refuse"] * 9}, r"RiM: no request was answered: 2 \(2 × HTTP 500: .*out of memory"),
    ],
)
def test_a_server_that_answers_otherwise_is_one_error(adapter: Path, options: dict[str, Any], message: str) -> None:
    sizes, settings = sizes_of(adapter)
    with stream(**options) as server, pytest.raises(BenchmarkError, match=message):
        list(serving.measure(server.port, sizes, 2, settings, case={}))


def test_a_server_that_has_gone_is_one_error(adapter: Path) -> None:
    sizes, settings = sizes_of(adapter)
    with stream() as server:
        pass
    with pytest.raises(BenchmarkError, match=r"RiM: no request was answered: 2 .*ConnectionRefusedError"):
        list(serving.measure(server.port, sizes, 2, settings, case={}))


def vllm(folder: Path, *, most_requests: int = 0, script: str = "") -> str:
    """An executable that takes the place of the Python of vLLM's environment."""
    path = folder / "python"
    server = f'exec "{sys.executable}" "{streaming_server.__file__}" {most_requests} "$@"'
    path.write_text(f'#!/bin/sh\necho $$ > "{folder}/pid"\n{script or server}\n')
    path.chmod(0o755)
    return str(path)


def is_alive(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_the_benchmark_starts_and_ends_its_server(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["serving", "--quick", "--json", "--adapter", str(adapter), "--vllm-python", vllm(tmp_path)]
    assert command_line.main([*command, "--clients", "2,3", "--chain-tokens", "5"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2 * 2 * len(serving.MEASURES)
    assert {row["case"]["clients"] for row in rows} == {2, 3}
    shared = {"engine": "vLLM 9.9", "base": "base", "n": 16, "K·B": 8, "answer": 2, "chain": "5 tokens"}
    assert all(row["case"].items() >= shared.items() for row in rows)
    assert not is_alive(tmp_path)


def test_a_server_that_dies_keeps_the_finished_rows(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    # With one client: three requests to warm up, two rounds of three ways with two requests each. Then two clients.
    python = vllm(tmp_path, most_requests=3 + 12 + 4)
    assert command_line.main(["serving", "--quick", "--json", "--adapter", str(adapter), "--vllm-python", python]) == 1
    captured = capsys.readouterr()
    assert {row["case"]["clients"] for row in json.loads(captured.out)["rows"]} == {1}
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("serving: ") and "layers" not in line][1:]
    assert "vLLM ended by itself (exit code 7)" in line or "no request was answered" in line


def test_a_server_that_does_not_start_is_one_error(adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    python = vllm(tmp_path, script="echo no module named vllm; exit 3")
    assert command_line.main(["serving", "--quick", "--adapter", str(adapter), "--vllm-python", python]) == 1
    captured = capsys.readouterr().err
    assert "serving: vLLM ended by itself (exit code 3); the end of its log:\nno module named vllm" in captured
    assert "Traceback" not in captured


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_benchmark_ends_its_server(adapter: Path, tmp_path: Path, number: int) -> None:
    python = vllm(tmp_path, script="sleep 600")
    command = [sys.executable, "-m", "benchmarks", "serving", "--quick", "--adapter", str(adapter)]
    process = subprocess.Popen([*command, "--vllm-python", python], cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8")
    while not (tmp_path / "pid").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert not is_alive(tmp_path)


def test_what_is_missing_is_said(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    monkeypatch.setattr("benchmarks.vllm_server._MADE_BY_MAKE", tmp_path / "none")
    assert command_line.main(["serving", "--quick"]) == 0
    assert "skipped: needs vLLM in an environment of its own; make test-engines makes one" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_PYTHON", "nowhere/python")
    assert command_line.main(["serving", "--quick"]) == 1
    assert (
        "VLLM_PYTHON: must be the Python of an environment with vLLM, got 'nowhere/python'" in capsys.readouterr().err
    )
    python = vllm(tmp_path)
    for other, message in ((tmp_path / "base", "must be an adapter's export, but is not"), (tmp_path, "is not")):
        assert command_line.main(["serving", "--quick", "--vllm-python", python, "--adapter", str(other)]) == 1
        assert message in capsys.readouterr().err
    (adapter / "rim_export.json").unlink()
    assert command_line.main(["serving", "--quick", "--vllm-python", python, "--adapter", str(adapter)]) == 1
    assert "must be an export of the format embedding-lora or peft-lora, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--clients", "1,0"], "--clients: must be a whole number from 1 to 100000, got '0'"),
        (["--chain-tokens", "all"], "--chain-tokens: must be a whole number from 1 to 100000, got 'all'"),
    ],
)
def test_a_bad_option_is_one_error(option: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["serving", *option])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_own_adapter_is_one_that_the_plugin_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_base("llama_tied", vocab_size=VOCAB_SIZE + 5)
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(serving, "BASE", str(tmp_path / "base"))
    folder = serving.make_adapter(tmp_path / "adapter", Settings(quick=True))
    blocks = find_blocks(folder)
    assert blocks is not None
    assert (blocks.num_blocks, blocks.block_size) == (serving.NUM_BLOCKS, 2)
    assert serving.Sizes.of(folder, Settings()).num_clients == (1, 8, 32, 128)
