"""Tables of readouts in trackers: in the trackers themselves where they are installed, offline, and in stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import TensorBoardCallback

from rim_peft.training.samples import TABLE, Sample, send_samples, table_of, trackers_of

SAMPLES = [
    Sample("Tom's | brew?", {"block 1": "plum", "block 2": "blue"}, answer="blue", is_right=True),
    Sample("![x](http://a/b)\n<b>", {"block 1": "*red*", "block 2": "r\x1b[31m"}, answer="green", is_right=False),
]
COLUMNS = ["question", "block 1", "block 2", "answer", "judged"]
PLAIN = [
    ["Tom's | brew?", "plum", "blue", "blue", "right"],
    ["![x](http://a/b) <b>", "*red*", "r\\x1b[31m", "green", "wrong"],
]
ESCAPED = [
    ["Tom's \\| brew?", "plum", "blue", "blue", "right"],
    ["!\\[x\\](http://a/b) \\<b\\>", "\\*red\\*", "r\\\\x1b\\[31m", "green", "wrong"],
]


def _tensorboard(writer: Any) -> TensorBoardCallback:
    callback = TensorBoardCallback.__new__(TensorBoardCallback)  # without the package that its constructor needs
    callback.tb_writer = writer
    return callback


def test_only_trackers_of_report_to_that_take_tables() -> None:
    assert trackers_of(["tensorboard", "mlflow", "wandb"]) == ["wandb", "tensorboard"]
    assert trackers_of([]) == trackers_of(None) == trackers_of("none") == []


def test_long_texts_lose_their_middle() -> None:
    sample = Sample("a" * 5000 + "z", {"block 1": "b"}, answer="b", is_right=True)
    (row,) = table_of([sample])[1]
    assert len(row[0]) < 510
    assert row[0].endswith("z")


def test_what_each_tracker_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    wandb, trackio = ModuleType("wandb"), ModuleType("trackio")
    for module, name in ((wandb, "wandb"), (trackio, "trackio")):
        module.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
        module.log = lambda values, name=name: calls.append((name, values))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    wandb.run = trackio.run = None  # type: ignore[attr-defined]
    current = SimpleNamespace(get=lambda: trackio.run)
    trackio.context_vars = SimpleNamespace(current_run=current)  # type: ignore[attr-defined]
    writer = SimpleNamespace(
        add_text=lambda *given: calls.append(("tensorboard", given)), flush=lambda: calls.append("flushed")
    )
    send_samples(SAMPLES, ["wandb", "trackio", "tensorboard"], step=7, callbacks=[_tensorboard(None)])
    assert calls == []  # no tracker has begun
    wandb.run = trackio.run = object()  # type: ignore[attr-defined]
    send_samples(SAMPLES, ["wandb", "trackio", "tensorboard"], step=7, callbacks=[_tensorboard(writer)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in [COLUMNS, ["---"] * 5, *ESCAPED])
    assert calls == [
        ("wandb", {TABLE: (COLUMNS, PLAIN), "train/global_step": 7}),
        ("trackio", {TABLE: (COLUMNS, ESCAPED), "train/global_step": 7}),
        ("tensorboard", (TABLE, text, 7)),
        "flushed",
    ]


def test_wandb_itself_keeps_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="test", dir=str(tmp_path), mode="offline")
    try:
        send_samples(SAMPLES, ["wandb"], step=7, callbacks=[])
    finally:
        run.finish()
    (table,) = tmp_path.rglob("*.table.json")
    kept = json.loads(table.read_text(encoding="utf-8"))
    assert (kept["columns"], kept["data"]) == (COLUMNS, PLAIN)


def test_trackio_itself_keeps_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    trackio.init(project="test", name="run", embed=False)
    send_samples(SAMPLES, ["trackio"], step=7, callbacks=[])
    trackio.finish()
    (line,) = [line for line in storage.get_logs("test", "run") if TABLE in line]
    assert [list(row.values()) for row in line[TABLE]["_value"]] == ESCAPED
    assert line["train/global_step"] == 7


def test_tensorboard_itself_keeps_the_table(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(tmp_path))
    send_samples(SAMPLES, ["tensorboard"], step=7, callbacks=[_tensorboard(writer)])
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors(f"{TABLE}/text_summary")
    assert event.step == 7
    assert event.tensor_proto.string_val[0].decode().splitlines()[2] == f"| {' | '.join(ESCAPED[0])} |"
