"""Names and texts that try to be markup, in every page, card and terminal line that shows them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from rim_peft.cli.console import quiet_libraries
from rim_peft.cli.main import main
from rim_peft.comparison.plots import Plot
from rim_peft.comparison.plots.style import new_figure, plain, plot_style, save
from rim_peft.comparison.report import render_markdown, render_page
from rim_peft.data.examples import Templates
from rim_peft.escaping import code_span, fence, json_text, markdown, page, visible
from rim_peft.export.card import render_adapter_card
from rim_peft.export.card import render_card as render_export_card
from rim_peft.export.checking import CheckResult
from rim_peft.export.folder import Prompts
from rim_peft.export.record import ExportRecord
from rim_peft.export.tokens import MemoryTokens
from rim_peft.run.record import render_run_card
from rim_peft.training.attachment import write_card
from rim_peft.training.files import write_text
from rim_peft.tuner.card import CardText, Usage, name_adapter, name_base, render_card
from tests.unit.comparison.results_document import ablate_document, compare_document
from tests.unit.run.test_card import record

HOSTILE = {
    "html": "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></td></table>",
    "comment": "<!-- --> &lt;b&gt; <!doctype x> <?x?>",
    "bar": "a|b||c\\|d",
    "backticks": "a`b``c```d",
    "fence": "x\n```\n# Heading\n~~~\n",
    "link": "[here](javascript:alert(1)) ![x](http://x/y.png) <http://x> [a]: http://x",
    "lines": "a\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n---\n# b",
    "front matter": "x\n---\nlicense: mit\nmodel-index: []\n---\n",
    "quotes": '"\'\\"\n\'\'\'"""',
    "ansi": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b31m\r\x08\x00\x7f",
    "bidi": "\u202eevil\u202c \u2066x\u2069",
    "surrogate": "half \ud83d, other half \ude00, byte \udcff",
    "list": "- a\n1. b\n> c\n    d",
    "details": "</summary></details><details>",
    "maths": "$x$ $$\\frac{1}{2}$$ \\(y\\)",
    "yaml": "!!python/object/apply:os.system ['x'] &a *a {b: c} # d",
}
CALM = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What no output may hold."""

each_text = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())


def assert_calm(text: str) -> None:
    assert CALM.findall(text) == []
    text.encode("utf-8")


def tokens_of(text: str) -> list[Any]:
    """All of a Markdown text's tokens, those inside of others too, with a parser of its own kind."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    found = []
    for token in parser.parse(text):
        found += [token, *(token.children or ())]
    return found


def shape(text: str) -> list[tuple[str, str]]:
    """Everything of a Markdown text but its words: what an innocent name gives too."""
    assert_calm(text)
    for line in text.splitlines():
        if line.startswith("|"):  # which no fence of ours does
            assert line.endswith("|")
    hidden = ("text", "softbreak", "code_inline", "inline")
    return [
        (token.type, token.content if token.type.startswith("html") else "")
        for token in tokens_of(text)
        if token.type not in hidden
    ]


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body, as the Hub takes them apart."""
    assert_calm(card)
    ModelCard(card)
    found = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1]), found[2]


def assert_code_compiles(body: str) -> None:
    code = [token.content for token in tokens_of(body) if token.type == "fence" and token.info == "python"]
    assert len(code) == 1
    ast.parse(code[0].replace("= ...", "= None"))


@each_text
def test_every_kind_of_output_has_one_function(text: str) -> None:
    for shown in (visible(text), json_text({text: text}), markdown(text), code_span(text), fence(text, ""), page(text)):
        assert_calm(shown)
    assert json.loads(json_text({text: [text]}, indent=1)) == {text: [text]}
    assert [token.type for token in tokens_of(fence(text, "bash"))] == ["fence"]
    for within in (markdown(text), code_span(text, in_table=True)):
        assert "\n" not in within
        cells = [
            token.type for token in tokens_of(f"| a | b |\n|---|---|\n| {within} | x |") if token.type == "td_open"
        ]
        assert len(cells) == 2
    kinds = {token.type for token in tokens_of(markdown(text))}
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}
    kinds = {token.type for token in tokens_of(f"x {code_span(text)} y")}
    assert kinds == {"paragraph_open", "paragraph_close", "inline", "text", "code_inline"}


def adapter_card(text: str) -> str:
    usage = Usage(text, text, has_tokenizer=True, template=f"{text.replace('{', '')}{{question}}", question=text)
    return render_card(text, CardText("An adapter.", usage, {"More": "words"}))


def run_card(text: str) -> str:
    validation = {"answer_rule": text, "accuracy": 0.25, "standard_error": 0.0625, "num_rows": 48}
    data = {
        "task": text,
        "path": text,
        "prompt_template": f"{text}{{question}}",
        "train": {"num_rows": 9, "sha256": text},
        "validation": {"num_rows": 9},
    }
    changes = {
        "base": text,
        "data": data,
        "metrics": {"validation": validation, "best": {"stage": text, "step": 7}},
        "versions": {text: text},
        "hardware": {"gpus": [text, text]},
        "command": ["rim-peft", "train", text, f"output_dir={text}"],
    }
    held = re.sub("[\0\ud800-\udfff]", "", text)  # a recipe with these is refused before there is a run
    return render_run_card(text, record(**changes), yaml.safe_dump({"model": {"revision": held}, "note": held}))


CHECKED = CheckResult(num_prompts=2, num_equal=2, num_equal_unguarded=2, num_near_ties=0, num_near_ties_unguarded=0)
PLACES = {"prompt": False, "chat": False}


def memory_tokens(text: str) -> MemoryTokens:
    return MemoryTokens(names=(text, "<m>", "</b>"), ids=(5, 6, 7), num_blocks=2, block_size=2)


def export_card(text: str) -> str:
    memory = memory_tokens(text)
    template = Templates(prompt=f"{text.replace('{', '').replace('}', '')}{{question}}")
    export = ExportRecord(memory, PLACES, f"folder/{text}", text, text, text, True)
    return render_export_card(
        Path("out", text.replace("/", "").replace("\0", "")), export, Prompts([text], template, 4), CHECKED
    )


def lora_card(text: str) -> str:
    template = Templates(prompt=f"{text.replace('{', '').replace('}', '')}{{question}}")
    return render_adapter_card(text, memory_tokens(text), Prompts([text], template, 4), CHECKED, places=PLACES)


@each_text
@pytest.mark.parametrize("render", [adapter_card, run_card, export_card, lora_card], ids=lambda one: one.__name__)
def test_cards(render: Callable[[str], str], text: str) -> None:
    (data, body), (innocent, calm_body) = split_card(render(text)), split_card(render("a-name"))
    assert set(data) - {"base_model", "datasets"} == set(innocent) - {"base_model", "datasets"}
    assert "license" not in data
    assert shape(body) == shape(calm_body)
    if render is not lora_card:
        assert_code_compiles(body)


@each_text
def test_a_card_takes_another_name(text: str) -> None:
    data, body = split_card(name_base(name_adapter(adapter_card(text), "owner/name"), "owner/base"))
    assert data["base_model"] == "owner/base"
    assert "\n# owner/name\n" in body
    assert 'adapter = "owner/name"  # this folder' in body
    assert 'from_pretrained("owner/base", revision=' in body
    assert "rim-peft generate owner/name " in body
    assert_code_compiles(body)


def test_the_card_of_a_checkpoint(tmp_path: Path) -> None:
    write_card(tmp_path, name=HOSTILE["surrogate"], stage="GroundingTrainer", base=HOSTILE["html"])
    _, body = split_card((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert "half \\\\ud83d, other half \\\\ude00" in body


def poison(value: Any, text: str) -> Any:
    """A results document whose free texts are all this one; keys and words that the report goes by stay."""
    free = {"name", "label", "description", "folder", "cpu", "torch", "python", "platform", "started", "sha256"}
    if isinstance(value, dict):
        return {key: text if key in free and isinstance(of, str) else poison(of, text) for key, of in value.items()}
    return [poison(of, text) for of in value] if isinstance(value, list) else value


def poisoned(document: dict[str, Any], text: str) -> dict[str, Any]:
    for key in ("task", "base", "hardware", "versions", "data"):
        document[key] = poison(document[key], text)
    document.update(name=text, command=["rim-peft", "compare", text])
    document["task"]["options"] = {text: text}
    for method in document["methods"]:
        method["label"] = f"{text}{method['label']}"
        method["changes"] = {text: text}
    for run in document["runs"]:
        run.update(folder=text, recipe_sha256=text)
        run["controls"] = poison(run.get("controls"), text)
    return document


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", ()))

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def tags_of(text: str) -> list[tuple[str, tuple[str, ...]]]:
    parser = Tags()
    parser.feed(text)
    parser.close()
    return parser.found


@each_text
@pytest.mark.parametrize("make", [compare_document, ablate_document])
def test_reports(make: Callable[[], dict[str, Any]], text: str, tmp_path: Path) -> None:
    plot = Plot("accuracy", text, text, "result", tmp_path / "plots")
    plot.folder.mkdir()
    plot.svg.write_text("<svg/>", encoding="utf-8")
    calm = Plot("accuracy", "a", "a", "result", plot.folder)
    report, html = (render(poisoned(make(), text), [plot]) for render in (render_markdown, render_page))
    assert_calm(html)
    assert tags_of(html) == tags_of(render_page(poisoned(make(), "a"), [calm]))
    assert shape(report) == shape(render_markdown(poisoned(make(), "a"), [calm]))
    write_text(tmp_path / "results.html", html)
    write_text(tmp_path / "results.json", json_text(poisoned(make(), text)))
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == poisoned(make(), text)


@each_text
def test_labels_of_plots(text: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert_calm(plain(text))
    with plot_style():
        figure = new_figure(1.0)
        figure.suptitle(plain(text))
        save(figure, tmp_path, "plot")
    assert_calm((tmp_path / "plot.svg").read_text(encoding="utf-8"))


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    """What the command line's logging writes."""
    root, before = logging.getLogger(), logging.getLogger().handlers
    root.handlers, stream = [], io.StringIO()
    with contextlib.redirect_stderr(stream):
        quiet_libraries()
        yield stream
    root.handlers = before


def test_log_lines(log_lines: io.StringIO) -> None:
    root = logging.getLogger()
    root.handlers = [
        handler for handler in root.handlers if type(handler).__module__.startswith("logging")
    ]  # not pytest's
    for text in HOSTILE.values():
        logging.getLogger("rim_peft.data").warning("%s has no validation split", text)
    assert_calm(log_lines.getvalue())
    assert "\\x1b[31mred" in log_lines.getvalue()


@pytest.mark.parametrize(
    "text", [HOSTILE[name] for name in ("ansi", "bidi", "surrogate")], ids=["ansi", "bidi", "half"]
)
def test_errors_and_findings_in_a_terminal(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = {"output_dir": str(tmp_path / "out"), text: 1, "model": {"name_or_path": text}, "data": {"task": text}}
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["check", str(recipe)]) == 1
    assert main(["train", str(recipe)]) == 1
    with contextlib.suppress(SystemExit):  # of a name that no file can have
        main(["generate", str(tmp_path / text.replace("/", "").replace("\0", "")), "1 + 1?"])
    assert main(["check", "--json", str(recipe)]) == 1
    captured = capsys.readouterr()
    assert_calm(captured.err)
    assert_calm(captured.out)
    assert len(captured.err.splitlines()) >= 3


def test_an_answer_is_shown_to_a_terminal_and_kept_for_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from rim_peft.cli.generate import _printed

    assert _printed("a\x1b[2J\tb\n") == "a\x1b[2J\tb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert _printed("a\x1b[2J\tb\n") == "a\\x1b[2J\tb\n"
