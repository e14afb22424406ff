"""Private parts of other libraries: all of them are listed with a reason, and the installed versions have them."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import rim_peft
from rim_peft.training import trl_plugin
from rim_peft.tuner import bases, peft_plugin
from rim_peft.tuner.peft_plugin import Contact

PACKAGE = Path(rim_peft.__file__).parent
CONTACTS = [*peft_plugin.CONTACTS, *bases.CONTACTS, *trl_plugin.CONTACTS]


def _owner(path: str) -> tuple[Any, str]:
    """Return the module or class that a contact's last name belongs to, and that name."""
    owner, _, name = path.rpartition(".")
    try:
        return import_module(owner), name
    except ModuleNotFoundError:
        module, _, cls = owner.rpartition(".")
        return getattr(import_module(module), cls), name


def _is_there(contact: Contact) -> bool:
    owner, name = _owner(contact.path)
    found = inspect.getattr_static(owner, name, None)
    if found is None:  # what only instances have
        return any(re.search(rf"\b{name}\b", inspect.getsource(part)) for part in inspect.getmro(owner)[:-1])
    plain = getattr(found, "_before_rim", found)
    function = getattr(plain, "__func__", plain)
    return not contact.parameters or set(contact.parameters) <= inspect.signature(function).parameters.keys()


@pytest.mark.parametrize("contact", CONTACTS, ids=lambda contact: contact.path)
def test_the_installed_version_has_it(contact: Contact) -> None:
    assert _is_there(contact), str(contact)


def test_what_is_missing_is_noticed() -> None:
    assert not _is_there(Contact("transformers.Trainer._no_such_step", "nothing", "none"))
    assert not _is_there(Contact("transformers.Trainer._save", "nothing", "none", parameters=("no_such_parameter",)))


@pytest.mark.parametrize("contact", [c for c in CONTACTS if c.path.startswith(("transformers.Trainer.", "trl."))])
def test_what_is_listed_is_used(contact: Contact) -> None:
    name = contact.path.rpartition(".")[2]
    assert len(re.findall(rf"\b{name}\b", inspect.getsource(trl_plugin))) > 1, f"{contact.path} is not used any more"


def _private_steps(path: Path) -> set[str]:
    """Names with an underscore that a file's classes override by calling the parent's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {
        call.attr
        for call in calls
        if isinstance(call, ast.Attribute) and call.attr.startswith("_") and not call.attr.startswith("__")
        if isinstance(call.value, ast.Call) and getattr(call.value.func, "id", None) == "super"
    }


def test_trainers_touch_private_steps_in_one_module() -> None:
    listed = {contact.path.rpartition(".")[2] for contact in CONTACTS}
    found = {path: _private_steps(path) for path in (PACKAGE / "training").glob("*.py")}
    assert {path.name for path, names in found.items() if names} == {"trl_plugin.py"}
    assert found[PACKAGE / "training" / "trl_plugin.py"] <= listed
    assert _private_steps(PACKAGE / "tuner" / "model.py") <= listed


def test_private_modules_are_imported_in_one_module() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "trl_plugin.py":
            assert not re.search(r"^\s*(from|import) trl\.", path.read_text(encoding="utf-8"), re.MULTILINE), path.name
