"""The model card of an adapter that comes from no run."""

import re
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard

from rim_peft.data.examples import Templates
from rim_peft.tuner.card import CardText, Usage, complete_card, hub_id, name_adapter, name_base, render_card

CARD = CardText("An adapter.", Usage("owner/base"))


def code(card: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return found


@pytest.mark.parametrize(
    "usage", [Usage("owner/base"), Usage("owner/base", "v1", has_tokenizer=True), Usage(""), Usage(None), Usage("/a/b")]
)
def test_the_code_compiles_and_starts_with_the_import(usage: Usage) -> None:
    text = code(render_card("a", CardText("An adapter.", usage)))
    compile(text, "card", "exec")
    assert text.startswith("import rim_peft")


def test_where_base_and_tokenizer_come_from() -> None:
    assert 'AutoTokenizer.from_pretrained("owner/base")' in render_card("a", CARD)
    own = render_card("a", CardText("", Usage("owner/base", "v1", has_tokenizer=True)))
    assert 'AutoModelForCausalLM.from_pretrained("owner/base", revision="v1")' in own
    assert "AutoTokenizer.from_pretrained(adapter)" in own


def test_prompts_are_written_as_by_default_in_training() -> None:
    assert Usage(None).template == Templates().prompt


def test_metadata_and_nothing_that_is_not_known(tmp_path: Path) -> None:
    data = ModelCard(render_card("a", CARD)).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("owner/base", "peft", "text-generation")
    assert data.tags == ["peft", "rim", "latent-reasoning"]
    assert data.license is None
    for base in ("", None, str(tmp_path), "/gone/base", "C:\\base", "a/b/c"):
        assert ModelCard(render_card("a", CardText("", Usage(base)))).data.base_model is None, base


@pytest.mark.parametrize(("source", "is_id"), [("gpt2", True), ("a/b-c.1", True), ("./a", False), ("a/b/c", False)])
def test_ids_of_the_hub(source: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id(source) == (source if is_id else None)
    (tmp_path / source).mkdir(parents=True, exist_ok=True)
    assert hub_id(source) is None


def test_an_adapter_is_called_by_its_id() -> None:
    text = name_adapter(render_card("my run", CARD) + "A user's my run.\n", "owner/run-1")
    assert text == render_card("owner/run-1", CARD) + "A user's my run.\n"
    assert name_adapter(text, "owner/run-2") == render_card("owner/run-2", CARD) + "A user's my run.\n"
    assert name_adapter("# Written by hand\n", "owner/run") == "# Written by hand\n"


@pytest.mark.parametrize("name", ["2026-11-26", "123", "it's: mine"])
def test_names_that_yaml_quotes_are_found_again(name: str) -> None:
    result = EvalResult("text-generation", "prosqa", "prosqa", "accuracy", 0.5)
    for metadata in ({}, {"eval_results": [result]}):
        card = CardText("An adapter.", Usage("owner/base"), metadata=metadata)
        assert name_adapter(render_card(name, card), "owner/run") == render_card("owner/run", card)


def test_a_front_matter_that_is_no_yaml() -> None:
    for edit in (complete_card, lambda text: name_base(text, "owner/base")):
        with pytest.raises(ValueError, match=r"README\.md: its front matter must be YAML, but is not .*Correct it"):
            edit("---\nlicense: [mit\n---\n# Mine\n")


def test_a_card_that_was_there_keeps_its_words() -> None:
    before = "---\nlicense: mit\ntags: [mine]\n---\n# Mine\n\nWords.\n"
    card = ModelCard(complete_card(before, base="owner/base", tags=["more"]))
    assert card.text.strip() == "# Mine\n\nWords."
    assert card.data.tags == ["mine", "peft", "rim", "latent-reasoning", "more"]
    assert (card.data.license, card.data.base_model) == ("mit", "owner/base")
    assert ModelCard(complete_card(before, license="apache-2.0")).data.license == "apache-2.0"
    bare = ModelCard(complete_card("# No front matter\n"))
    assert (bare.data.library_name, bare.text.strip()) == ("peft", "# No front matter")
