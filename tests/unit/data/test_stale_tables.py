"""What is tokenised anew, because what is stored was made of something else."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import PreTokenizedString, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rim_peft.data import cache as table
from rim_peft.data.examples import Templates
from tests.conftest import build_tokenizer
from tests.unit.data.test_table import ROWS, prepare, prepare_anew

pytestmark = pytest.mark.usefixtures("cache")

CHAT = {**ROWS[0], "question": [{"role": "user", "content": "2 * 3"}]}


def add_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["2+"])


def normalize(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("2", "7")


def close_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = tokenizer.bos_token


def split_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.split_special_tokens = True


def change_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = f"{tokenizer.chat_template}!"


CHANGES = [add_token, normalize, close_with_bos, split_special_tokens, change_chat_template]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tokenizer_is_not_served_stale(change: Callable[[PreTrainedTokenizerFast], None]) -> None:
    tokenizer = build_tokenizer()
    before = prepare([CHAT], tokenizer=tokenizer)
    change(tokenizer)
    after = prepare([CHAT], tokenizer=tokenizer)
    assert after == prepare_anew([CHAT], tokenizer=tokenizer)
    assert after != before


@pytest.mark.parametrize("part", ["prompt", "step", "answer"])
def test_a_changed_template_is_not_served_stale(part: str) -> None:
    before = prepare(ROWS)
    name = "question" if part == "prompt" else part
    templates = Templates(**{part: f"{{{name}}}."})
    after = prepare(ROWS, templates=templates)
    assert after == prepare_anew(ROWS, templates=templates) != before


@pytest.mark.parametrize(
    "rows", [ROWS[::-1], ROWS[:1], [ROWS[0], {**ROWS[1], "answer": "3"}], [ROWS[0], {**ROWS[1], "steps": ["2", "2"]}]]
)
def test_changed_rows_are_not_served_stale(rows: list[dict[str, Any]]) -> None:
    before = prepare(ROWS)
    assert prepare(rows) == prepare_anew(rows) != before


def test_changed_code_is_not_served_stale(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(ROWS)
    hashed: list[str] = []
    monkeypatch.setattr(table, "source_hash", lambda *modules: hashed.extend(modules) or "another")
    texts.clear()
    prepare(ROWS)
    assert texts
    own = [module for module in hashed if module.startswith("rim_peft")]  # the tokenizer's is hashed too
    assert own == [
        f"rim_peft.data.{name}" for name in ("cache", "tokenization", "special_tokens", "examples", "chats", "bad_rows")
    ]


def read_file(path: Path) -> Iterator[Any]:
    yield json.loads(path.read_text(encoding="utf-8"))


def test_other_rows_under_the_same_fingerprint_are_not_served_stale(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    made = []
    for row in ROWS:
        path.write_text(json.dumps(row))
        cache_dir = str(tmp_path / row["answer"])
        made.append(Dataset.from_generator(read_file, gen_kwargs={"path": path}, cache_dir=cache_dir))
    assert made[0]._fingerprint == made[1]._fingerprint
    assert [prepare(rows) for rows in made] == [[row] for row in prepare_anew(ROWS)]


def test_neither_use_nor_place_of_a_tokenizer_counts(tmp_path: Path, texts: list[str]) -> None:
    tokenizer = build_tokenizer()
    prepare(ROWS, tokenizer=tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=2)
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = 7
    copies = []
    for name in ("a", "b"):
        build_tokenizer().save_pretrained(tmp_path / name)
        copies.append(AutoTokenizer.from_pretrained(tmp_path / name))
    prepare(ROWS, tokenizer=copies[0])  # its class may be another
    texts.clear()
    prepare(ROWS, tokenizer=tokenizer)
    prepare(ROWS, tokenizer=copies[1])
    assert texts == []


class ShoutingTokenizer(PreTrainedTokenizerFast):
    """Encodes in a way of its own, which its backend does not show."""

    mark = "!"

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        marked = text + self.mark if isinstance(text, str) else [one + self.mark for one in text]
        return super()._encode_plus(marked, *args, **kwargs)


def test_a_tokenizer_that_encodes_in_its_own_way_is_known_by_all_it_holds(texts: list[str]) -> None:
    plain = build_tokenizer()
    tokenizer = ShoutingTokenizer(tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token)
    before = prepare(ROWS, tokenizer=tokenizer)
    texts.clear()
    assert prepare(ROWS, tokenizer=tokenizer) == before
    assert texts == []
    tokenizer.mark = "?"
    assert prepare(ROWS, tokenizer=tokenizer) == prepare_anew(ROWS, tokenizer=tokenizer) != before


class _Letters:
    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(lambda _, part: [part[index : index + 1] for index in range(len(str(part)))])


def test_a_tokenizer_that_cannot_be_known_is_used_each_time(texts: list[str], cache: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_Letters())
    first = prepare(ROWS, tokenizer=tokenizer)
    texts.clear()
    assert prepare(ROWS, tokenizer=tokenizer) == first
    assert texts
    assert not cache.exists()
