"""A model on this machine as a teacher."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from rim_peft.chains.options import ChainOptions
from rim_peft.chains.teachers import Draft, LocalTeacher, Request, _draw, _Sampling, cut_at
from rim_peft.data.examples import Templates
from rim_peft.inference.greedy import can_share
from tests.conftest import ARCHITECTURES, EOS_ID, build_base, build_tokenizer

QUESTIONS = ["1 + 1?", "What is 20 + 22, doubled and doubled again?", "<eos> is a token?"]


def make(*, stops: tuple[str, ...] = (), base: Any = None, **options: Any) -> LocalTeacher:
    settings = ChainOptions(**{"max_new_tokens": 12, "temperature": 1.0, **options})
    base = build_base() if base is None else base
    return LocalTeacher(base, build_tokenizer(), Templates(prompt="Q: {question}\n"), settings, stops=stops)


def write(teacher: LocalTeacher, questions: list[Any], seeds: list[int]) -> dict[int, Draft]:
    requests = [Request(question, seed) for question, seed in zip(questions, seeds, strict=True)]
    return dict(teacher.write(requests, lambda: False))


def test_a_draft_depends_on_its_seed_and_on_nothing_else() -> None:
    teacher = make()
    torch.manual_seed(1)
    together = write(teacher, QUESTIONS, [1, 2, 3])
    torch.manual_seed(2)
    backwards = write(teacher, QUESTIONS[::-1], [3, 2, 1])
    assert [together[index] for index in range(3)] == [backwards[2 - index] for index in range(3)]
    assert write(teacher, QUESTIONS[1:2], [2])[0] == together[1]
    assert write(teacher, QUESTIONS, [4, 5, 6]) != together


def test_a_draw_is_that_of_a_whole_sorted_vocabulary() -> None:
    probabilities = torch.softmax(torch.randn(3000, generator=torch.Generator().manual_seed(0)).double() * 3, 0)
    likely, order = probabilities.sort(descending=True, stable=True)
    below = likely.cumsum(0)
    for top_p in (1e-9, 0.3, 0.95, 0.9999, 1.0):
        num_kept = int((below - likely < top_p).sum())
        for draw in (0.0, 0.25, 0.999):
            expected = order[int(torch.searchsorted(below[:num_kept] / below[num_kept - 1], draw, right=True))]
            assert _draw(probabilities, torch.tensor(draw, dtype=torch.float64), top_p) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str) -> None:
    teacher = make(base=build_base(architecture))
    together = write(teacher, QUESTIONS, [1, 2, 3])
    assert [write(teacher, [question], [seed])[0] for question, seed in zip(QUESTIONS, (1, 2, 3), strict=True)] == [
        together[index] for index in range(3)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_all_prompts_begin_with_is_computed_once(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the model for it, then shorter ones; the chains are those of whole prompts."""
    base, seen = build_base(architecture), []
    template = Templates(prompt="Question: 1 + 2?\n1+2=3\n#### 3\n\nQuestion: {question}\n")
    teacher = make(base=base)
    teacher._templates = template
    shared = len(build_tokenizer()(template.prompt.partition("{")[0])["input_ids"])
    base.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    once = write(teacher, QUESTIONS, [1, 2, 3])
    lengths = [length for _, length in seen]
    assert (seen[0] == (1, shared)) is can_share(base)
    assert (shared + lengths[1] == max(once[index].num_prompt_tokens for index in range(3))) is can_share(base)
    monkeypatch.setattr("rim_peft.chains.teachers.can_share", lambda model: False)
    assert write(teacher, QUESTIONS, [1, 2, 3]) == once
    assert can_share(build_base("llama"))


def test_the_bases_own_generation_settings_do_not_count() -> None:
    base = build_base()
    base.generation_config.update(top_k=1, repetition_penalty=9.0, do_sample=True, eos_token_id=[EOS_ID, 70])
    own = write(make(base=base), QUESTIONS, [1, 2, 3])
    plain = write(make(), QUESTIONS, [1, 2, 3])
    # All of it but where a chain ends.
    assert all(plain[index].text.startswith(own[index].text) for index in range(3))


def test_a_low_temperature_is_greedy_and_so_is_zero() -> None:
    greedy = write(make(temperature=0.0, num_chains=1), QUESTIONS, [0, 0, 0])
    assert write(make(temperature=1e-4), QUESTIONS, [7, 8, 9]) == greedy
    assert write(make(top_p=1e-9), QUESTIONS, [7, 8, 9]) == greedy


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    scores = torch.tensor([0.3, 0.5, 0.05, 0.15, 1e-6]).log()
    num = 4000
    for top_p, expected in (
        (1.0, [0.3, 0.5, 0.05, 0.15, 1e-6]),
        (0.79, [0.375, 0.625, 0, 0, 0]),
        (0.81, [0.316, 0.526, 0, 0.158, 0]),
    ):
        options = ChainOptions(temperature=1.0, top_p=top_p, max_new_tokens=1)
        sampling = _Sampling(range(num), 3, options, torch.device("cpu"))
        drawn = Counter(sampling(torch.zeros(num, 3), scores.expand(num, 5)).argmax(-1).tolist())
        for token, share in enumerate(expected):
            # Four standard errors of a share of 4,000.
            assert drawn[token] / num == pytest.approx(share, abs=4 * (0.25 / num) ** 0.5 if share else 0)


def test_a_draft_ends_at_eos_at_a_stop_text_or_is_cut() -> None:
    whole = write(make(), QUESTIONS, [1, 2, 3])
    assert {draft.is_cut for draft in whole.values()} == {True}
    assert {draft.num_tokens for draft in whole.values()} == {12}
    text = whole[0].text
    stop = next(char for char in text[2:] if char not in text[:2] and char != "\ufffd")
    stopped = write(make(stops=(stop,)), QUESTIONS, [1, 2, 3])[0]
    assert (stopped.text, stopped.is_cut) == (text.partition(stop)[0], False)
    assert stopped.num_tokens < 12
    base = build_base()
    base.lm_head.weight.data[EOS_ID] = 0
    base.lm_head.weight.data[[token for token in range(262) if token != EOS_ID]] *= 0
    ended = write(make(base=base, max_new_tokens=300), ["?"] * 8, list(range(8))).values()
    assert any(not draft.is_cut and draft.num_tokens < 300 for draft in ended)
    assert cut_at("ab#c", ("c", "b#")) == "a"


def test_a_prompt_without_room_and_a_chat_that_is_refused_are_not_asked() -> None:
    teacher = make(max_new_tokens=400)
    assert write(teacher, ["x" * 200], [0])[0] == Draft("", num_prompt_tokens=204, problem="too long")
    chat = [{"role": "user", "content": "1 + 1?"}]
    teacher = make()
    assert write(teacher, [chat], [0])[0].problem is None
    teacher._tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert write(teacher, [chat], [0])[0] == Draft("", problem="refused")


def test_a_stopped_run_does_not_wait_for_the_batch() -> None:
    calls: list[int] = []

    def is_stopped() -> bool:
        calls.append(1)
        return len(calls) >= 3

    assert list(make(max_new_tokens=200).write([Request("?", 0)], is_stopped)) == []
    assert len(calls) == 3
