"""What the package imports is declared, and what is declared is imported."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import rim_peft

PACKAGE = Path(rim_peft.__file__).parent
PYPROJECT = PACKAGE.parent / "pyproject.toml"
FOR_DEVELOPERS = {"browser", "dev", "docs"}
OWN = ("rim_peft", "rim_peft_command", "rim_peft_vllm")
HOSTS = {"vllm"}
"""What loads a plugin of ours, and is there when it does."""
NAMED_OTHERWISE = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Modules whose distribution has another name, for where it is not installed."""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imported() -> dict[str, str]:
    """Distributions that the package's modules import, each with one of these modules."""
    distributions = packages_distributions()
    found: dict[str, str] = {}
    modules = [PACKAGE.with_name(f"{name}.py") for name in OWN[1:]]
    for path in sorted([*PACKAGE.rglob("*.py"), *modules]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, *OWN, *HOSTS}:
                for distribution in distributions.get(name, [NAMED_OTHERWISE.get(name, name)]):
                    found.setdefault(_normal(distribution), path.name)
    return found


def _declared() -> tuple[set[str], set[str]]:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {_normal(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in requirements}

    extras = project["optional-dependencies"].items()
    optional = set().union(*(names(entries) for extra, entries in extras if extra not in FOR_DEVELOPERS))
    return names(project["dependencies"]), optional


@pytest.mark.skipif(not PYPROJECT.is_file(), reason="the package is installed without its sources")
def test_imports_are_those_that_are_declared() -> None:
    needed, optional = _declared()
    imported = _imported()
    assert not {name: where for name, where in imported.items() if name not in needed | optional}
    # An engine that the documentation and the tests use, and the tracker whose writer is transformers' own.
    assert not (needed | optional) - imported.keys() - {"ctranslate2", "tensorboard"}
