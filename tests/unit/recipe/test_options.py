"""The options as text, and the documentation's tables."""

from pathlib import Path

from rim_peft.recipe.options import SECTIONS, list_options, options_table, options_text, update_tables

DOCS = Path(__file__).parents[3] / "docs" / "recipes.md"


def test_the_documentation_is_in_step() -> None:
    text = DOCS.read_text(encoding="utf-8")
    remedy = "run: python -m rim_peft.recipe.options docs/recipes.md"
    assert update_tables(text) == text, remedy
    for section in SECTIONS:
        assert options_table(section) in text, remedy


def test_every_option_has_help() -> None:
    options = [option for section in SECTIONS for option in list_options(section)]
    assert len({option.key for option in options}) == len(options)
    for option in options:
        assert option.help.endswith("."), option.key
        assert option.values, option.key


def test_shared_help_stands_once() -> None:
    (option,) = (option for option in list_options("data") if option.key == "data.prompt_template")
    assert option.default == '"{question}\\n"'
    assert option.help.startswith("Text before the blocks")


def test_options_for_the_terminal() -> None:
    assert "  adapter.num_blocks (8)\n      Blocks appended to a prompt, K." in options_text()
    assert "adapter.task_type" not in options_text()


def test_tables_are_replaced_where_they_are_marked() -> None:
    text = "a\n<!-- options: evaluation -->\nold\n<!-- end -->\nb\n"
    updated = update_tables(text)
    assert updated.startswith("a\n<!-- options: evaluation -->\n| key |")
    assert updated.endswith("0: none. |\n<!-- end -->\nb\n")
    assert update_tables(updated) == updated
