"""Read rows from text, JSON and CSV files; an unreadable row does not affect the others.

Lines end at a newline. A carriage return before it and a byte order mark at the start of a line are removed. All other
characters belong to the line, including those that Python counts as line ends.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, DatasetInfo, Features, SplitGenerator, Value

from rim_peft.data.examples import ROW_ERROR, RowError

JSON_COLUMN = "json"
"""Column of rows from JSON and CSV files: the row's JSON text."""

ROW_PLACE = "row_place"
"""Column of rows from files: the row's place, such as ``train.jsonl line 7``."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed files, with pyarrow's names of what they are compressed with."""

_ROWS_PER_TABLE = 10_000
_LONGEST_CELL = 1 << 30
"""Characters of a cell of a CSV file; Python's default, 131,072, is too few for long chains of thought."""


def open_raw(file: Path) -> io.BufferedReader:
    """Open a file in binary mode, decompressed if its suffix says that it is compressed."""
    if file.suffix not in COMPRESSIONS:
        return file.open("rb")
    stream: Any = pa.input_stream(str(file), compression=COMPRESSIONS[file.suffix])
    return io.BufferedReader(stream)


class Line(NamedTuple):
    """A line: its number, counted from 1, its text, and why it could not be read."""

    number: int
    text: str
    problem: str | None


def read_lines(raw: Iterable[bytes]) -> Iterator[Line]:
    r"""Yield the lines of a file opened in binary mode.

    >>> list(read_lines([b"\xef\xbb\xbfa\r\n", b"\xff"]))[1].problem
    'not valid UTF-8 (byte 0xff at 0)'
    """
    for number, line in enumerate(raw, start=1):
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        try:
            text, problem = line.decode(), None
        except UnicodeDecodeError as error:
            problem = f"not valid UTF-8 (byte {line[error.start]:#04x} at {error.start})"
            text = line.decode(errors="replace")
        yield Line(number, text.lstrip("\ufeff"), problem)


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        RowError: it is not JSON, nests too deeply, or has a number that is too long or an object with a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        around = text[max(0, error.pos - 30) : error.pos + 30]
        raise RowError(f"not valid JSON: it breaks off at character {error.pos}, in {around!r}") from None
    except RecursionError:
        raise RowError(f"not valid JSON: it nests too deeply, in {text[:60]!r}") from None
    except RowError:
        raise
    except ValueError:  # Python limits the digits of an integer that it parses
        raise RowError(f"not valid JSON: a number has thousands of digits, in {text[:60]!r}") from None


def parse_object(text: str) -> dict[str, Any]:
    """Parse a row's JSON text.

    Raises:
        RowError: as :func:`parse_json`, or it is not an object.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise RowError(f"must be a JSON object with fields, got {text[:60]!r}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"not valid JSON: an object has the key {twice[:60]!r} twice")
    return fields


class _Row(NamedTuple):
    """A row's text, its place in the file, and why it could not be read."""

    text: str
    place: str
    problem: str | None = None


@dataclass
class RowsConfig(BuilderConfig):
    """``.jsonl`` and ``.txt`` are read by lines, ``.json`` as one document, ``.csv`` and ``.tsv`` as cells.

    ``lines_per_row`` applies to ``.txt``.
    """

    suffix: str = ".jsonl"
    lines_per_row: int = 1


class Rows(ArrowBasedBuilder):
    """Rows of text, JSON and CSV files as a builder for ``datasets``, which caches them on disk or streams them.

    Columns: the row's text (``json`` or ``text``), ``row_place``, and ``row_error`` if it could not be read.
    """

    BUILDER_CONFIG_CLASS = RowsConfig
    config: Any

    def _info(self) -> DatasetInfo:
        text = Value("string")
        name = "text" if self.config.suffix == ".txt" else JSON_COLUMN
        return DatasetInfo(features=Features({name: text, ROW_PLACE: text, ROW_ERROR: text}))

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        found = dl_manager.download(self.config.data_files)
        return [SplitGenerator(name=split, gen_kwargs={"files": list(files)}) for split, files in found.items()]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Any, pa.Table]]:
        schema = self.info.features.arrow_schema
        is_empty = True
        for number, file in enumerate(files):
            rows = self._rows(Path(file))
            count = 0
            while batch := list(islice(rows, _ROWS_PER_TABLE)):
                columns = [pa.array(column, pa.string()) for column in zip(*batch, strict=True)]
                yield (number, count), pa.table(columns, schema=schema)
                count += 1
                is_empty = False
        if is_empty:
            raise RowError("must hold rows as a list or lines, got none")

    def _rows(self, file: Path) -> Iterator[_Row]:
        if self.config.suffix == ".json":
            yield from _document_rows(file)
            return
        with open_raw(file) as raw:
            if self.config.suffix in _DELIMITERS:
                yield from _table_rows(raw, file.name, _DELIMITERS[self.config.suffix])
                return
            lines = read_lines(raw)
            size = self.config.lines_per_row if self.config.suffix == ".txt" else 1
            while group := list(islice(lines, size)):
                first, last = group[0].number, group[-1].number
                place = f"{file.name} line {first}" if first == last else f"{file.name} lines {first} to {last}"
                problem = next((line.problem for line in group if line.problem is not None), None)
                yield _Row("\n".join(line.text for line in group), place, problem)


_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def _table_rows(raw: io.BufferedReader, name: str, delimiter: str) -> Iterator[_Row]:
    """Read a table whose first line names the columns; all cells are texts, so that ``007`` stays what it is."""
    csv.field_size_limit(_LONGEST_CELL)
    # Bytes that are not UTF-8 make their row a bad one.
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    names = next(reader, [])
    if len(set(names)) < len(names):
        raise RowError(f"must name each column once in its first line, got {delimiter.join(names)[:200]!r}")
    while True:
        first = reader.line_num + 1
        cells, problem = [""], None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"not valid CSV: {error}"
        place = f"{name} line {first}" if first == reader.line_num else f"{name} lines {first} to {reader.line_num}"
        if not cells:  # an empty line
            continue
        if problem is None and len(cells) != len(names):
            problem = f"must have {len(names)} cells, as many as the first line, got {len(cells)}"
        if not _is_utf8("".join(cells)):
            problem = "not valid UTF-8"
        yield _Row(_write(dict(zip(names, cells, strict=False))), place, problem)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _document_rows(file: Path) -> Iterator[_Row]:
    """Split a JSON file into rows: a list, ``{"data": [...]}``, rows by name, or JSON lines despite the suffix."""
    # Bytes that are not UTF-8 are reported later, when their row is read.
    with open_raw(file) as raw_file:
        document = raw_file.read().decode(errors="surrogateescape").lstrip("\ufeff")
    try:
        value = json.loads(document, object_pairs_hook=_marked)
    except (ValueError, RecursionError):
        raw = document.encode(errors="surrogateescape").split(b"\n")
        lines = [line for line in read_lines(raw) if line.text.strip()]
        if len(lines) > 1 and _is_json(lines[0].text):
            for line in lines:
                yield _Row(line.text, f"{file.name} line {line.number}", line.problem)
            return
        parse_json(document)  # raises with the reason
        raise
    for index, row in enumerate(_list_of_rows(value)):
        problem = row.problem if isinstance(row, _Twice) else None
        yield _Row(_write(row), f"{file.name} item {index}", problem)


def _list_of_rows(value: Any) -> list[Any]:
    """Return the rows of a JSON document: its list, or that of its field ``data`` or ``examples``, or its objects.

    >>> _list_of_rows({"canary": "...", "examples": [{"input": "a"}]}), _list_of_rows({"example1": {"input": "a"}})
    ([{'input': 'a'}], [{'input': 'a'}])
    """
    if isinstance(value, dict):
        listed = next((value[name] for name in ("data", "examples") if isinstance(value.get(name), list)), None)
        if listed is not None:
            return listed
        if value and not isinstance(value, _Twice) and all(isinstance(row, dict) for row in value.values()):
            return list(value.values())
    return value if isinstance(value, list) else [value]


class _Twice(dict[str, Any]):
    """An object with a key twice: an error of its row, not of the document."""

    problem: str


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return _unique(pairs)
    except RowError as error:
        fields = _Twice(pairs)
        fields.problem = str(error)
        return fields


def _write(row: Any) -> str:
    """Return a row's JSON text; escaped if it has a character that UTF-8 cannot encode."""
    text = json.dumps(row, ensure_ascii=False)
    return text if _is_utf8(text) else json.dumps(row)


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except RowError:
        return False
    return True
