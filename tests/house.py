"""Figures of the source tree, so that a redesign can be measured: ``python -m tests.house`` prints them.

What is counted: files and lines of the package, the benchmarks and the tests, with long and short files and long
functions, which are named. Of the package also lines that are imports, imports between modules (upward ones by the
layers of docs/architecture.md, circles, the modules with most), and places that use a name with a leading underscore
of somebody else's object.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import rim_peft
from tests.unit.test_architecture import LEVEL

PACKAGE = Path(rim_peft.__file__).parent
TREES = ("rim_peft", "benchmarks", "tests")
SHORT_FILE, LONG_FILE, LONG_FUNCTION = 60, 300, 60
"""Lines; of a function with its docstring."""


@dataclass(frozen=True)
class Module:
    """A source file.

    Attributes:
        name: as it is imported.
        source: its lines.
        tree: what they say.
    """

    name: str
    source: list[str]
    tree: ast.Module

    @property
    def import_lines(self) -> int:
        """Lines that imports take, those inside functions included."""
        nodes = (node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom))
        return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes)

    def private_uses(self) -> Iterator[str]:
        """Yield names with a leading underscore that are not the file's own: of other objects, or imported."""
        own = {node.name for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute) and _is_of_self(node)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                if node.attr not in own and not _is_of_self(node):
                    yield node.attr
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("rim_peft"):
                yield from (alias.name for alias in node.names if _is_private(alias.name))

    def long_functions(self) -> Iterator[tuple[int, str]]:
        """Yield the lines and the name of each function that is too long."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > LONG_FUNCTION:
                    yield num_lines, node.name


def read_modules(tree: str = "rim_peft") -> dict[str, Module]:
    """Return a tree's modules by name."""
    modules = {}
    for path in sorted((PACKAGE.parent / tree).rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        modules[name] = Module(name, text.splitlines(), ast.parse(text))
    return modules


def imports_between(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return which of the modules each imports at its top level, through a package's ``__init__`` as that one."""
    found: dict[str, set[str]] = {}
    for name, module in modules.items():
        targets: set[str] = set()
        for node in module.tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                targets |= {full if full in modules else node.module for full in names}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name] = (targets & modules.keys()) - {name}
    return found


def find_circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Return groups of modules that import one another, directly or not."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for target in imports[left.pop()] - seen:
                seen.add(target)
                left.append(target)
        return seen

    reach = {name: reached(name) for name in imports}
    circles = {frozenset(o for o in reach[name] if name in reach[o]) for name in imports if name in reach[name]}
    return [set(circle) for circle in circles]


def _level(name: str) -> int | None:
    parts = name.split(".")
    return LEVEL.get(parts[1]) if len(parts) > 1 else None


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def print_sizes() -> None:
    """Print each tree's number of files, lines, long and short files and long functions; then the long functions."""
    trees = {tree: read_modules(tree) for tree in TREES}
    functions = [(*found, name) for tree in trees.values() for name, m in tree.items() for found in m.long_functions()]
    print(f"{'':12}{'files':>7}{'lines':>8}{'long':>6}{'short':>7}{'long functions':>16}")
    for tree, modules in trees.items():
        sizes = [len(module.source) for module in modules.values()]
        num_long, num_short = sum(size > LONG_FILE for size in sizes), sum(size < SHORT_FILE for size in sizes)
        num_functions = sum(name in modules for _, _, name in functions)
        print(f"{tree:12}{len(sizes):>7}{sum(sizes):>8}{num_long:>6}{num_short:>7}{num_functions:>16}")
    for num_lines, function, name in sorted(functions, reverse=True):
        print(f"  {num_lines} {name}.{function}")


def main() -> int:
    """Print the figures."""
    print_sizes()
    modules = read_modules()
    imports = imports_between(modules)
    num_lines = sum(len(module.source) for module in modules.values())
    import_lines = sum(module.import_lines for module in modules.values())
    degrees = Counter({name: len(targets) for name, targets in imports.items()})
    degrees.update(target for targets in imports.values() for target in targets)
    upward = [
        (name, target)
        for name, targets in imports.items()
        for target in targets
        if (mine := _level(name)) is not None and (its := _level(target)) is not None and its > mine
    ]
    private = Counter(use for module in modules.values() for use in module.private_uses())
    print(f"lines of imports               {import_lines} ({import_lines / num_lines:.0%})")
    print(f"upward imports                 {len(upward)}")
    print(f"circles                        {len(find_circles(imports))}")
    print(f"uses of others' private names  {private.total()} ({len(private)} names)")
    print("imports from and to the most connected modules:")
    for name, degree in degrees.most_common(5):
        print(f"  {name:40} {degree}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
