"""``rim-peft chains``: rows of question and answer become rows with steps, also after a kill at any moment."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rim_peft.chains.options import ChainOptions
from rim_peft.chains.prompts import Prompts
from rim_peft.chains.teachers import LocalTeacher
from rim_peft.chains.writing import SourceRows, write_chains
from rim_peft.cli.main import main
from rim_peft.data.examples import Example
from rim_peft.data.tokenization import tokenize_example
from rim_peft.tasks import get_task
from rim_peft.tasks.rows import OwnRows
from rim_peft.tasks.task import Task
from tests.conftest import EOS_ID, VOCAB_SIZE, build_base, build_tokenizer, save_base
from tests.integration.openai_server import Answer, Server, serve
from tests.robustness.crash_points import run_forked

NUM_ROWS = 20
FILES = ("train.jsonl", "report.json", "README.md", "drafts.jsonl", "options.json")


def teach(prompt: str, seed: int) -> Answer:
    """Answer "N + 1, doubled?" rightly or in one of the ways in which teachers fail, by the seed.

    Questions that 5 divides are only answered rightly with the answer in sight.
    """
    number = int(re.findall(r"(\d+) \+ 1, doubled", prompt)[-1])
    a, b = number + 1, 2 * (number + 1)
    right = f"{number}+1={a}\n{a}*2={b}\n#### {b}"
    if number % 5 == 0:
        return (right, "stop") if "Hint: the answer is" in prompt else (f"{number}\n#### 0", "stop")
    return [
        (right, "stop"),
        (f"Take {number}.\n{right}\n\nQuestion: 7 + 1, doubled?\n#### 1", "stop"),
        (right, "length"),
        (f"{number}+1={a}", "stop"),
        (f"{number}+1={a}\n#### {a}", "stop"),
        ("", "stop"),
    ][seed % 6]


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(teach) as running:
        yield running


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    numbers = range(1, NUM_ROWS + 1)
    path.write_text("".join(json.dumps({"problem": f"{n} + 1, doubled?", "target": 2 * n + 2}) + "\n" for n in numbers))
    return path


def command(rows: Path, out: Path, url: str, *more: str) -> list[str]:
    options = ["--output-dir", str(out), "--teacher", "tiny", "--url", url, "--num-chains", "3", "--batch-size", "4"]
    return ["chains", str(rows), *options, *more]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    """Tell whether two folders have the same rows and the same counts; times differ."""
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, other)]
    for report in reports:
        del report["cost"]["seconds"]
    return (one / "train.jsonl").read_bytes() == (other / "train.jsonl").read_bytes() and reports[0] == reports[1]


def test_rows_with_steps_and_a_report(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(rows, out, server.url, "--hinted-tries", "1", "--json")) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == json.loads((out / "report.json").read_text())
    assert sorted(FILES) == sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert "Writing chains: 100%" in captured.err

    written = read(out / "train.jsonl")
    drafts = {(draft["row"], draft["try"]): draft for draft in read(out / "drafts.jsonl")}
    assert [row["row"] for row in written] == list(range(NUM_ROWS))
    assert [row["answer"] for row in written] == [str(2 * n + 2) for n in range(1, NUM_ROWS + 1)]
    for row in written:
        n = row["row"] + 1
        if row["steps"] is None:
            assert (row["chain_from"], row["chain_try"]) == (None, None)
            continue
        assert row["steps"][-2:] == [f"{n}+1={n + 1}", f"{n + 1}*2={2 * n + 2}"]
        assert drafts[row["row"], row["chain_try"]]["text"].startswith("\n".join(row["steps"]))
        assert row["chain_from"] == ("hinted" if n % 5 == 0 else "teacher") or row["chain_try"] == 4
    assert {row["chain_from"] for row in written if (row["row"] + 1) % 5 == 0} == {"hinted"}

    with_chain = [row for row in written if row["steps"]]
    assert (report["questions"], report["with_chain"]) == (NUM_ROWS, len(with_chain))
    assert report["without_chain"] == NUM_ROWS - len(with_chain)
    assert report["with_chain_only_after_hint"] == sum(row["chain_from"] == "hinted" for row in written)
    shares = [one["share"] for one in report["by_try"]]
    assert shares == sorted(shares)
    assert shares[-1] == report["share_with_chain"] == len(with_chain) / NUM_ROWS
    rejected = report["drafts"]["rejected"]
    assert set(rejected) == {"wrong answer", "no answer found", "empty", "cut at max_new_tokens", "duplicate"}
    assert report["drafts"]["written"] == len(drafts) == report["drafts"]["right"] + sum(rejected.values())
    assert len(server.asked) == len(drafts)
    assert report["cost"]["written_tokens"] == sum(draft["num_tokens"] for draft in drafts.values()) > 0
    assert report["lengths_of_kept_chains"]["steps"]["least"] == 2

    card = (out / "README.md").read_text()
    for expected in (
        "data_files: train.jsonl",
        "`tiny`",
        "Question: {question}",
        "| temperature | `0.7` |",
        "rejected",
    ):
        assert expected in card
    assert server.url not in card + (out / "options.json").read_text()


def test_all_chains_that_differ(server: Server, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(rows, out, server.url, "--keep", "all", "--num-chains", "8")) == 0
    written = read(out / "train.jsonl")
    report = json.loads((out / "report.json").read_text())
    assert report["drafts"]["kept"] == report["drafts"]["right"] == sum(row["steps"] is not None for row in written)
    chains = [(row["question"], *(row["steps"] or ())) for row in written]
    assert len(set(chains)) == len(chains) > NUM_ROWS
    assert {row["question"] for row in written} == {f"{n} + 1, doubled?" for n in range(1, NUM_ROWS + 1)}


def test_the_output_is_read_and_tokenised_as_rows_without_options(server: Server, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(rows, out, server.url)) == 0
    loaded = get_task("rows").load("train", path=str(out), whole=True)
    assert set(loaded["row_error"]) == {None}
    assert [row["steps"] for row in loaded] == [row["steps"] for row in read(out / "train.jsonl")]
    example = next(Example(row["question"], row["answer"], tuple(row["steps"])) for row in loaded if row["steps"])
    assert len(tokenize_example(example, build_tokenizer())["step_ids"]) >= 2
    base = tmp_path / "base"
    save_base(base)
    recipe = {
        "output_dir": str(tmp_path / "trained"),
        "model": {"name_or_path": str(base)},
        "adapter": {"num_blocks": 2, "r": 2},
        "data": {"path": str(out), "validation_rows": 0, "on_bad_rows": "drop"},
        "grounding": {"per_device_train_batch_size": 4, "max_steps": 1},
        "refinement": None,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0


def test_continued_after_the_file_was_cut_anywhere(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = ("--hinted-tries", "2", "--keep", "all")
    assert main(command(rows, whole, server.url, *more)) == 0
    assert main(command(rows, out, server.url, *more)) == 0
    assert same(whole, out)
    drafts = (whole / "drafts.jsonl").read_bytes()
    for part in range(10):
        size = len(drafts) * (2 * part + 1) // 20
        (out / "drafts.jsonl").write_bytes(drafts[:size])
        for name in ("train.jsonl", "report.json", "README.md"):
            (out / name).unlink()
        server.asked.clear()
        assert main(command(rows, out, server.url, *more)) == 0
        assert same(whole, out), size
        lines = (out / "drafts.jsonl").read_bytes().splitlines()
        keys = [(draft["row"], draft["try"]) for draft in map(json.loads, lines)]
        assert len(set(keys)) == len(keys) == len(drafts.splitlines())
        assert len(server.asked) == len(keys) - drafts[:size].count(b"\n")
    capsys.readouterr()
    server.asked.clear()
    assert main(command(rows, out, server.url, *more)) == 0  # finished: only the report
    assert server.asked == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_the_same_command_continues(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(rows, whole, server.url)) == 0
    server.asked.clear()
    server.on_request = lambda count: os.kill(os.getpid(), number) if count == 22 else None
    assert main(command(rows, out, server.url)) == 128 + number
    assert "stopped; the same command resumes in" in capsys.readouterr().err
    assert not (out / "train.jsonl").exists()
    num_kept = len(read(out / "drafts.jsonl"))
    assert 20 <= num_kept <= 24
    server.on_request = lambda count: None
    server.asked.clear()
    assert main(command(rows, out, server.url)) == 0
    assert same(whole, out)
    assert len(server.asked) == 3 * NUM_ROWS - num_kept


def test_killed_at_ten_moments_and_continued(server: Server, rows: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(rows, whole, server.url)) == 0
    num_kept = []
    for moment in range(10):
        server.asked.clear()
        last, released = 3 + moment, threading.Event()
        server.on_request = lambda number, last=last, released=released: None if number < last else released.wait(60)
        child = os.fork()
        if child == 0:
            os._exit(main(command(rows, out, server.url)))
        while len(server.asked) < last:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        released.set()
        num_kept.append((out / "drafts.jsonl").read_bytes().count(b"\n") if (out / "drafts.jsonl").exists() else 0)
    assert num_kept == sorted(num_kept)
    assert 0 < num_kept[5] < num_kept[-1]
    assert not (out / "train.jsonl").exists()
    server.on_request = lambda number: None
    assert main(command(rows, out, server.url)) == 0
    assert same(whole, out)
    assert len({(draft["row"], draft["try"]) for draft in read(out / "drafts.jsonl")}) == 3 * NUM_ROWS


def test_a_server_that_fails_loses_nothing(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(rows, whole, server.url)) == 0
    server.faults = ["unauthorized"] * 4
    assert main(command(rows, out, server.url, "--teacher", "mistyped")) == 1  # without drafts nothing is begun
    capsys.readouterr()
    server.faults = [None] * 13 + ["error"] + [None] * 2
    assert main(command(rows, out, server.url, "--retries", "0")) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rim-peft: error")]
    assert len(errors) == 1
    assert "HTTP 500 (out of memory) after 1 attempt" in errors[0]
    assert len(read(out / "drafts.jsonl")) == 15
    assert main(command(rows, out, server.url, "--timeout", "9")) == 0  # patience may change
    assert same(whole, out)


def test_a_full_disk_is_one_error_and_the_same_command_continues(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("rim_peft.chains.progress.Journal.append", fail)
        assert main(command(rows, out, server.url)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rim-peft: error: output_dir: no room to write in")
    assert error.endswith(f"make room, and resume the run in {out} with the same command.")
    assert main(command(rows, out, server.url)) == 0


def test_other_options_are_refused(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(rows, out, server.url)) == 0
    capsys.readouterr()
    assert main(command(rows, out, server.url, "--top-p", "0.5", "--seed", "1")) == 1
    error = capsys.readouterr().err
    assert "seed was 0, is 1" in error
    assert "top_p was 0.95, is 0.5" in error
    assert main(command(rows, out, server.url, "--teacher", "other")) == 1
    assert "teacher was 'tiny', is 'other'" in capsys.readouterr().err
    rows.write_text(rows.read_text().replace("20 + 1", "21 + 1").replace("42", "44"))
    assert main(command(rows, out, server.url)) == 1
    assert "rows_sha256 was" in capsys.readouterr().err


def test_a_teacher_that_is_never_right(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.teach = lambda prompt, seed: ("1+1=3\n#### 3", "stop")
    assert main(command(rows, tmp_path / "out", server.url)) == 1
    captured = capsys.readouterr()
    assert (
        "teacher: must get at least one of 20 questions right, got none in 60 chains (wrong answer: 60)" in captured.err
    )
    assert "with a chain: 0 (0.0 %)" in captured.out
    assert {row["steps"] for row in read(tmp_path / "out" / "train.jsonl")} == {None}


def test_rows_without_answers_are_errors_or_dropped_and_counted(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rows.open("a") as file:
        file.write('{"problem": "21 + 1, doubled?"}\n')
    out = tmp_path / "out"
    assert main(command(rows, out, server.url)) == 1
    assert "row 20: rows.jsonl line 21: target: the row has no such field" in capsys.readouterr().err
    assert server.asked == []
    assert main(command(rows, out, server.url, "data.on_bad_rows=drop")) == 0
    assert "bad rows dropped: 1 of 21" in capsys.readouterr().out
    assert len(read(out / "train.jsonl")) == NUM_ROWS


def test_rows_with_steps_keep_them(server: Server, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    own = {"question": "1 + 1, doubled?", "steps": ["1+1=2", "2*2=4"], "answer": "4"}
    rows.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (own, {**own, "question": "2 + 1, doubled?", "steps": None, "answer": "6"})
        )
    )
    assert main(command(rows, tmp_path / "out", server.url, "--num-chains", "9")) == 0
    first, second = read(tmp_path / "out" / "train.jsonl")
    assert (first["steps"], first["chain_from"]) == (own["steps"], "given")
    assert second["chain_from"] == "teacher"
    assert main(command(rows, tmp_path / "new", server.url, "--num-chains", "9", "--replace-steps")) == 0
    assert {row["chain_from"] for row in read(tmp_path / "new" / "train.jsonl")} == {"teacher"}


def test_rows_that_all_have_steps_need_no_teacher(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "steps": ["1+1=2"], "answer": "2"}\n')
    assert main(command(tmp_path / "rows.jsonl", tmp_path / "out", server.url)) == 0
    out = capsys.readouterr().out
    assert "questions: 0, with a chain: 0, without: 0" in out
    assert "rows that had steps: 1 (unchanged)" in out
    assert server.asked == []


def test_chats_templates_and_examples(server: Server, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text("Q: {question}\nA: {think}\n")
    shown = {"question": "30 + 1, doubled?", "steps": ["30+1=31", "31*2=62"], "answer": "62"}
    (tmp_path / "shown.jsonl").write_text(json.dumps(shown) + "\n")
    more = ("--template", str(tmp_path / "template.txt"), "--examples", str(tmp_path / "shown.jsonl"))
    assert main(command(rows, tmp_path / "text", server.url, *more)) == 0
    path, _, payload = server.asked[0]
    assert path == "/v1/completions"
    assert payload["prompt"].startswith("Q: 30 + 1, doubled?\nA: {think}\n30+1=31\n31*2=62\n#### 62\n\nQ: ")
    assert payload["stop"] == ["\nQ:"]
    server.asked.clear()
    assert main(command(rows, tmp_path / "chat", server.url, *more, "--chat", "--stop", r"\n\n")) == 0
    path, _, payload = server.asked[0]
    assert path == "/v1/chat/completions"
    assert [message["role"] for message in payload["messages"]] == ["user", "assistant", "user"]
    assert payload["stop"] == ["\n\n"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "-1"], "temperature: must be from 0 to 100, got -1.0"),
        (["--split-steps", "words"], "split_steps: must be one of lines"),
        (["data.max_length=3"], "data.max_length: must be one of data.task"),
        (["model.dtype=float32"], "model.dtype: must be omitted with --url"),
        (["data.on_bad_rows=keep"], "data.on_bad_rows: must be 'error' or 'drop', got 'keep'"),
        (["data.task=gsm8k"], "bad row"),
        (["--url", "ftp://x"], "url: must be an address such as"),
        (["--template", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_options_are_one_error(
    server: Server, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(rows, tmp_path / "out", server.url, *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "drafts.jsonl").exists()
    assert server.asked == []


def test_a_model_on_this_machine_by_the_command(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model is never right, which is counted; its chains are the same in any run and order of rows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_base(tmp_path / "base")
    options = ["--teacher", str(tmp_path / "base"), "--num-chains", "2", "--max-new-tokens", "8", "data.train_rows=6"]
    assert main(["chains", str(rows), "--output-dir", str(tmp_path / "one"), *options]) == 1
    assert "cut at max_new_tokens: 12" in capsys.readouterr().out
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(f"{line}\n" for line in rows.read_text().splitlines()[5::-1]))
    assert main(["chains", str(backwards), "--output-dir", str(tmp_path / "two"), *options]) == 1
    one, two = (
        {(d["row"], d["try"]): d["text"] for d in read(tmp_path / name / "drafts.jsonl")} for name in ("one", "two")
    )
    assert one == {(5 - row, number): text for (row, number), text in two.items()}
    assert len(set(one.values())) == 12


def build_digit_writer() -> Any:
    """A random model that writes only lines of the digits 1 and 2, so that it is right now and then."""
    model = build_base()
    allowed = [*build_tokenizer()("12\n")["input_ids"], EOS_ID]
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
        model.lm_head.bias = torch.nn.Parameter(torch.full((VOCAB_SIZE,), -100.0))
        model.lm_head.bias[allowed] = 0.0
    return model


def write_locally(folder: Path) -> dict[str, Any]:
    """Let a local model write chains, some of them after a hint, and return the report."""
    prompts = Prompts(OwnRows(split_steps="lines", answer_from="last-number"), template="{question}\n")
    options = ChainOptions(num_chains=4, hinted_tries=1, max_new_tokens=24, batch_size=3, keep="all", temperature=1.0)
    examples = {row: Example(f"{row} + 1?", str(1 + row % 2)) for row in range(7)}
    source, task = SourceRows(examples, [], ""), get_task("rows", answer_rule="last-number-float")
    teacher = LocalTeacher(build_digit_writer(), build_tokenizer(), prompts.templates, options)
    report = write_chains(folder, source, task, prompts, options, lambda: teacher, described={"teacher": "tiny"})
    assert report["drafts"]["written"] >= 28
    assert 0 < report["drafts"]["right"] < report["drafts"]["written"]
    return report


def test_a_local_teacher_continues_with_the_same_chains(tmp_path: Path) -> None:
    write_locally(tmp_path / "whole")
    drafts = (tmp_path / "whole" / "drafts.jsonl").read_bytes()
    for size in (len(drafts) // 7, len(drafts) // 2, len(drafts) - 3):
        out = tmp_path / f"cut at {size}"
        out.mkdir()
        (out / "options.json").write_bytes((tmp_path / "whole" / "options.json").read_bytes())
        (out / "drafts.jsonl").write_bytes(drafts[:size])
        write_locally(out)
        assert same(tmp_path / "whole", out)
        assert texts(out) == texts(tmp_path / "whole")


def texts(folder: Path) -> dict[tuple[int, int], str]:
    """Return all chains of a folder by row and try, each of which it must have once."""
    drafts = read(folder / "drafts.jsonl")
    found = {(draft["row"], draft["try"]): draft["text"] for draft in drafts}
    assert len(found) == len(drafts)
    return found


def touches(event: str, arguments: Any, folder: Path) -> bool:
    """Tell whether an audited event opens a file of a folder for writing, or renames one."""
    if event not in ("open", "os.rename") or not str(arguments[0]).startswith(f"{folder}/"):
        return False
    return event == "os.rename" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


@pytest.mark.slow
def test_a_local_teacher_killed_at_ten_moments_continues_with_the_same_chains(tmp_path: Path) -> None:
    """Killed before a write or a rename, from the first to the last one, each time in a new process."""
    whole = tmp_path / "whole"

    def write(folder: Path, *, killed_at: int | None = None) -> int:
        """Return how often the folder was written to."""
        seen = 0

        def watch(event: str, arguments: Any) -> None:
            nonlocal seen
            if touches(event, arguments, folder):
                if seen == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(watch)  # of this process alone, which ends soon
        write_locally(folder)
        return seen

    counted = tmp_path / "counted"
    assert run_forked(lambda: print(write(whole), file=counted.open("w"))) == (0, "")
    num_moments = int(counted.read_text())
    assert num_moments > 20
    for part in range(10):
        moment, out = part * (num_moments - 1) // 9, tmp_path / f"killed at {part}"
        assert run_forked(lambda out=out, moment=moment: write(out, killed_at=moment))[0] == -signal.SIGKILL
        assert not (out / "README.md").exists()  # written last
        assert run_forked(lambda out=out: write(out)) == (0, "")
        assert same(whole, out), moment
        assert texts(out) == texts(whole), moment


@dataclass(frozen=True)
class OwnLoad(Task):
    """A task with a ``load`` from before there was the option ``whole``."""

    name = "own-load"
    answer_rules = ("last-number-float",)

    def load(self, split: str, *, path: str | None = None, streaming: bool = False) -> Any:
        rows = [json.loads(line) for line in Path(str(path)).read_text().splitlines()]
        return Dataset.from_list([{"question": row["problem"], "answer": str(row["target"])} for row in rows])


def test_a_task_whose_load_lacks_an_option(
    server: Server, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"data.task={__name__}:OwnLoad"
    assert main(command(rows, tmp_path / "out", server.url, name)) == 0
    assert len(read(tmp_path / "out" / "train.jsonl")) == NUM_ROWS
    assert "task 'own-load' has its own `load`, which lacks the option `whole`" in caplog.text


def test_questions_that_are_chats(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    chats = [[{"role": "system", "content": "Add."}, {"role": "user", "content": f"{n} + 1, doubled?"}] for n in (1, 2)]
    rows.write_text("".join(json.dumps({"prompt": chat, "completion": "#"}) + "\n" for chat in chats))
    assert main(command(rows, out, server.url)) == 1
    assert "chat: must be given for questions of chat messages. Ask with --chat." in capsys.readouterr().err
    server.teach = lambda prompt, seed: ("Think.\n#### #", "stop")
    assert main(command(rows, out, server.url, "--chat")) == 0
    assert server.asked[0][2]["messages"][0] == chats[0][0]
    loaded = get_task("rows").load("train", path=str(out), whole=True)
    assert loaded["question"][:] == chats
    assert loaded["steps"][:] == [["Think."]] * 2
