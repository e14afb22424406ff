"""The errors that docs/troubleshooting/ explains are those that the package raises, word for word."""

import re
from pathlib import Path

import pytest

import rim_peft

PACKAGE = Path(rim_peft.__file__).parent
DOCS = PACKAGE.parent / "docs" / "troubleshooting"
CHECKED = ("sharing", "exports")
OF_OTHER_PACKAGES = (
    "KeyError: 'RIM'",
    "The version of PEFT you are using is not compatible",
    "Unexpected keyword arguments [...] for class RiMConfig, these are ignored",
    "Invalid metadata in README.md",
    "BPE pre-tokenizer was not recognized",
    "Invalid configuration: requested max tokens to generate",
)


def quoted(page: str) -> list[str]:
    """The texts in the headings of a page."""
    headings = re.findall(r"^##+ (.*)$", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]


def source() -> str:
    """The package's source, with texts that stand on several lines put together and values left out."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    return re.sub(r"\{[^{}]*\}", "#", re.sub(r'"\s*\n\s*f?"', "", text))


@pytest.mark.parametrize("message", [message for page in CHECKED for message in quoted(page)])
def test_an_explained_error_is_one_that_is_raised(message: str) -> None:
    if message in OF_OTHER_PACKAGES:
        return
    general = re.sub(r"\b(\d+|[A-Z]|FOLDER|NAME)\b|\.\.\.|\w+\.safetensors", "#", message)
    pattern = re.escape(general).replace(r"\#", r".{0,40}")
    assert re.search(pattern, source()), pattern


@pytest.mark.parametrize("page", CHECKED)
def test_each_page_explains_something(page: str) -> None:
    assert len(quoted(page)) > 10
