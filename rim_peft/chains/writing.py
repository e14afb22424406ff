"""Rows of question and answer → rows with steps: ask the teacher, judge, choose, write the folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rim_peft.chains.judging import Verdict, choose, judge, mark_duplicates
from rim_peft.chains.options import ChainOptions
from rim_peft.chains.progress import DRAFTS_FILE, Journal, Noted, begin, check_begun
from rim_peft.chains.prompts import Prompts
from rim_peft.chains.report import make_report, render_card
from rim_peft.chains.teachers import Request, Teacher
from rim_peft.data.chats import Chat
from rim_peft.data.examples import BadRowsError, Example, RowError, log_dropped, read_example
from rim_peft.escaping import json_text
from rim_peft.recipe import DataOptions
from rim_peft.run.rows import fingerprint
from rim_peft.tasks.task import Task
from rim_peft.training.files import explain_write_errors, hold, replace_file, write_text
from rim_peft.training.interruption import Interrupted, SignalWatch

ROWS_FILE, REPORT_FILE, CARD_FILE = "train.jsonl", "report.json", "README.md"


@dataclass(frozen=True)
class SourceRows:
    """Rows to write chains for.

    Attributes:
        examples: readable rows by their index.
        bad: index and reason of each unreadable row.
        sha256: hash of all rows.
    """

    examples: Mapping[int, Example]
    bad: Sequence[tuple[int, str]]
    sha256: str


def read_source(task: Task, data: DataOptions) -> SourceRows:
    """Read all rows of ``data.train_split``, with those that a training would use for validation.

    Raises:
        BadRowsError: a row has no answer, or is bad otherwise, and ``on_bad_rows`` is ``"error"``.
        ValueError: there are no good rows.
        FileNotFoundError: the path or split does not exist.
    """
    rows: Any = task.load_whole(data.train_split, path=data.path)
    if data.train_rows is not None:
        rows = rows.select(range(min(data.train_rows, len(rows))))
    examples: dict[int, Example] = {}
    bad: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        try:
            example = read_example(row)
            task.about(example.question).is_correct(example.answer, example.answer)
            examples[index] = example
        except RowError as error:
            bad.append((index, str(error)))
        except ValueError as error:
            bad.append((index, f"answer: cannot be read by answer_rule {task.answer_rule!r}: {error}"))
    if bad and (data.on_bad_rows == "error" or not examples):
        raise BadRowsError(bad)
    log_dropped(bad, len(bad) + len(examples))
    return SourceRows(examples, bad, fingerprint(rows)["sha256"])


def write_chains(
    folder: Path,
    source: SourceRows,
    task: Task,
    prompts: Prompts,
    options: ChainOptions,
    make_teacher: Callable[[], Teacher],
    *,
    described: Mapping[str, Any],
    progress: bool = False,
) -> dict[str, Any]:
    """Write a folder with ``train.jsonl``, a card and a report; the same call resumes an unfinished folder.

    Args:
        folder: a new or empty folder, or one that the same call has begun.
        source: the rows.
        task: the rows' task, which compares answers.
        prompts: how the teacher is asked and read.
        options: how chains are sampled and chosen.
        make_teacher: returns the teacher; called once there is something to write.
        described: what else decides the result, such as the teacher's name; a folder is only resumed with the same.
        progress: show a progress bar on stderr.

    Returns:
        The report.

    Raises:
        Interrupted: a signal arrived; what was written is kept.
        ServerError: a teacher's server cannot be used; what was written is kept.
        ValueError: the folder holds something else, or was begun with other options.
        InUseError: another process uses the folder.
    """
    check_begun(folder)
    settings = {
        **described,
        "rows_sha256": source.sha256,
        "template": prompts.text,
        "hint_template": prompts.hint,
        "examples": [asdict(example) for example in prompts.examples],
        "chat": prompts.is_chat,
        **asdict(options),
    }
    resume = "the same command"
    with hold(folder), explain_write_errors(folder, resume=resume), SignalWatch("stopping") as signals:
        begin(folder, settings)
        journal = Journal(folder / DRAFTS_FILE)
        writing = _Writing(source, task, prompts, options, journal, make_teacher, signals)
        writing.run(progress=progress)
        verdicts = {row: mark_duplicates(writing.verdicts(row)) for row in writing.asked}
        rows = list(_chosen_rows(source, verdicts, options))
        report = make_report(source.examples, source.bad, verdicts, journal.noted, rows, options)
        _write_rows(folder / ROWS_FILE, rows)
        write_text(folder / REPORT_FILE, json_text(report, indent=1) + "\n")
        write_text(folder / CARD_FILE, render_card(folder.resolve().name, report, settings))
    return report


@dataclass
class _Writing:
    """The drafts of one folder, in the making."""

    source: SourceRows
    task: Task
    prompts: Prompts
    options: ChainOptions
    journal: Journal
    make_teacher: Callable[[], Teacher]
    signals: SignalWatch
    _verdicts: dict[tuple[int, int], Verdict] = field(default_factory=dict)

    @cached_property
    def teacher(self) -> Teacher:
        return self.make_teacher()

    @cached_property
    def asked(self) -> dict[int, Example]:
        """Rows that chains are written for, by index."""
        examples = self.source.examples
        return {row: example for row, example in examples.items() if self.options.replace_steps or not example.steps}

    def run(self, *, progress: bool) -> None:
        """Write all drafts that the journal lacks."""
        options, rows = self.options, list(self.asked)
        for example in self.asked.values():
            self.prompts.ask(example)  # fails before the teacher is loaded
        total = len(rows) * options.num_chains
        total += sum(number > options.num_chains for _, number in self.journal.noted)
        initial = len(self.journal.noted)
        with tqdm(total=total, initial=initial, desc="Writing chains", unit="chain", disable=not progress) as bar:
            for start in range(0, len(rows), options.batch_size):
                batch = rows[start : start + options.batch_size]
                for number in range(1, options.num_chains + 1):
                    self._write(batch, number, bar)
                for number in range(options.num_chains + 1, options.num_chains + options.hinted_tries + 1):
                    failed = [row for row in batch if all(v.reason for v in self.verdicts(row, before=number).values())]
                    bar.total += sum((row, number) not in self.journal.noted for row in failed)
                    self._write(failed, number, bar)

    def verdicts(self, row: int, *, before: int | None = None) -> dict[int, Verdict]:
        """Return the verdicts on a row's drafts by try."""
        tries = range(1, self.options.num_chains + self.options.hinted_tries + 1)
        found = {}
        for number in tries:
            if (row, number) in self.journal.noted and (before is None or number < before):
                found[number] = self._verdict(row, number)
        return found

    def _verdict(self, row: int, number: int) -> Verdict:
        if (row, number) not in self._verdicts:
            draft = self.journal.noted[row, number].draft
            self._verdicts[row, number] = judge(draft, self.asked[row], self.task, self.prompts.reader)
        return self._verdicts[row, number]

    def _write(self, batch: Sequence[int], number: int, bar: Any) -> None:
        """Write one draft of each row of a batch, and note them together."""
        missing = [row for row in batch if (row, number) not in self.journal.noted]
        if not missing:
            return
        rows = batch if self.teacher.needs_whole_batches else missing
        requests = [self._request(row, number) for row in rows]
        started, written = time.monotonic(), {}
        try:
            for index, draft in self.teacher.write(requests, lambda: self.signals.received is not None):
                written[rows[index], number] = draft
        finally:
            seconds = (time.monotonic() - started) / max(len(written), 1)
            self.journal.append((key, Noted(draft, seconds)) for key, draft in written.items())
        bar.update(sum((row, number) in written for row in missing))
        if self.signals.received is not None:
            raise Interrupted(self.signals.received)

    def _request(self, row: int, number: int) -> Request:
        example = self.asked[row]
        question = self.prompts.ask(example, hinted=number > self.options.num_chains)
        return Request(question, seed_of(self.options.seed, example, number))


def seed_of(seed: int, example: Example, number: int) -> int:
    """Return the seed of one question and try, whatever the order of the rows; it has 31 bits, which servers take."""
    text = json.dumps([seed, number, example.question], ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def _chosen_rows(
    source: SourceRows, verdicts: Mapping[int, Mapping[int, Verdict]], options: ChainOptions
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the output: one for each kept chain, one without steps for each question without a chain."""
    for row, example in source.examples.items():
        question = example.question if isinstance(example.question, str) else list(example.question)
        beside = example.question.columns() if isinstance(example.question, Chat) else {}
        shared = {"row": row, "question": question, **beside}
        if row not in verdicts:
            yield {**shared, "steps": list(example.steps or ()), "answer": example.answer, **_origin("given")}
            continue
        kept = choose(verdicts[row], options.keep)
        for number in kept:
            origin = _origin("teacher" if number <= options.num_chains else "hinted", number)
            yield {**shared, "steps": list(verdicts[row][number].steps), "answer": example.answer, **origin}
        if not kept:
            yield {**shared, "steps": None, "answer": example.answer, **_origin(None)}


def _origin(of: str | None, number: int | None = None) -> dict[str, Any]:
    return {"chain_from": of, "chain_try": number}


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{json_text(row)}\n" for row in rows)

    replace_file(path, write)
