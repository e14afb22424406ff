"""The benchmarks: how they measure and report, and that each of them runs. Nothing here judges a time."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from benchmarks import __main__ as command_line
from benchmarks import recipes, registry
from benchmarks.lengths import NUM_ROWS, real_lengths
from benchmarks.measure import Spread, interleave, peak_memory, ratio, repeated, spread, tensor_bytes
from benchmarks.models import CONFIGS, attach_rim, build_base
from benchmarks.operations import Operations, causal_pairs, readout_pairs
from benchmarks.registry import Benchmark, Settings, all_benchmarks
from benchmarks.report import Measured, Row, above, at_least, at_most, below, to_document, to_table
from benchmarks.steps import RowSizes, readout_step
from rim_peft.cli import bench
from rim_peft.cli.main import main as rim_peft_main
from rim_peft.recipe import load_recipe
from rim_peft.run.at_hand import AtHand
from rim_peft.run.preflight import Preflight

QUICK = Settings(quick=True)


@pytest.fixture(autouse=True)
def _restore_notices() -> Iterator[None]:
    """The command line turns the libraries' notices off, which other tests look for."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def a_row(**fields: Any) -> Row:
    defaults: dict[str, Any] = {
        "benchmark": "example",
        "case": {"base": "tiny", "n": 4},
        "ways": (Measured("ours", Spread(10.0, 9.0, 11.0), "ms"), Measured("theirs", Spread(50.0, 40.0, 60.0), "ms")),
        "figure": Spread(4.5, 4.4, 4.6),
        "figure_name": "theirs / ours",
        "bound": 5.0,
        "bound_text": "tokens",
        "target": at_least(0.9),
        "num_rounds": 3,
    }
    return Row(**{**defaults, **fields})


def test_every_round_begins_with_another_way() -> None:
    calls: list[str] = []
    samples = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, warm_up=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(value > 0 for values in samples.values() for value in values)


def test_a_case_that_takes_too_long_ends_after_the_least_rounds() -> None:
    samples = interleave({"a": lambda: time.sleep(0.001)}, rounds=50, warm_up=0, most_seconds=0.0)
    assert len(samples["a"]) == 3


def test_a_way_can_be_repeated() -> None:
    calls: list[int] = []
    repeated(lambda: calls.append(1), 5)()
    assert len(calls) == 5


def test_medians_have_quartiles() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_is_taken_round_by_round() -> None:
    """The ratio of the medians would be 3 / 3."""
    assert ratio([1.0, 3.0, 30.0], [3.0, 1.0, 10.0]).median == 3.0


def test_the_peak_is_what_is_held_at_once() -> None:
    def run() -> None:
        first = torch.empty(1_000_000)  # 4 MB
        second = torch.empty(500_000)  # 2 MB: 6 at once
        del first
        third = torch.empty(250_000)  # 3 at once
        del second, third

    assert [peak_memory(run) for _ in range(3)] == [6_000_000] * 3


def test_the_peak_leaves_out_what_was_held_before() -> None:
    before = torch.zeros(1_000_000)
    assert peak_memory(before.clone) == 4_000_000
    assert peak_memory(before.zero_) == 0


def test_memory_that_tensors_share_counts_once() -> None:
    tensor = torch.zeros(10, 10)
    assert tensor_bytes([tensor, tensor[0], tensor.T, torch.zeros(2)]) == 408


@pytest.mark.parametrize(
    ("target", "figure", "is_reached"),
    [
        (at_least(0.9), 4.5, True),
        (at_least(0.9), 4.4, False),
        (at_most(1.1), 5.5, True),
        (at_most(1.1), 5.6, False),
        (above(8.0, "at least 8"), 8.0, True),
        (above(8.0, "at least 8"), 7.9, False),
        (below(1.0, "under 1"), 0.9, True),
        (below(1.0, "under 1"), 1.0, False),
        (None, 1.0, None),
    ],
)
def test_a_target_is_reached_or_missed(target: Any, figure: float, is_reached: bool | None) -> None:
    row = a_row(target=target, figure=Spread(figure, figure, figure))
    assert row.is_reached is is_reached
    assert row.share_of_bound == figure / 5.0


def test_the_document_says_what_is_needed_elsewhere() -> None:
    rows = [a_row(), a_row(bound=0.0, target=None)]
    document = to_document(rows, command=["x"], device="cpu", is_complete=True, seconds=1.23)
    document = json.loads(json.dumps(document))
    assert document["command"] == ["x"]
    assert document["complete"] is True
    assert document["hardware"]["torch_threads"] == torch.get_num_threads()
    assert document["versions"]["torch"] == torch.__version__
    assert document["date"].startswith("20")
    assert document["rows"][0] == {
        "benchmark": "example",
        "case": {"base": "tiny", "n": 4},
        "ways": [
            {"name": "ours", "spread": {"median": 10.0, "lower": 9.0, "upper": 11.0}, "unit": "ms"},
            {"name": "theirs", "spread": {"median": 50.0, "lower": 40.0, "upper": 60.0}, "unit": "ms"},
        ],
        "figure": {"name": "theirs / ours", "median": 4.5, "lower": 4.4, "upper": 4.6},
        "bound": {"value": 5.0, "counted": "tokens"},
        "share_of_bound": 0.9,
        "target": "at least 0.9 of the bound",
        "reached": True,
        "num_rounds": 3,
        "note": "",
    }
    assert document["rows"][1]["share_of_bound"] is None


def test_the_table_groups_rows_and_names_what_they_share_once() -> None:
    rows = [a_row(), a_row(benchmark="other"), a_row(case={"base": "tiny", "n": 8}, note="slow")]
    lines = to_table(rows).split("\n")
    assert lines == [
        "example  base=tiny",
        "  bound: tokens; target: at least 0.9 of the bound",
        "                      ours               theirs     theirs / ours  bound  of bound   target",
        "  n=4  10.0 (9.00-11.0) ms  50.0 (40.0-60.0) ms  4.50 (4.40-4.60)   5.00      0.90  reached",
        "  n=8  10.0 (9.00-11.0) ms  50.0 (40.0-60.0) ms  4.50 (4.40-4.60)   5.00      0.90  reached",
        "      slow",
        "",
        "other  base=tiny n=4",
        *lines[8:],
    ]
    assert len(lines) == 11


def test_attended_pairs_are_those_of_the_mask() -> None:
    from rim_peft.sequence import BlockTokens, Sample, build_layout
    from rim_peft.tuner.bases import attention_masks

    config = build_base("tiny", QUICK).config
    blocks = BlockTokens(begin=90, memory=91, end=92, block_size=2)
    layout = build_layout([Sample([1, 2, 3], [[4, 5]] * 3)], blocks, pad_id=0)
    mask = attention_masks(config, layout, dtype=torch.float32)
    assert int((mask == 0).sum()) == readout_pairs(3, num_blocks=3, readout=2)
    assert causal_pairs(4) == 10


def test_operations_are_counted_from_the_layers() -> None:
    model = attach_rim(build_base("tiny", QUICK), rank=4)
    counted = Operations.of(model)
    # Per layer four 64 x 64 matrices of attention and three of 64 x 128, LoRA of rank 4 on each; two layers.
    assert counted == Operations(
        frozen=2 * (4 * 64 * 64 + 3 * 64 * 128),
        lora=2 * 4 * (4 * (64 + 64) + 3 * (64 + 128)),
        head=128 * 64,
        attention_width=2 * 64,
    )
    plain = counted.training_step(tokens=10, labels=3, pairs=20)
    assert plain == 10 * (4 * counted.frozen + 6 * counted.lora) + 12 * 128 * 20 + 4 * 8192 * 3
    again = counted.training_step(tokens=10, labels=3, pairs=20, checkpointing=True)
    assert again - plain == 10 * 2 * (counted.frozen + counted.lora) + 4 * 128 * 20


def test_a_step_is_the_trainer_s_own() -> None:
    model = attach_rim(build_base("tiny", QUICK), rank=4, num_blocks=2)
    sizes = RowSizes(batch=2, prompt=5, readout=3)
    step = readout_step(model, "stage 2", sizes)
    assert step.tokens == sizes.tokens(2) == 2 * (5 + 2 * (4 + 3))
    assert step.labels == 2 * 2 * 3
    rows = model.base_model.memory.rows("default")
    before = rows.detach().clone()
    step.forward_and_backward()
    assert torch.equal(rows, before)
    step()
    assert not torch.equal(rows, before)
    assert rows.grad is None


def test_what_needs_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["kernels", "--quick"]) == 0
    captured = capsys.readouterr()
    assert not captured.out.strip()
    assert "skipped: needs a GPU" in captured.err


# Compiling takes a C++ compiler: part of many machines, but not of Python.
# `serving` starts vLLM; test_serving_benchmark.py has a server in its place. `engines` needs a pretrained base;
# tests/engines/test_exports.py has a tiny one in its place.
NOT_HERE = {"kernels", "serving", "engines"}
if not (shutil.which("g++") or shutil.which("clang++")):
    NOT_HERE.add("compiled")


SLOW = {"compiled", "laptop", "memory", "memory_estimate", "processes", "recipes", "train_step"}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in all_benchmarks()
    if name not in NOT_HERE
]


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "rows.json"
    assert command_line.main([name, "--quick", "--json", "--save", str(saved)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed)
    assert json.loads(saved.read_text(encoding="utf-8")) == document
    assert document["complete"] is True
    assert document["rows"]
    for row in document["rows"]:
        assert row["benchmark"] == name
        spreads = [row["figure"], *(way["spread"] for way in row["ways"])]
        figures = [part[key] for part in spreads for key in ("median", "lower", "upper")]
        assert all(math.isfinite(figure) for figure in [*figures, row["bound"]["value"]])
        assert all(way["spread"]["lower"] > 0 for way in row["ways"])


def test_every_one_gpu_recipe_can_be_estimated() -> None:
    for path in recipes.FOLDER.glob("*/*lora.yaml"):
        recipe = load_recipe(path)
        assert recipes.SHAPES[str(recipe.model.name_or_path)] in CONFIGS
        assert {recipe.data.path, recipe.data.task} & set(recipes.ROWS)


@pytest.mark.slow
def test_a_recipe_is_estimated_as_check_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(recipes.FOLDER / "gsm8k" / "gpt2-lora.yaml", ["grounding=null"])
    CONFIGS["gpt2-124m"]().save_pretrained(tmp_path)
    found = Preflight(AtHand(str(tmp_path)), row_tokens=200, device="cuda").check(recipe)
    # What check takes for a row of 200 tokens: 8 blocks of 4, 8 answers of 8, and the rest is the prompt.
    row = (200 - 8 * (4 + 8), [8] * 8, 8)
    monkeypatch.setitem(recipes.ROWS, "whynlp/gsm8k-aug", recipes.TaskRows(count=1, average=row, long=row))
    (made,) = [row for row in recipes.run(QUICK) if row.case["recipe"] == "gsm8k/gpt2-lora.yaml"]
    assert [way.name for way in made.ways] == ["bf16", "nf4"]
    assert found.peak is not None
    assert made.ways[0].spread.median == found.peak / 2**30 > 0.5


def test_a_profile_names_five_costs_of_a_step_and_of_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--profile", "--quick"]) == 0
    step, answer = capsys.readouterr().out.strip().split("\n\n")
    for text, title in ((step, "training step of stage 2"), (answer, "answer of two tokens")):
        assert text.startswith(title)
        assert text.count(" calls  ") == 5
    assert "rim_peft.rows" in step


def test_lengths_are_those_of_rows() -> None:
    lengths = real_lengths()
    assert len(lengths) == NUM_ROWS
    assert all(prompt > 0 and steps and answer > 1 for prompt, steps, answer in lengths)


def test_an_unknown_name_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(["one_pas"])
    assert stop.value.code == 2
    assert "unknown benchmark one_pas; there are one_pass, packing," in capsys.readouterr().err
    assert rim_peft_main(["bench", "one_pas"]) == 1
    assert capsys.readouterr().err.startswith("rim-peft: error: unknown benchmark one_pas;")


def _fake(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(settings: Settings) -> Iterator[Row]:
        yield a_row()
        raise error

    def other(settings: Settings) -> Iterator[Row]:
        yield a_row(benchmark="other")

    fakes = {"stops": Benchmark("stops", "stops", run), "other": Benchmark("other", "goes on", other)}
    monkeypatch.setattr(registry, "all_benchmarks", lambda: fakes)


def test_an_interruption_prints_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fake(monkeypatch, KeyboardInterrupt())
    assert command_line.main(["--json"]) == 130
    document = json.loads(capsys.readouterr().out)
    assert document["complete"] is False
    assert [row["benchmark"] for row in document["rows"]] == ["example"]


def test_a_failure_costs_no_other_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fake(monkeypatch, RuntimeError("too large"))
    assert command_line.main(["--json"]) == 1
    captured = capsys.readouterr()
    assert [row["benchmark"] for row in json.loads(captured.out)["rows"]] == ["example", "other"]
    assert "RuntimeError: too large" in captured.err


def test_the_command_line_needs_a_clone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert rim_peft_main(["bench", "--list"]) == 0
    assert "one_pass " in capsys.readouterr().out
    monkeypatch.setattr(bench, "_CLONE", tmp_path)
    with pytest.raises(SystemExit) as stop:
        rim_peft_main(["bench", "--list"])
    assert stop.value.code == 2
    assert "part of a clone" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_cuda_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["--device", "cuda"])
    assert "--device: cuda needs a GPU" in capsys.readouterr().err
