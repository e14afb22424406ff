"""Files of other forms than question, steps and answer: a tiny adapter from each, by the command line alone."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from rim_peft.cli.main import main
from rim_peft.recipe.syntax import read_yaml

Rows = list[dict[str, Any]]

CHAIN = ["{n}+1={a}", "{a}*2={b}"]


def fill(value: Any, n: int) -> Any:
    if isinstance(value, dict):
        return {key: fill(item, n) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, n) for item in value]
    return value.format(n=n, a=n + 1, b=2 * (n + 1)) if isinstance(value, str) else value


def write_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps({"data": rows}))


def write_cells(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_gz(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_zst(path: Path, rows: Rows) -> None:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def write_arrow(path: Path, rows: Rows) -> None:
    table = Dataset.from_list(rows).data.table
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def write_saved(path: Path, rows: Rows) -> None:
    Dataset.from_list(rows).save_to_disk(path)


def write_clone(path: Path, rows: Rows) -> None:
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    Dataset.from_list(rows).to_parquet(path / "data" / "train-00000-of-00001.parquet")


USER = {"role": "user", "content": "{n} + 1, doubled?"}
ASKED = "{n} + 1, doubled?"
FORMS: dict[str, tuple[str, Callable[[Path, Rows], None], dict[str, Any], list[str]]] = {
    "csv, lines": (
        "rows.csv",
        write_cells,
        {"problem": ASKED, "solution": "{n}+1={a}\n{a}*2={b}", "target": "{b}"},
        ["split_steps=lines", "answer_rule=last-number-float"],
    ),
    "tsv, numbered, last number": (
        "rows.tsv",
        write_cells,
        {"query": ASKED, "output": "1. {n}+1={a}\n2. {a}*2={b}"},
        ["split_steps=numbered", "answer_from=last-number"],
    ),
    "jsonl.gz, equations, after a marker": (
        "rows.jsonl.gz",
        write_gz,
        {"instruction": "Compute.", "input": ASKED, "output": "First {n}+1={a}, then {a}*2={b}.\n#### {b}"},
        ["split_steps=equations", "answer_from=after:####"],
    ),
    "json, boxed, sentences": (
        "rows.json",
        write_json,
        {"problem": ASKED, "solution": "We add: ${n}+1={a}$. We double: ${a}*2={b}$. So $\\boxed{{{b}}}$."},
        ["split_steps=sentences", "answer_from=boxed", "answer_rule=boxed-string"],
    ),
    "parquet of a clone, chat with thoughts": (
        "clone",
        write_clone,
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "<think>\n{n}+1={a}\n{a}*2={b}\n</think>\n\n{b}"},
            ]
        },
        ["split_steps=lines"],
    ),
    "arrow, prompt and completion": (
        "rows.arrow",
        write_arrow,
        {
            "prompt": [USER],
            "completion": [{"role": "assistant", "content": "{b}", "reasoning_content": "{n}+1={a}; {b}"}],
        },
        ["split_steps=regex:; "],
    ),
    "save_to_disk, nested columns": (
        "saved",
        write_saved,
        {"ask": {"text": ASKED}, "trace": [{"say": step} for step in CHAIN], "gold": [{"value": "{b}"}]},
        ["columns.question=ask.text", "columns.steps=trace.say", "columns.answer=gold.0.value"],
    ),
    "jsonl.zst, stepwise supervision": (
        "rows.jsonl.zst",
        write_zst,
        {"prompt": ASKED, "completions": [*CHAIN, "{b}"], "labels": [True, True, True]},
        [],
    ),
    "jsonl, as ever": ("rows.jsonl", write_lines, {"question": ASKED, "steps": CHAIN, "answer": "{b}"}, []),
}
QUICK = ("csv, lines", "jsonl.zst, stepwise supervision")


@pytest.fixture
def recipe(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe without rows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    values: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "model": {"name_or_path": str(base)},
        "adapter": {"num_blocks": 2, "r": 2},
        "data": {"validation_rows": 2, "validation_split": None},
        "evaluation": {"max_new_tokens": 2},
        "grounding": {"per_device_train_batch_size": 4, "max_steps": 1, "save_steps": 1},
        "refinement": None,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form in QUICK else pytest.mark.slow) for form in FORMS]
)
def test_trains_from_a_file_with_one_command(
    recipe: str, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, write, row, options = FORMS[form]
    write(tmp_path / name, [fill(row, n) for n in range(12)])
    command = [recipe, f"data.path={tmp_path / name}", *(f"data.options.{option}" for option in options)]
    assert main(["check", *command]) == 0
    shown = capsys.readouterr().out
    asked = re.findall(r"row \d +prompt .*?(\d+) \+ 1, doubled\?", shown)
    answers = re.findall(r'answer +"(\d+)<eos>"', shown)
    assert [2 * (int(n) + 1) for n in asked] == [int(answer) for answer in answers]
    assert len(answers) == 3
    assert main(["train", *command]) == 0
    assert capsys.readouterr().out.startswith(f"adapter: {tmp_path / 'out'}\naccuracy: ")
    kept = read_yaml((tmp_path / "out" / "recipe.yaml").read_text())
    assert kept["data"]["task"] == "rows"
    assert main(["evaluate", str(tmp_path / "out"), "--split", "train", "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "rows"


def test_the_first_rows_are_shown_as_they_are_trained(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"problem": f"{n}\n?", "solution": "a;b;c", "target": f"{n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        recipe,
        f"data.path={tmp_path / 'rows.jsonl'}",
        "data.options.split_steps=regex:;",
        "data.validation_rows=0",
    ]
    assert main(["check", *command, "adapter.num_blocks=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("  row 1"))
    assert lines[start : start + 6] == [
        r'  row 1       prompt      "0\n?\n"',
        '              block 1     "b<eos>"',
        '              block 2     "c<eos>"',
        '              block 3-5   "0<eos>"',
        '              answer      "0<eos>"',
        r'  row 2       prompt      "1\n?\n"',
    ]
    assert main(["check", *command, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["recipes"][0]["runs"]
    texts = {"prompt": "2\n?\n", "readouts": ["b<eos>", "c<eos>", "2<eos>"], "answer": "2<eos>", "in_place": []}
    assert run["first_rows"][2] == texts


def test_what_cannot_be_guessed_is_one_error(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text("question,problem,answer\na,b,c\n")
    path = f"data.path={tmp_path / 'rows.csv'}"
    assert main(["check", recipe, path]) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith(recipe))
    assert error == (
        f"{recipe}: data.options.columns.question: must be given, since the rows have 'question' and 'problem'. "
        "Choose one, as in data.options.columns.question=question."
    )
    assert main(["check", recipe, path, "data.options.columns.quesiton=question", "data.options.split_steps=line"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.partition(": must")[0] for error in errors] == [
        f"{recipe}: data.options.columns",
        "command line: data.options.split_steps",
    ]
    assert main(["check", recipe]) == 1
    assert (
        capsys.readouterr().err == f"{recipe}: data.task: must be given. For rows of your own give data.path instead.\n"
    )
