"""Runs below a folder, described from their small files alone: no weights are read, and torch is not imported."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rim_peft.values import BoundedLoader, cut

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FAILURE_FILE = ".failure.json"
"""The error that ended a training; removed when it is started again."""

STAGES = ("grounding", "refinement", "baseline", "coconut")
"""Folders of stages, in the order of training."""

_RECIPE, _RECORD, _ADAPTER, _LOCK, _HOLDER = "recipe.yaml", "run.json", "adapter_config.json", ".lock", ".holder.json"
_FINAL, _HISTORY, _CHECKPOINT, _STATE = "final.safetensors", "history.json", "checkpoint-", "trainer_state.json"
_MANIFEST = ".manifest.json"
# Named here too, since the modules that write these files import torch; a test compares both.

_MOST_BYTES = 1 << 26


@dataclass(frozen=True)
class RunSummary:
    """What the files of a run say about it; None where they do not say.

    Attributes:
        folder: its folder, relative to the one searched.
        state: ``finished``, ``running`` (a process holds its lock), ``diverged`` or ``failed`` (an error ended it),
            ``stopped`` (by a signal or a kill), or ``damaged`` (a file cannot be read).
        detail: the error, the process that holds the lock, or what is damaged.
        stage: the stage that it was last in, if it is not finished.
        step: step of that stage's last checkpoint, or its last step if the stage is finished.
        max_steps: steps of that stage.
        method: the recipe's method.
        base: name or folder of the base; its architecture if it was built from a configuration.
        task: the recipe's task.
        accuracy: of validation; the best so far of a run that is not finished.
        standard_error: of that accuracy, if the run is finished.
        seconds: seconds of training, evaluation included, over all stages.
        num_tokens: tokens of the rows trained on.
        tokens_per_second: the one by the other.
        peak_gpu_mib: largest memory of the main process's GPU.
        started: when it was started, or last resumed; UTC.
    """

    folder: str
    state: str
    detail: str | None = None
    stage: str | None = None
    step: int | None = None
    max_steps: int | None = None
    method: str | None = None
    base: str | None = None
    task: str | None = None
    accuracy: float | None = None
    standard_error: float | None = None
    seconds: float | None = None
    num_tokens: int | None = None
    tokens_per_second: float | None = None
    peak_gpu_mib: float | None = None
    started: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)


def list_runs(root: Path) -> tuple[list[RunSummary], list[str]]:
    """Describe all runs in and below a folder, the latest first.

    Hidden folders are not searched, and links to folders are not followed; neither is a run's own folder searched.

    Returns:
        The runs, and what could not be searched.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"folder: must be a folder with runs, got {root}. Give the one that holds them.")
    notes: list[str] = []
    runs = [describe_run(folder, root) for folder in _find(root, notes)]
    return sorted(sorted(runs, key=lambda run: run.folder), key=lambda run: run.started or "", reverse=True), notes


def _find(root: Path, notes: list[str]) -> Iterator[Path]:
    num_links = 0
    for parent, names, _ in os.walk(root, onerror=lambda error: notes.append(f"not searched: {error}")):
        folder = Path(parent)
        num_links += sum((folder / name).is_symlink() for name in names)
        if _is_run(folder):
            yield folder
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))
    if num_links:
        notes.append(f"not searched: {num_links} links to folders")


def _is_run(folder: Path) -> bool:
    if (folder / _RECORD).is_file():
        return True
    # A folder with the name of a stage may be a run itself, beside the recipe that made it.
    stages = (folder / name for name in STAGES)
    has_stage = any(stage.exists() and not (stage / _RECIPE).is_file() for stage in stages)
    return (folder / _RECIPE).is_file() and (has_stage or (folder / _LOCK).exists())


def describe_run(folder: Path, root: Path) -> RunSummary:
    """Describe one run; files that cannot be read make it ``damaged``.

    Args:
        root: files outside it are not read, whatever links there are.
    """
    files = _Files(folder, root)
    recipe, record = files.read(_RECIPE), files.read(_RECORD)
    is_finished = bool(record) and (folder / _ADAPTER).is_file()
    stages = _stages(files)
    failure = {} if is_finished else files.read(FAILURE_FILE)
    state, detail = "stopped", None
    if (holder := _holder(files)) is not None:
        state, detail = "running", holder
    elif files.damage:
        state, detail = "damaged", "; ".join(files.damage)
    elif is_finished:
        state = "finished"
    elif failure:
        state = "diverged" if failure.get("kind") == "DivergedError" else "failed"
        detail = _text(failure, "message")
    last = stages[-1] if stages and not is_finished else None
    started = _text(record, "started") or _time_of(folder / _RECIPE) or _time_of(folder / _RECORD)
    return RunSummary(
        folder=folder.relative_to(root).as_posix(),
        state=state,
        detail=detail,
        stage=last.name if last else None,
        step=last.step if last else None,
        max_steps=last.max_steps if last else None,
        method=_text(record, "method") or _text(recipe, "method") or ("rim" if recipe else None),
        base=_text(record, "base") or _base(recipe),
        task=_text(record, "data", "task") or _text(recipe, "data", "task") or ("rows" if recipe else None),
        started=started,
        **_figures(record if is_finished else {}, stages),
    )


def _figures(record: Mapping[str, Any], stages: Sequence[_Stage]) -> dict[str, Any]:
    """Return accuracy and cost, of the record or else of the log lines so far."""
    lines = [line for stage in stages for line in stage.lines]
    scores = [score for line in lines if (score := _number(line, "eval_accuracy")) is not None]
    validation = ("metrics", "validation")
    accuracy = _number(record, *validation, "accuracy") if record else max(scores, default=None)
    seconds, tokens = _number(record, "training", "seconds"), _number(record, "training", "num_tokens")
    if seconds is None:
        seconds = _total(stages, "train_seconds")
    if tokens is None:
        tokens = _total(stages, "num_tokens")
    return {
        "accuracy": accuracy,
        "standard_error": _number(record, *validation, "standard_error"),
        "seconds": seconds,
        "num_tokens": None if tokens is None else int(tokens),
        "tokens_per_second": round(tokens / seconds, 1) if tokens is not None and seconds else None,
        "peak_gpu_mib": _number(record, "hardware", "peak_gpu_mib"),
    }


@dataclass(frozen=True)
class _Stage:
    name: str
    lines: Sequence[Mapping[str, Any]] = ()
    step: int | None = None
    max_steps: int | None = None


def _stages(files: _Files) -> list[_Stage]:
    """Return the stages that have begun, with their log lines: of a finished stage, or of its last checkpoint."""
    return [_stage(files, name) for name in STAGES if (files.folder / name).is_dir()]


def _stage(files: _Files, name: str) -> _Stage:
    folder = files.folder / name
    if (folder / _FINAL).is_file() and (folder / _HISTORY).is_file():
        lines = _lines(files.read(f"{name}/{_HISTORY}").get("lines"))
        step = max((int(number) for line in lines if (number := _number(line, "step")) is not None), default=None)
        return _Stage(name, lines, step, step)
    found = [path for path in folder.glob(f"{_CHECKPOINT}*") if path.name.removeprefix(_CHECKPOINT).isdecimal()]
    # The manifest is written last: without it, a checkpoint may be on its way.
    whole = [path for path in found if (path / _MANIFEST).is_file()]
    step = max((int(path.name.removeprefix(_CHECKPOINT)) for path in whole or found), default=None)
    if step is None:
        return _Stage(name)
    state = files.read(f"{name}/{_CHECKPOINT}{step}/{_STATE}")
    most = _number(state, "max_steps")
    return _Stage(name, _lines(state.get("log_history")), step, None if most is None else int(most))


def _lines(value: object) -> list[Mapping[str, Any]]:
    return [line for line in value if isinstance(line, dict)] if isinstance(value, list) else []


def _total(stages: Sequence[_Stage], name: str) -> float | None:
    """Sum what each stage counted until its last log line."""
    counts = [[number for line in stage.lines if (number := _number(line, name)) is not None] for stage in stages]
    return sum(count[-1] for count in counts if count) if any(counts) else None


class _Files:
    """Reads the files of a run; a missing one is empty, one that cannot be read counts as damage.

    Attributes:
        damage: which files cannot be read, and why.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self._root = root.resolve()
        self.damage: list[str] = []

    def read(self, name: str) -> Mapping[str, Any]:
        """Return the mapping in a JSON or YAML file; a list is its ``lines``."""
        path = self.folder / name
        if not path.exists() and not path.is_symlink():
            return {}
        try:
            text = self._text(path)
            value = json.loads(text) if path.suffix == ".json" else _load_yaml(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            self.damage.append(f"{name} cannot be read ({_reason(error)})")
            return {}
        if isinstance(value, list):
            return {"lines": value}
        if not isinstance(value, dict):
            self.damage.append(f"{name} must hold keys and values")
            return {}
        return value

    def _text(self, path: Path) -> str:
        if not path.resolve().is_relative_to(self._root):
            raise ValueError("a link out of the folder")
        if not path.is_file():
            raise ValueError("not a file")
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        return path.read_text(encoding="utf-8")


def _load_yaml(text: str) -> object:
    loader = BoundedLoader(text)
    try:
        value: object = loader.get_single_data()
        return value
    finally:
        loader.dispose()


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else type(error).__name__


def _holder(files: _Files) -> str | None:
    """Return which process holds a run's lock; None if none does, or there is no way to know.

    A shared lock is tried on the file opened for reading, so that nothing is written and no training is refused.
    """
    path = files.folder / _LOCK
    if fcntl is None or path.is_symlink() or not path.is_file():
        return None
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _Files(files.folder, files.folder).read(_HOLDER)  # may be half-written: no damage of the run
        return cut(f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}")
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(number)
    return None


def _base(recipe: Mapping[str, Any]) -> str | None:
    return _text(recipe, "model", "name_or_path") or _text(recipe, "model", "config", "model_type")


def _value(values: object, *names: str) -> object:
    for name in names:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _text(values: Mapping[str, Any], *names: str) -> str | None:
    value = _value(values, *names)
    return cut(value) if isinstance(value, str) else None


def _number(values: Mapping[str, Any], *names: str) -> float | None:
    value = _value(values, *names)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18 else None


def _time_of(path: Path) -> str | None:
    with suppress(OSError):
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))
    return None
