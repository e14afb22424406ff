"""``rim-peft chains``: have a teacher write steps for rows that have none."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_peft.cli.console import not_negative, path, positive

if TYPE_CHECKING:
    from rim_peft.chains.options import ChainOptions
    from rim_peft.chains.prompts import Prompts
    from rim_peft.chains.server import Endpoint
    from rim_peft.chains.teachers import Teacher
    from rim_peft.recipe import DataOptions, ModelOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "rows", metavar="ROWS", type=path, help="file, folder or Hub id of rows with question and answer"
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="how rows and teacher are loaded, as in a recipe: data.task, data.options.NAME, data.train_split, "
        "data.train_rows, data.on_bad_rows; model.dtype, model.quantization, model.revision, ...",
    )
    parser.add_argument("--output-dir", metavar="DIR", type=path, required=True, help="new folder, or one to resume")
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument(
        "--teacher",
        metavar="NAME",
        type=path,
        required=True,
        help="folder, Hub id or name of a causal language model; with --url the server's name for its model",
    )
    teacher.add_argument("--url", help="server that speaks OpenAI's protocol, such as http://localhost:8000/v1")
    teacher.add_argument("--chat", action="store_true", help="ask with chat messages, by the teacher's chat template")
    teacher.add_argument(
        "--timeout", metavar="SECONDS", type=positive, default=300, help="longest wait for an answer (%(default)s)"
    )
    teacher.add_argument(
        "--retries", metavar="N", type=not_negative, default=4, help="attempts after a failed one (%(default)s)"
    )
    _add_prompt_arguments(parser.add_argument_group("prompt"))
    _add_chain_arguments(parser.add_argument_group("chains"))
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def _add_prompt_arguments(group: Any) -> None:
    group.add_argument(
        "--template", metavar="FILE", type=path, help="text with {question} (default: one for --split-steps)"
    )
    group.add_argument(
        "--examples", metavar="ROWS", type=path, help="rows with question, steps and answer, shown before each question"
    )
    group.add_argument(
        "--num-examples", metavar="N", type=positive, default=8, help="number of them, from the start (%(default)s)"
    )
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        help=r"text at which a chain ends; \n is a newline; may be given more than once (default: the start of the "
        "next question)",
    )


def _add_chain_arguments(group: Any) -> None:
    from rim_peft.chains.options import KEEPS, ChainOptions

    own = ChainOptions
    group.add_argument(
        "--num-chains", metavar="N", type=positive, default=own.num_chains, help="chains per question (%(default)s)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=own.temperature,
        help="temperature of sampling; 0 takes the most likely token (%(default)s)",
    )
    group.add_argument(
        "--top-p", type=float, default=own.top_p, help="share of probability to sample from (%(default)s)"
    )
    group.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=positive,
        default=own.max_new_tokens,
        help="maximum tokens of a chain (%(default)s)",
    )
    group.add_argument("--seed", type=not_negative, default=own.seed, help="seed of sampling (%(default)s)")
    group.add_argument(
        "--batch-size", metavar="N", type=positive, default=own.batch_size, help="questions per batch (%(default)s)"
    )
    group.add_argument(
        "--split-steps",
        metavar="HOW",
        default=own.split_steps,
        help="lines, sentences, equations, numbered or regex:PATTERN, as in docs/your-data.md (%(default)s)",
    )
    group.add_argument(
        "--answer-from",
        metavar="WHERE",
        default=own.answer_from,
        help="where a chain has its answer: after:TEXT, boxed or last-number (%(default)s)",
    )
    group.add_argument("--keep", choices=KEEPS, default=own.keep, help="which right chains to keep (%(default)s)")
    group.add_argument(
        "--hinted-tries",
        metavar="N",
        type=not_negative,
        default=own.hinted_tries,
        help="further tries with the answer shown, for questions without a right chain (%(default)s)",
    )
    group.add_argument(
        "--hint-template", metavar="FILE", type=path, help="the question with its answer: {question} and {answer}"
    )
    group.add_argument("--replace-steps", action="store_true", help="write chains for rows that have steps too")


def run(args: argparse.Namespace) -> int:
    """Write chains, and print the report."""
    from rim_peft.chains.options import ChainOptions
    from rim_peft.chains.report import report_text
    from rim_peft.chains.server import Endpoint
    from rim_peft.chains.writing import read_source, write_chains
    from rim_peft.cli.console import complain, quiet_model_loading, results_only, resumable, say
    from rim_peft.escaping import json_text
    from rim_peft.tasks import get_task

    options = ChainOptions(**{name: getattr(args, name) for name in ChainOptions.__dataclass_fields__})
    data, model = _read_overrides(args)
    prompts = _prompts(args, options)
    stops = tuple(stop.replace("\\n", "\n") for stop in args.stop) if args.stop else prompts.stops
    key = os.environ.get("OPENAI_API_KEY")
    endpoint = Endpoint(args.url, key, timeout_seconds=args.timeout, retries=args.retries) if args.url else None
    folder = Path(args.output_dir)
    task = get_task(data.task, **data.options)
    quiet_model_loading()
    with resumable(f"the same command resumes in {folder}"), results_only():
        model = _pinned(model, folder, args.url)
        report = write_chains(
            folder,
            read_source(task, data),
            task,
            prompts,
            options,
            lambda: _teacher(model, endpoint, prompts, options, stops),
            described=_described(args, data, model, stops),
            progress=True,
        )
    say(json_text(report, indent=2) if args.json else f"rows: {folder}\n{report_text(report)}")
    if report["questions"] and not report["with_chain"]:
        complain(_no_chain(folder, report))
        return 1
    return 0


def _no_chain(folder: Path, report: dict[str, Any]) -> str:
    listed = ", ".join(f"{reason}: {count}" for reason, count in report["drafts"]["rejected"].items())
    return (
        f"rim-peft: error: teacher: must get at least one of {report['questions']} questions right, got none in "
        f"{report['drafts']['written']} chains ({listed}). Read some in {folder / 'drafts.jsonl'}; then give a "
        "stronger teacher, --examples, another --template or --answer-from, or a larger --max-new-tokens, and "
        "another folder."
    )


def _read_overrides(args: argparse.Namespace) -> tuple[DataOptions, ModelOptions]:
    """Return sections ``data`` and ``model`` with what ``KEY=VALUE`` changes.

    Raises:
        ValueError: a key or value is not allowed.
    """
    from rim_peft.recipe import DataOptions, ModelOptions
    from rim_peft.recipe.syntax import WrongTypeError, convert, hints_of, read_override

    known: dict[str, Sequence[str]] = {
        "data": ("task", "options", "train_split", "train_rows", "on_bad_rows"),
        "model": [name for name in hints_of(ModelOptions) if name not in ("name_or_path", "config")],
    }
    kinds: dict[str, Any] = {"data": DataOptions, "model": ModelOptions}
    given: dict[str, dict[str, Any]] = {"data": {}, "model": {}}
    for text in args.overrides:
        key, value = read_override(text)
        section, _, name = key.partition(".")
        name, _, inner = name.partition(".")
        if name not in known.get(section, ()) or (inner and name != "options"):
            listed = ", ".join(f"{of}.{one}" for of, names in known.items() for one in names)
            raise ValueError(f"{key}: must be one of {listed} (data.options.NAME for an option of the task).")
        if inner:
            _put(given["data"].setdefault("options", {}), inner.split("."), value)
            continue
        try:
            given[section][name] = convert(value, hints_of(kinds[section])[name])
        except WrongTypeError as error:
            raise ValueError(f"{key}: {error}") from None
    if args.url is not None and given["model"]:
        raise ValueError(f"model.{next(iter(given['model']))}: must be omitted with --url, whose server has the model.")
    data = DataOptions(path=args.rows, validation_rows=0, **given["data"])
    return data, ModelOptions(name_or_path=args.teacher, **given["model"])


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value


def _prompts(args: argparse.Namespace, options: ChainOptions) -> Prompts:
    from rim_peft.chains.prompts import HINT, Prompts
    from rim_peft.run.rows import read_examples
    from rim_peft.run.scoring import read_text
    from rim_peft.tasks.rows import OwnRows

    examples = []
    if args.examples is not None:
        rows = OwnRows(split_steps=options.split_steps).load("train", path=args.examples, whole=True)
        examples = read_examples(rows, on_bad_rows="error", limit=args.num_examples)
    return Prompts(
        OwnRows(split_steps=options.split_steps, answer_from=options.answer_from),
        template=None if args.template is None else read_text(args.template),
        hint=HINT if args.hint_template is None else read_text(args.hint_template),
        examples=examples,
        is_chat=args.chat,
    )


def _pinned(model: ModelOptions, folder: Path, url: str | None) -> ModelOptions:
    """Return the options with a named base pinned to its source, in a resumed folder to the one it was begun with."""
    from dataclasses import replace

    from rim_peft.chains.progress import check_begun
    from rim_peft.run.named_bases import parse_name, pin_name

    name = str(model.name_or_path)
    if url is not None or parse_name(name) is None:
        return model
    kept = str((check_begun(folder) or {}).get("teacher", ""))
    return replace(model, name_or_path=kept if kept.startswith(f"{name}@") else pin_name(name))


def _described(
    args: argparse.Namespace, data: DataOptions, model: ModelOptions, stops: tuple[str, ...]
) -> dict[str, Any]:
    """Return what the chains depend on besides prompts and options; not where the server is, which may change."""
    from dataclasses import asdict

    loading = {f"model.{name}": value for name, value in asdict(model).items() if value}
    del loading["model.name_or_path"]
    return {
        "teacher": model.name_or_path,
        "asked_through": "a server" if args.url else "transformers",
        "rows": args.rows,
        "task": data.task,
        "task_options": data.options,
        "split": data.train_split,
        **loading,
        "stop": stops,
    }


def _teacher(
    model: ModelOptions, endpoint: Endpoint | None, prompts: Prompts, options: ChainOptions, stops: tuple[str, ...]
) -> Teacher:
    from rim_peft.chains.server import ServerTeacher
    from rim_peft.chains.teachers import LocalTeacher
    from rim_peft.run.base import load_base, to_device
    from rim_peft.run.tokenizer import load_tokenizer

    if endpoint is not None:
        return ServerTeacher(endpoint, str(model.name_or_path), prompts.templates, options, stops=stops)
    loaded: Any = load_base(str(model.name_or_path), model)
    tokenizer = load_tokenizer(model.tokenizer or str(model.name_or_path), model)
    return LocalTeacher(to_device(loaded, model).eval(), tokenizer, prompts.templates, options, stops=stops)
