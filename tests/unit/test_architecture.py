"""Imports point down: the layers of docs/architecture.md, checked on the source."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import rim_peft

PACKAGE = Path(rim_peft.__file__).parent
LAYERS = [
    {"version", "old_names"},
    {"values", "escaping", "sequence"},
    {"tuner", "data", "run_folders", "html_page"},
    {"training", "inference", "tasks"},
    {"evaluation", "export"},
    {"methods"},
    {"recipe"},
    {"run"},
    {"chains"},
    {"demo", "inspection"},
    {"app", "comparison"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def _imported_rooms(source: str) -> set[str]:
    """Every room that a file imports from, deferred imports and those for types included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("rim_peft.")}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TEXT = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = _room(path.relative_to(PACKAGE).parts)
    assert room in LEVEL, f"{room} stands in no layer: add it to docs/architecture.md and here"
    for other in _imported_rooms(path.read_text(encoding="utf-8")) - {room}:
        assert LEVEL[other] < LEVEL[room], f"{room} imports {other}, which does not lie below it"


def test_the_sequence_layer_knows_torch_alone() -> None:
    for path in (PACKAGE / "sequence").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                assert top not in {"transformers", "peft", "trl", "datasets", "accelerate"}, f"{path.name}: {module}"


def test_the_picture_in_the_docs_names_every_room() -> None:
    for room in LEVEL:
        assert room in TEXT, f"docs/architecture.md does not mention {room}"


def _drawn() -> Iterator[str]:
    """Names with a dot in the drawn flows."""
    for drawing in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)[1:]:
        yield from re.findall(r"(?<![\w.])[a-z_]+(?:\.\w+)+", drawing)


@pytest.mark.parametrize("name", sorted(set(_drawn())))
def test_what_the_flows_name_is_there(name: str) -> None:
    try:
        import_module(f"rim_peft.{name}")
    except ImportError:
        module, _, attribute = f"rim_peft.{name}".rpartition(".")
        try:
            assert hasattr(import_module(module), attribute)
        except ImportError:
            module, _, owner = module.rpartition(".")
            assert hasattr(getattr(import_module(module), owner), attribute)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_/]+(?:\.py|/))`", TEXT))))
def test_the_files_that_the_docs_name_are_there(name: str) -> None:
    assert (PACKAGE / name).exists() or (PACKAGE.parent / name).exists()
