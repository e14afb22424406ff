"""Files of rows with bytes, fields and characters changed: each is kept or reported, and kept ones are tokenised."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from rim_peft.data.examples import BadRowsError
from rim_peft.tasks import get_task
from tests.conftest import VOCAB_SIZE, build_tokenizer
from tests.objectives import prepare_rows
from tests.robustness.judging import Case

FEW_ROWS, MANY_ROWS = 30, 200
"""Rows of the first files, so that a few inputs are several files, and of the others."""

_OPTIONS: dict[str, Any] = {"needs_steps": False, "num_blocks": 2, "block_length": 3, "vocab_size": VOCAB_SIZE}

_ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "Tom has 2?", "answer": "He has <<1+1=2>> 2.\n#### 2"},
    "gsm8k-aug": {"question": "Two?", "steps": ["1+1=2"], "answer": "2"},
    "gsm-hard": {"input": "How many?", "target": 2.5, "code": "x"},
    "svamp": {"Body": "Two cats.", "Question": "How many?", "Answer": "2.0", "Equation": "( 1.0 + 1.0 )"},
    "multiarith": {"question": "How many?", "final_ans": "7"},
    "math": {"problem": "What is $x$?", "solution": "Since $x = 1. 5$, it is so. Hence $\\boxed{12}$."},
    "strategyqa": {"question": "Is it?", "answer": True, "facts": ["It is.", "So."], "decomposition": ["Is #1?"]},
    "logiqa": {"context": "A is B.", "query": "Which?", "options": ["A. a", "B. b", "C. c", "D. d"], "answer": "b"},
    "commonsenseqa": {"question": "Which?", "choices": {"label": ["A", "B"], "text": ["a", "b"]}, "answerKey": "B"},
    "aqua-rat": {"question": "?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "x", "correct": "B"},
    "bbh": {"input": "not True is", "target": "False"},
    "prontoqa": {"question": "a.", "query": "True or false: b.", "chain_of_thought": ["a.", "b."], "answer": "True"},
    "prosqa": {"question": "Is Tom a b or c?", "steps": ["Tom is a b."], "answer": "Tom is a b."},
}
_CHAT = {"question": [{"role": "user", "content": "Hi?"}], "answer": "Yes."}

_TEXTS = (
    "", " ", "\u200b", "\ufeff", "\ufe0f\u2060", "\x00", "\ud83d", "\udcff", "a\ud83db", "<eos>", "<|user|><bos>",
    "\U0010fffd0\U0010fffd", "#### 3", "||", "\r", "a\rb", "\u2028", "{question}", "1e999", "1e-99999999", "٣", "²",
    "9" * 5000, "nan", "-0.0", "\\boxed{", "$" * 50, "yes", "(A)", "e\u0301", "x" * 3000,
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2.5, 10**30, float("nan"), float("inf"), [], [[]], {}, [None], ["a", 5], {"role": "user"},
    [{"role": "user", "content": 5}], [{"role": "user", "content": "a"}], [{"role": "system", "content": "a"}],
)  # fmt: skip


def _retype(rng: random.Random, row: dict[str, Any]) -> str:
    name = rng.choice(list(row))
    return json.dumps({**row, name: rng.choice(_VALUES)})


def _respell(rng: random.Random, row: dict[str, Any]) -> str:
    name, text = rng.choice(list(row)), rng.choice(_TEXTS)
    value = row[name]
    kept = value if isinstance(value, str) else ""
    changed: Any = rng.choice([text, kept + text, text + kept])
    if isinstance(value, list):
        changed = [*value[:-1], changed]
    ascii_only = "\ud83d" in text or "\udcff" in text or rng.random() < 0.5
    return json.dumps({**row, name: changed}, ensure_ascii=ascii_only)


def _leave_out(rng: random.Random, row: dict[str, Any]) -> str:
    left: dict[str, Any] = {name: row[name] for name in rng.sample(list(row), rng.randrange(len(row)))}
    return json.dumps({**left, "text": rng.choice(_VALUES)} if rng.random() < 0.3 else left)


def _other(rng: random.Random, row: dict[str, Any]) -> str:
    text = json.dumps(row)
    twice = text[:-1] + f", {json.dumps(rng.choice(list(row)))}: 1}}"
    raw = (
        "null",
        "[]",
        "5",
        '"text"',
        "{",
        "}",
        "[" * 5000,
        '{"a":' * 5000,
        '{"a": ' + "1" * 5000 + "}",
        "nan",
        "\x00",
    )
    around = (text + text, "\ufeff" + text, text + "\r", f"  {text}\t", json.dumps({"text": row}))
    return rng.choice([*raw, *around, twice])


def _bytes(rng: random.Random, row: dict[str, Any]) -> bytes:
    line = bytearray(json.dumps(row, ensure_ascii=False).encode())
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(line))
        line[place] = rng.choice([rng.randrange(256), line[place] ^ (1 << rng.randrange(8))])
    line = line[: rng.randrange(len(line))] if rng.random() < 0.3 else line
    return bytes(line).replace(b"\n", b" ")


_CHANGES: tuple[Callable[[random.Random, dict[str, Any]], str | bytes], ...] = (
    _retype, _respell, _respell, _leave_out, _other, _bytes,
)  # fmt: skip


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Yield files of every task, each with all forms of changes, kept and dropped in turn."""
    datasets.disable_progress_bars()
    logging.getLogger("rim_peft").setLevel(logging.ERROR)
    rng = random.Random(seed)
    for number in range(10**9):
        name = rng.choice([*_ROWS, "prosqa"])
        row = _CHAT if name == "prosqa" and rng.random() < 0.5 else _ROWS[name]
        is_document = rng.random() < 0.2
        size = FEW_ROWS if number < 6 else MANY_ROWS
        lines: list[bytes] = []
        while len(lines) < size:
            made = rng.choice(_CHANGES)(rng, row) if rng.random() < 0.7 else json.dumps(row)
            line = made if isinstance(made, bytes) else made.encode(errors="surrogateescape")
            if line.strip() and not _is_blank(line) and (not is_document or _is_document_item(line)):
                lines.append(line)
        if rng.random() < 0.3:
            lines[0] = json.dumps(row).encode()
        path = folder / str(number) / ("test.json" if is_document else "test.jsonl")
        path.parent.mkdir()
        path.write_bytes(b"[" + b",\n".join(lines) + b"]" if is_document else b"\n".join(lines))
        case = partial(_run, name, path, size, drop=number % 5 != 1)
        yield Case(f"{name} {path.name} {number}", case, names=("row ", path.name), size=size)


def _is_blank(line: bytes) -> bool:
    return not line.decode(errors="replace").lstrip("\ufeff").strip()


def _is_document_item(line: bytes) -> bool:
    """Tell whether a line can be part of a document, which as a whole is JSON or not."""
    try:
        json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return False
    return b"[[[[" not in line


def _run(name: str, path: Path, size: int, *, drop: bool) -> str | None:
    """Load a file and tokenise what is left; say what was lost."""
    rows = get_task(name).load("test", path=str(path))
    bad = sum(error is not None for error in rows["row_error"])
    if len(rows) != size:
        return f"{len(rows)} rows of {size} were kept or reported"
    if any("Error:" in error for error in rows["row_error"] if error is not None):
        return f"a task's reader failed: {next(e for e in rows['row_error'] if e is not None and 'Error:' in e)}"
    tokenizer = build_tokenizer()
    if drop and bad == len(rows):
        return None
    try:
        prepared = prepare_rows(rows, tokenizer, on_bad_rows="drop" if drop else "error", **_OPTIONS)
    except BadRowsError as error:
        if drop or len(error.rows) < bad:
            return f"{len(error.rows)} rows were reported, {bad} are bad"
        raise
    if len(prepared) != len(rows) - bad:
        return f"{len(prepared)} of {len(rows)} rows were kept, {bad} are bad"
    special = {3, 4, 5} if name != "prosqa" else set()
    if any(special & set(ids) for ids in prepared["prompt_ids"]):
        return "a row's text became special tokens"
    return None
