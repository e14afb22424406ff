"""What somebody else's recipe, folder or base could do: no code runs unless the user says so, in bounded time."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rim_peft.cli.main import main
from rim_peft.comparison.reading import load_comparison
from rim_peft.data.chat_templates import check_chat_template
from rim_peft.recipe import RecipeError, load_recipe
from rim_peft.recipe.reading import load_found_recipe
from rim_peft.recipe.syntax import read_override, write_yaml
from rim_peft.run import evaluate, export, load_run
from rim_peft.tuner.card import read_card
from tests.conftest import CHAT_TEMPLATE, build_base, build_rim, build_tokenizer

SMALL = "output_dir: out\nmodel: {name_or_path: some/base}\ndata: {task: gsm8k}\n"
MARK = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
TASK = """
from dataclasses import dataclass
from typing import ClassVar
from rim_peft.tasks.task import GeneratedTask

@dataclass(frozen=True)
class Sums(GeneratedTask):
    name: ClassVar[str] = "sums"

    def rows(self, split):
        yield from ({"question": f"{a} + 1?", "steps": ["x"], "answer": str(a + 1)} for a in range(40))
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of somebody else's, which is the working directory: ``adapter`` with its base, and two modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, text in (("stranger_task", TASK), ("modeling_own", "")):
        (tmp_path / f"{name}.py").write_text(MARK + text)
    adapter = tmp_path / "adapter"
    build_base().save_pretrained(adapter / "base")
    build_tokenizer().save_pretrained(adapter)
    build_rim().save_pretrained(str(adapter), save_embedding_layers=False)
    yield adapter
    for name in ("stranger_task", "modeling_own"):
        sys.modules.pop(name, None)


def write_recipe(adapter: Path, **changes: Any) -> None:
    values = {"output_dir": "elsewhere", "model": {"name_or_path": "base"}, "data": {"task": "gsm8k"}}
    (adapter / "recipe.yaml").write_text(write_yaml({**values, **changes}))


def add_code(folder: Path, file: str, **names: str) -> None:
    """Let a file of a folder name code that lies beside it, as ``auto_map`` does."""
    (folder / "modeling_own.py").write_text(MARK)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **names}))


def test_a_folders_recipe_cannot_trust_code(stranger: Path) -> None:
    write_recipe(stranger, model={"name_or_path": "base", "trust_remote_code": True})
    with pytest.raises(RecipeError, match=r"model\.trust_remote_code: .* the base 'base'.*--trust-remote-code"):
        load_run(stranger)
    recipe = load_run(stranger, trust_remote_code=True).recipe
    assert recipe is not None
    assert recipe.model.trust_remote_code


@pytest.mark.parametrize("command", [["generate", "1 + 1?"], ["evaluate"], ["export", "--output-dir", "out"]])
def test_commands_say_which_flag_allows_it(
    stranger: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(stranger, model={"name_or_path": "base", "trust_remote_code": True})
    assert main([command[0], str(stranger), *command[1:]]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "recipe.yaml: model.trust_remote_code: asks to run code" in line


def test_code_beside_a_base_or_a_tokenizer_does_not_run(stranger: Path) -> None:
    write_recipe(stranger)
    add_code(
        stranger / "base",
        "config.json",
        model_type="own",
        auto_map={"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match=r"model\.trust_remote_code: .*base comes with its own code"):
        load_run(stranger)
    assert not list(stranger.rglob("ran"))


def test_code_beside_a_tokenizer_does_not_run(stranger: Path) -> None:
    write_recipe(stranger)
    add_code(
        stranger,
        "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["modeling_own.Own", "modeling_own.Own"]},  # type: ignore[arg-type]
    )
    with contextlib.suppress(ValueError):  # transformers may know the class without its code
        load_run(stranger)
    assert not list(stranger.parent.rglob("ran"))


def test_an_adapters_config_imports_nothing(stranger: Path) -> None:
    path = stranger / "adapter_config.json"
    mapping = {"base_model_class": "Own", "parent_library": "stranger_task"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": mapping, "megatron_core": "own"}))
    with pytest.raises(ValueError, match="auto_mapping: is not supported by RiM"):
        load_run(stranger)
    assert not list(stranger.parent.rglob("ran"))


def test_a_folders_recipe_imports_no_task(stranger: Path) -> None:
    write_recipe(stranger, data={"task": "stranger_task:Sums"})
    run = load_run(stranger)
    for ask in (lambda: evaluate(run), lambda: export(str(stranger), Path("out"))):
        with pytest.raises(ValueError, match=r"data\.task: .* names the class 'stranger_task:Sums'.*--task"):
            ask()
    assert not (stranger.parent / "ran").exists()
    assert evaluate(run, "stranger_task:Sums", limit=2, max_new_tokens=2)["num_rows"] == 2
    assert (stranger.parent / "ran").exists()
    assert not Path("elsewhere").exists()


def test_the_working_directory_is_no_place_for_packages(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A module there is imported only where a task of the user's own is asked for."""
    assert main(["generate", str(stranger), "a?", "--max-new-tokens", "1"]) == 0
    assert str(stranger.parent) not in sys.path
    (stranger.parent / "recipe.yaml").write_text(SMALL.replace("gsm8k", "stranger_task:Sums"))
    assert main(["check", "recipe.yaml"]) == 0
    assert (stranger.parent / "ran").exists()


@pytest.mark.parametrize(
    "task", ["os:system", "os:path.join", "../x:Y", "a b:C", "x:Y; rm -rf z", ":", "os:", "builtins:eval", "..x:Y"]
)
def test_what_is_no_task_is_refused(tmp_path: Path, task: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(SMALL.replace("gsm8k", json.dumps(task)))
    with pytest.raises(RecipeError, match=r"data\.task: "):
        load_recipe(path)


def bomb(levels: int, width: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels)]
    return "\n".join(lines)


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


HOSTILE: dict[str, tuple[Callable[[], str], str]] = {
    "aliases": (lambda: f"{bomb(12)}\n{SMALL}", "aliases"),
    "aliases of a long text": (lambda: f"a: &a {'x' * 9000}\nadapter: [{'*a, ' * 2000}]\n{SMALL}", "aliases"),
"aliases in a known key": (lambda: f"{SMALL}adapter:\n{indented(bomb(9))}\n", "aliases"),
    "an alias of itself": (lambda: f"adapter: &a [*a]\n{SMALL}", "refer to a node that contains it"),
    "merged mappings": (lambda: f"a: &a {{b: 1}}\nadapter: {{<<: *a}}\n{SMALL}", "unknown key"),
    "nesting": (lambda: f"adapter: {'[' * 5000}{']' * 5000}\n{SMALL}", "levels deep"),
    "nested mappings": (lambda: f"adapter: {'{a: ' * 5000}1{'}' * 5000}\n{SMALL}", "levels deep"),
    "300,000 unknown keys": (lambda: SMALL + "".join(f"k{n}: 1\n" for n in range(300_000)), "characters"),
    "10,000 unknown keys": (lambda: SMALL + "".join(f"k{n}: 1\n" for n in range(10_000)), "and so are 9979 more"),
    "a huge value": (lambda: f"{SMALL}seed: {'x' * 200_000}\n", "seed: must be an integer, got 'xxx"),
    "a huge file": (lambda: f"{SMALL}seed: {'x' * 5_000_000}\n", "characters long"),
    "a huge key": (lambda: f"{SMALL}? {'x' * 200_000}\n: 1\n", "unknown key"),
    "a huge integer": (lambda: f"{SMALL}seed: {'9' * 5000}\n", "is no int that can be read"),
    "an integer of 400 digits": (lambda: f"{SMALL}grounding: {{learning_rate: {'9' * 400}}}\n", "at most 64 bits"),
    "a long list": (lambda: f"{SMALL}adapter: {{init_memory: [{'-1, ' * 9000}]}}\n", "got [-1, -1"),
    "python": (lambda: f"{SMALL}adapter: !!python/object/apply:os.system [touch ran]\n", "the tag"),
    "a tag of its own": (lambda: f"{SMALL}adapter: !own {{r: 1}}\n", "the tag"),
    "binary": (lambda: f"{SMALL}seed: !!binary aGk=\n", "the tag"),
    "a date": (lambda: f"{SMALL}seed: !!timestamp never\n", "the tag"),
    "a word as truth": (lambda: f"{SMALL}resume: !!bool maybe\n", "is no bool"),
    "a word as number": (lambda: f"{SMALL}seed: !!int one\n", "is no int"),
    "a list as key": (lambda: f"{SMALL}? [a, b]\n: 1\n", "a key must be a text"),
    "a control character": (lambda: f"{SMALL}seed: '\x07'\n", r"line 4: .* the character '\x07'"),
    "NUL in a text": (lambda: f'{SMALL}method: "a\\0b"\n', "NUL"),
    "half a character": (lambda: f'{SMALL}method: "a\\uD83D"\n', "half a character"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_time(tmp_path: Path, name: str) -> None:
    make, words = HOSTILE[name]
    path = tmp_path / "x.yaml"
    path.write_text(make())
    memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    # Of a folder's recipe the sections adapter and grounding are not read.
    others = (
        (load_comparison,)
        if name in ("an integer of 400 digits", "a long list")
        else (load_comparison, load_found_recipe)
    )
    for load in (load_recipe, *others):
        with pytest.raises(RecipeError) as caught:
            load(path)
        text = str(caught.value)
        assert all(len(line) < len(str(path)) + 600 for line in text.splitlines())
        assert len(text.splitlines()) < 50
        if load is load_recipe:
            assert words.replace("\\x07", "x07").partition(".*")[2].strip() in text.replace("\\x07", "x07")
            assert words in text or ".*" in words
    assert time.process_time() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400_000  # KiB
    assert not list(tmp_path.rglob("ran"))


def test_the_same_on_the_command_line_and_in_cards() -> None:
    with pytest.raises(ValueError, match="aliases"):
        read_override(f"adapter={{a: &a [{'x, ' * 900}], b: &b [{'*a, ' * 90}], c: [{'*b, ' * 90}]}}")
    with pytest.raises(ValueError, match=r"README\.md: its front matter .*aliases"):
        read_card(f"---\n{bomb(12)}\n---\n# A\n")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 'a' * 10**10 }}", "a power in line 1"),
        ("\n{{ 'a' * 10000000000 }}", "a number above 1,048,576 in line 2"),
        ("{% if false %}{{ 'a' * 999 * 999 * 999 }}{% endif %}", "a number above 1,048,576"),
        ("{{ 'a' | center(1000000000) }}", "a number above 1,048,576"),
        ("{% generation %}{{ '%9999999999d' | format(1) }}{% endgeneration %}", "a width of %999999"),
        ("{{ '{:>9999999999}'.format(1) }}", "a width of"),
        ("{% for i in range(10000000) %}a{% endfor %}", "a number above 1,048,576"),
        ("{{ " + "*".join("1" * 5000) + " }}", "expressions that are nested too deep"),
        ("{{ '" + "%" * 200_000 + "1000000d' }}", "a width of %1000000? in line 1"),
        ("a" * 300_000, "300,000 characters"),
    ],
)
def test_chat_templates_of_others_are_bounded(template: str, problem: str) -> None:
    begun = time.process_time()
    with pytest.raises(
        ValueError, match=f"tokenizer: the chat template of x must only write texts, but has .*{problem}"
    ):
        check_chat_template(build_tokenizer(chat_template=template), "x")
    assert time.process_time() - begun < 2


_DOUBLED = "{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
_LOOPS = "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = 1 %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (_DOUBLED, "that take more than 1 GiB"),
        ("{% set n = 99999 %}{% set n = n * n %}{{ 'a' * n }}", "that take more than 1 GiB"),
        ("{% set s = 'a' * 99999 %}{{ s | replace('a', s) }}", "that take more than 1 GiB"),
        (f"{{% if tools is none and [1] | tojson(false) %}}{_DOUBLED}{{% endif %}}", "that take more than 1 GiB"),
        ("{% for i in range(999) %}{% for j in range(999) %}aaa{% endfor %}{% endfor %}", "that write over 1,048,576"),
        pytest.param(_LOOPS, "that take over 5 s", marks=pytest.mark.slow),
    ],
)
def test_growth_of_a_chat_template_is_found_by_a_trial(template: str, problem: str) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"has loops or repetitions {problem}"):
        check_chat_template(build_tokenizer(chat_template=CHAT_TEMPLATE + template), "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KiB


@pytest.mark.parametrize("executable", ["", None, "/nowhere/python", "/bin/false"])
def test_without_a_python_to_start_a_template_is_not_tried(
    executable: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    check_chat_template(build_tokenizer(chat_template=f"{CHAT_TEMPLATE}{{# {executable} #}}"), "x")
    assert "could not be tried in a separate process" in caplog.text


def test_a_trial_finds_jinja_where_a_path_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("some")])
    with pytest.raises(ValueError, match="that take more than 1 GiB"):
        check_chat_template(build_tokenizer(chat_template=f"{CHAT_TEMPLATE}{_DOUBLED} "), "x")


def test_an_adapters_chat_template_is_looked_at(stranger: Path) -> None:
    (stranger / "chat_template.jinja").write_text("{{ 'a' * 10**10 }}")
    with pytest.raises(ValueError, match=r"tokenizer: the chat template of .*adapter must only write texts"):
        load_run(stranger)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{% for m in messages %}{{ '  ' * loop.index0 }}{% if loop.index > 4096 %}{% break %}{% endif %}{% endfor %}",
        {"default": "{% generation %}{{ messages[0].content | trim }}{% endgeneration %}", "tools": "{{ 2 * 3 }}"},
        "{{ broken",
        None,
    ],
)
def test_usual_chat_templates_pass(template: Any) -> None:
    check_chat_template(build_tokenizer(chat_template=template), "x")
