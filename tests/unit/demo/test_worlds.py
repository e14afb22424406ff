"""What bases are trained on: samples that say what follows, in tokens that read back as the same text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rim_peft.demo import base
from rim_peft.demo.pretraining import ANSWER, THINK, Pretraining, build_tokenizer, encode
from rim_peft.demo.task_bases import BASES, OntologyBase, PotionsBase
from rim_peft.tasks import get_task
from rim_peft.tasks.ontology import KINDS
from tests.unit.data.conftest import DATA_DIR


@pytest.fixture(params=BASES)
def options(request: pytest.FixtureRequest) -> Pretraining[Any]:
    return BASES[request.param]()


def samples(options: Pretraining[Any], *, unsaid: float, number: int = 200) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [options.draw_sample(rng, unsaid=unsaid) for _ in range(number)]


def test_every_text_is_in_the_tokenizers_words_and_reads_back(options: Pretraining[Any]) -> None:
    tokenizer = build_tokenizer(options)
    assert len(set(tokenizer.get_vocab())) == len(tokenizer)
    for prompt, target in samples(options, unsaid=0.5):
        ids = tokenizer(f"{prompt} {target}").input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).split() == f"{prompt} {target}".split()
        assert len(ids) < 256
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(options.results)


def test_only_the_target_and_its_end_are_learned(options: Pretraining[Any]) -> None:
    tokenizer = build_tokenizer(options)
    drawn = samples(options, unsaid=0.0, number=8)
    _, labels = encode(tokenizer, drawn)
    for (_, target), row in zip(drawn, labels, strict=True):
        assert row[row != -100].tolist() == [*tokenizer(target).input_ids, tokenizer.eos_token_id]


def test_one_step_is_answered_at_once_and_longer_chains_are_written(options: Pretraining[Any]) -> None:
    rng = random.Random(0)
    for length in options.lengths:
        story = options.draw_from(rng, length, "train")
        chain = options.write_chain(rng, story, unsaid=0.0)
        assert options.is_right(chain, story.answer)
        assert options.is_right(story.answer, story.answer)
        assert not options.is_right(chain, "Sally is a thing.")
    endings = [prompt.rpartition(" ")[2] for prompt, _ in samples(options, unsaid=0.0)]
    assert 0.04 < endings.count(ANSWER) / len(endings) < 0.25
    assert endings.count(ANSWER) + endings.count(THINK) == len(endings)


def test_what_is_left_unsaid_is_named_nowhere_but_the_answer_is() -> None:
    rng = random.Random(0)
    options = OntologyBase()
    for length in options.lengths:
        story = options.draw_from(rng, length, "train")
        chain = options.write_chain(rng, story, unsaid=1.0)
        assert not any(f"{kind}." in chain or f"{kind} " in chain for kind in story.path[1:-1])
        assert chain.splitlines()[-1] == story.answer
        assert len(chain.splitlines()) == length + 1
        said = options.write_chain(rng, story, unsaid=0.0)
        assert said.splitlines() == [*story.steps, story.answer]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_bases_words_are_enough_for_the_tasks_rows(split: str) -> None:
    tokenizer = build_tokenizer(OntologyBase())
    for row in get_task("ontology", num_rows=50, num_held_out=50).load(split):
        for text in (row["question"], *row["steps"], row["answer"]):
            assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    assert len(tokenizer.tokenize("Every terpus is a impus. Is Sally a hilpus or sterpus? Answer:")) == 6
    assert len(OntologyBase().results) == len(KINDS)


@pytest.mark.skipif(
    not DATA_DIR.is_dir(), reason="the repository holds no data set, and the authors' files are not beside it"
)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_bases_words_are_enough_for_the_published_rows(split: str) -> None:
    tokenizer = build_tokenizer(OntologyBase())
    for row in get_task("prosqa").load(split, path=str(DATA_DIR / "prosqa")):
        assert (
            tokenizer.unk_token_id not in tokenizer(" ".join([row["question"], *row["steps"], row["answer"]])).input_ids
        )


def test_the_command_knows_each_tasks_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(base, "make_base", lambda options, output: made.append(options))
    base.main(["--output-dir", str(tmp_path)])
    base.main(["--output-dir", str(tmp_path), "--task", "ontology", "--num-kinds", "12"])
    assert made == [PotionsBase(), OntologyBase(num_kinds=12)]
    with pytest.raises(SystemExit):
        base.main(["--output-dir", str(tmp_path), "--num-kinds", "12"])
