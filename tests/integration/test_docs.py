"""Every block of README, CONTRIBUTING and docs/ is understood; Python ones without a comment ``needs`` are run."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rim_peft import GroundingConfig
from rim_peft.demo import showcase
from rim_peft.tasks import get_task
from tests.conftest import build_base, build_rim, build_tokenizer, save_base
from tests.documentation import PAGES, ROOT, problems, read_blocks, read_page
from tests.integration.test_demo import SHORT

RUN_ELSEWHERE = {"README.md"}
"""Pages whose Python is run by ``test_examples.py``."""
WITH_PYTHON = [
    page
    for page in PAGES
    if page not in RUN_ELSEWHERE and any(block.kind == "run" for block in read_blocks(page, read_page(page)))
]


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_understood(page: str) -> None:
    assert list(problems(page, read_page(page))) == []


def test_blocks_are_of_every_kind() -> None:
    """What is collected is counted, so that a fence that is no longer recognised does not go unnoticed."""
    blocks = [block for page in PAGES for block in read_blocks(page, read_page(page))]
    num_fences = sum(len(re.findall(r"^ *(?:```|~~~)", read_page(page), re.MULTILINE)) for page in PAGES)
    num_directives = sum(len(re.findall(r"^```\{", read_page(page), re.MULTILINE)) for page in PAGES)
    assert 2 * (len(blocks) + num_directives) == num_fences
    counts = Counter((block.language, block.kind.split(";")[0]) for block in blocks)
    for kind in (("bash", "checked"), ("python", "run"), ("python", "checked"), ("yaml", "checked"), ("text", "shown")):
        assert counts[kind] > 0, counts


def prepare_quickstart(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    save_base(folder / "base", "qwen3")
    rows = [{"question": f"What is {n} and 1?", "steps": [f"{n} + 1"], "answer": str(n + 1)} for n in range(4)]
    return {
        '"Qwen/Qwen3-0.6B"': '"base"',
        'get_task("gsm8k").load("train")': "few_rows",
    }, {"few_rows": Dataset.from_list(rows)}


def prepare_chats(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    return {}, {"model": build_rim(), "tokenizer": build_tokenizer()}


def prepare_controls(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    return {}, {"task": get_task("potions")}


def prepare_latency(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    tokenizer = build_tokenizer()
    names = {
        "tokenizer": tokenizer,
        "pad_id": tokenizer.pad_token_id,
        "prompts": [tokenizer(f"What is {n}?\n")["input_ids"] for n in range(8)],
        **dict.fromkeys(("answer_model", "cot_model"), build_base()),
        **dict.fromkeys(("rim_model", "coconut_model"), build_rim()),
    }
    return {"256": "3"}, names


def prepare_lm_eval(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    pytest.importorskip("lm_eval")
    showcase.train_demo(folder / "outputs" / "demo", seed=0, overrides=SHORT, command=[])
    return {'"examples/lm_eval"': repr(str(ROOT / "examples" / "lm_eval")), "batch_size=32": "limit=4"}, {}


def prepare_qlora(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    pytest.importorskip("bitsandbytes")
    build_base(hidden_size=64).save_pretrained(folder / "base")
    adapter = build_rim(base=AutoModelForCausalLM.from_pretrained(folder / "base"))
    adapter.save_pretrained(folder / "outputs" / "gsm8k-llama-3.2-1b-qlora")
    return {}, {}


PREPARE: dict[str, Callable[[Path], tuple[dict[str, str], dict[str, Any]]]] = {
    "docs/quickstart.md": prepare_quickstart,
    "docs/chat-templates.md": prepare_chats,
    "docs/controls.md": prepare_controls,
    "docs/latency.md": prepare_latency,
    "docs/lm-eval.md": prepare_lm_eval,
    "docs/qlora.md": prepare_qlora,
}
"""For a page: makes files in the working directory; returns what to replace in its blocks, and names that they use."""


SLOW = {"docs/lm-eval.md"}
"""Pages that take long: the harness reads all of its own tasks first."""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in WITH_PYTHON]
)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other, with the same names, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    replaced, names = PREPARE[page](tmp_path) if page in PREPARE else ({}, {})
    blocks = [block for block in read_blocks(page, read_page(page)) if block.kind == "run"]
    for old in replaced:
        assert any(old in block.code for block in blocks), f"{page}: {old} is gone. Change PREPARE."
    for block in blocks:
        code = block.code
        for old, new in replaced.items():
            code = code.replace(old, new)
        exec(compile(code, f"{page}:{block.line}", "exec"), names)  # noqa: S102 - the documentation's own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nrim-peft train recipes/gsm8k/gpt2.yaml seeds=1\n```", "seeds: unknown key"),
        ("```bash\nrim-peft train recipes/gsm8k/none.yaml\n```", "none.yaml must be in the repository"),
        ("```bash\nrim-peft trian RECIPE\n```", "rim-peft trian: the command must be one of train"),
        ("```bash\nrim-peft evaluate DIR --block 3\n```", "unrecognized arguments: --block"),
        ("```bash\nrim-peft export DIR --out DIR\n```", "--out is --output-dir now"),
        ("```bash\nrim-peft compare recipes/compare/demo-ablations.yaml\n```", "is for rim-peft ablate"),
        ("```bash\nrim-peft chains rows.jsonl --teacher T --output-dir D data.tasks=x\n```", "data.tasks: must be one"),
        ("```bash\nmake tests\n```", "make tests: must be in the Makefile"),
        ("```bash\nmake test X=1\n```", "make X=1: must be in the Makefile"),
        ("```bash\npip install 'rim-peft[quantised]'\n```", "quantised: must be an extra"),
        ("```bash\npython -m benchmark\n```", "python -m benchmark: the module must exist"),
        ("```bash\nvllm serve exports/x\n```", "vllm: must be one of rim-peft"),
        ("```bash\naccelerate launch -m rim_peft train RECIPE sed=1\n```", "sed: unknown key"),
        ("```\nrim-peft demo\n```", "commands must be in a block of bash"),
        ("```\n$ rim-peft demo --rows\n```", "argument --num-rows: expected one argument"),
        ("```python\nfrom rim_peft.tasks import get_tasks\n```", "imports must exist"),
        ("```python\nimport\n```", "invalid syntax"),
        ("```yaml\noutput_dir: x\nmodels: {}\n```", "models: unknown key"),
        ("```yaml\ngrounding: {hld: 0.5}\n```", "grounding.hld: unknown key"),
        ("```json\n{\n```", "Expecting property name"),
        ("```toml\n```", "the language of a block must be one of"),
        ("```bash\nmake test\n", "must be closed"),
        ("<!-- needs: gpu -->\nText.\n", "must stand before a block"),
        ("<!-- needs: time -->\n```bash\nmake test\n```", "needs must be some of gpu"),
        ("Run `rim-peft evaluate DIR --task-name x`.", "--task-name must be an option of rim-peft evaluate"),
    ],
)
def test_what_is_wrong_is_found(text: str, message: str) -> None:
    (problem,) = problems("page.md", text)
    assert message in problem


def test_sections_of_a_recipe_and_marked_blocks_are_understood() -> None:
    text = (
        "```yaml\ngrounding: {hold: 0.5}\ndata: {options: {split_steps: lines}}\n```\n"
        '```json\n{"question": "q"}\n{"question": "r"}\n```\n'
        "<!-- needs: engine -->\n```bash\nvllm serve exports/x > log | tail\n```\n"
    )
    assert list(problems("page.md", text)) == []


def test_every_page_is_in_the_contents_of_the_site() -> None:
    contents = re.findall(r"^```\{toctree\}\n(?:.*\n)*?\n((?:.+\n)*)```", read_page("docs/index.md"), re.MULTILINE)
    entries = "".join(contents).split()
    listed = [str(path.relative_to(ROOT)) for entry in entries for path in (ROOT / "docs").glob(f"{entry}.md")]
    pages = [page for page in PAGES if page.startswith("docs/") and page != "docs/index.md"]
    assert sorted(listed) == sorted(pages)


@pytest.fixture(scope="module")
def site() -> dict[str, Any]:
    """Sphinx's configuration, which needs no Sphinx to be read."""
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def test_the_site_shows_the_docstring_of_every_public_name(site: dict[str, Any]) -> None:
    source = [read_page("docs/api.md")]
    names = list(site["listed"](source[0]))
    assert len(names) > 50
    site["add_docstrings"](None, "api", source)
    shown = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", source[0], re.MULTILINE)
    assert len(shown) == len(names) - 1  # __version__ is a text
    for heading, name in names:
        assert name == "__version__" or set(site["places"](heading, name)) & set(shown), name
    other = ["| name | |\n| `RiMConfig` | |\n"]
    site["add_docstrings"](None, "concepts", other)
    assert other == ["| name | |\n| `RiMConfig` | |\n"]


def test_a_public_name_that_is_nowhere_is_refused(site: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"RiMConfigs must be in a module that its heading names, got `rim_peft`"):
        site["directive"]("`rim_peft`", "RiMConfigs")


def test_the_site_lists_the_options_of_configs(site: dict[str, Any]) -> None:
    lines: list[str] = []
    site["add_options"](None, "class", "GroundingConfig", GroundingConfig, None, lines)
    (hold,) = (line for line in lines if line.startswith(":param hold: "))
    assert hold.endswith(f" (default ``{GroundingConfig.hold}``)")
    assert not any(line.startswith(":param learning_rate:") for line in lines)


def test_the_site_names_what_its_theme_leaves_unnamed(site: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "a" / "page.html"
    page.parent.mkdir()
    page.write_text('<aside class="toc-drawer"><p>é &lt;pre&gt;</p><pre>x</pre>', encoding="utf-8")
    for _ in range(2):  # a second build keeps the pages that have not changed
        site["name_parts"](SimpleNamespace(outdir=tmp_path), None)
        named = '<aside class="toc-drawer" aria-label="On this page"><p>é &lt;pre&gt;</p><pre tabindex="0">x</pre>'
        assert page.read_text(encoding="utf-8") == named


def test_the_site_loads_nothing_from_other_hosts(site: dict[str, Any], tmp_path: Path) -> None:
    app = SimpleNamespace(outdir=tmp_path)
    page = tmp_path / "page.html"
    page.write_text('<a href="https://other.org"><img src="_images/a.svg"><script src="_static/a.js"></script>')
    site["refuse_other_hosts"](app, None)
    for loaded in ('<script async src="https://other.org/a.js">', "<style>a {b: url(//other.org/c)}</style>"):
        page.write_text(loaded)
        with pytest.raises(ValueError, match=r"page\.html: must load nothing from other hosts, got .*other\.org"):
            site["refuse_other_hosts"](app, None)
