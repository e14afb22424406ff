"""Latency: which token counts, turns, ratios, batches; and that every way writes what it writes untimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rim_peft.evaluation import latency as latency_module
from rim_peft.evaluation.latency import Way, by_answerer, by_generate, count_behind, measure_latency
from rim_peft.inference import BlockAnswerer, ThoughtAnswerer, decode_with_thoughts
from tests.conftest import EOS_ID, PAD_ID, MakeBase, MakeRim

PROMPTS = [[10, 11, 12], [20, 21, 22, 23, 24], [30], [40, 41]]


class FakeClock:
    """A clock that only the ways under test move, and a list of who was asked what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, list[int]]] = []
        monkeypatch.setattr(latency_module, "perf_counter", lambda: self.now)

    def way(self, name: str, pace: Callable[[int], float], lengths: dict[int, int], **options: Any) -> Way:
        """A way that thinks for 1 s and then writes a token every ``pace(question)`` s.

        Question i's prompt is [i]; it gets ``lengths[i]`` tokens.
        """

        def answer(prompts: Sequence[Sequence[int]], on_token: Callable[[], None]) -> list[list[int]]:
            questions = [prompt[0] for prompt in prompts]
            self.asked.append((name, questions))
            self.now += 1.0
            for _ in range(max(lengths[question] for question in questions)):
                self.now += pace(questions[0])
                on_token()
            return [[7] * lengths[question] for question in questions]

        return Way(name, [[question] for question in lengths], answer, **options)


def test_the_answer_begins_behind_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    ways = [
        clock.way("direct", lambda question: 0.1, {0: 2, 1: 2, 2: 2}),
        clock.way("chain", lambda question: 0.1, {0: 5, 1: 7, 2: 12}, answer_tokens=2),
    ]
    direct, chain = measure_latency(ways, reference="direct", min_rounds=1)
    assert direct.first_token_ms == pytest.approx(1100)
    assert direct.answer_ms == pytest.approx(1200)
    assert (direct.first_token_ratio, direct.answer_ratio, direct.num_tokens) == (1.0, 1.0, 2.0)
    # 5, 7 and 12 tokens: the last but one comes after 1.4, 1.6 and 2.1 s.
    assert chain.first_token_ms == pytest.approx(1600)
    assert chain.first_token_quartiles_ms == pytest.approx((1500, 1850))
    assert chain.answer_ms == pytest.approx(1700)
    assert chain.answer_quartiles_ms == pytest.approx((1600, 1950))
    assert chain.first_token_ratio == pytest.approx(1.6 / 1.1)
    assert (chain.num_tokens, chain.prompt_tokens, chain.peak_memory_mb) == (8.0, 1.0, None)


def test_ratios_are_formed_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    lengths = dict.fromkeys(range(3), 1)
    # Times 2, 4, 12 and 10, 5, 6: the ratios are 0.2, 0.8, 2; the ratio of the medians would be 4/6.
    ways = [
        clock.way("mine", lambda question: (1.0, 3.0, 11.0)[question], lengths),
        clock.way("reference", lambda question: (9.0, 4.0, 5.0)[question], lengths),
    ]
    mine, reference = measure_latency(ways, reference="reference", min_rounds=1)
    assert mine.answer_ratio == pytest.approx(0.8)
    assert reference.answer_ratio == 1.0
    assert measure_latency(ways, min_rounds=1)[0].answer_ratio is None


def test_in_a_batch_the_slowest_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    way = clock.way("chain", lambda question: 1.0, {0: 3, 1: 6}, answer_tokens=lambda row: 1 if len(row) == 3 else 4)
    (chain,) = measure_latency([way], batch_sizes=[2], min_rounds=1)
    # Row 0's answer is its third token, row 1's begins with the third of six.
    assert chain.first_token_ms == pytest.approx(4000)
    assert chain.answer_ms == pytest.approx(7000)
    assert (chain.batch_size, chain.num_tokens) == (2, 4.5)


def test_ways_take_turns_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    lengths = dict.fromkeys(range(5), 1)
    ways = [clock.way(name, lambda question: 1.0, lengths) for name in ("a", "b")]
    found = measure_latency(ways, batch_sizes=[1, 3], num_questions=4, warm_up=1, min_rounds=1)
    assert [(row.name, row.batch_size) for row in found] == [("a", 1), ("b", 1), ("a", 3), ("b", 3)]
    assert clock.asked == [
        *[("a", [0]), ("b", [0])],  # warm-up
        *[("a", [0]), ("b", [0]), ("b", [1]), ("a", [1]), ("a", [2]), ("b", [2]), ("b", [3]), ("a", [3])],
        *[("a", [0, 1, 2]), ("b", [0, 1, 2])],  # warm-up
        *[("a", [0, 1, 2]), ("b", [0, 1, 2])],
    ]


def test_a_batch_larger_than_the_questions_asks_some_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    measure_latency([clock.way("a", lambda question: 1.0, {0: 1, 1: 1})], batch_sizes=[3], warm_up=0, min_rounds=1)
    assert clock.asked == [("a", [0, 1, 0])]


def test_to_dict_is_what_results_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    (found,) = measure_latency([clock.way("a", lambda question: 0.12345678, {0: 1, 1: 2})], reference="a", min_rounds=1)
    assert found.to_dict() == {
        "name": "a",
        "batch_size": 1,
        "prompt_tokens": 1,
        "first_token_ms": 1123.457,
        "first_token_quartiles_ms": [1123.457, 1123.457],
        "answer_ms": 1185.185,
        "answer_quartiles_ms": [1154.321, 1216.049],
        "num_tokens": 1.5,
        "peak_memory_mb": None,
        "first_token_ratio": 1.0,
        "answer_ratio": 1.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": []}, r"ways: must be at least one, each with its own name, got \[\]"),
        ({"reference": "b"}, r"reference: must be one of \['a'\], got 'b'"),
        ({"batch_sizes": [0]}, "batch_sizes: must be an integer of at least 1, got 0"),
        ({"num_questions": 0}, "num_questions: must be an integer of at least 1, got 0"),
        ({"warm_up": -1}, "warm_up: must be an integer of at least 0, got -1"),
    ],
)
def test_what_cannot_be_measured_is_said(change: dict[str, Any], message: str) -> None:
    way = Way("a", [[1]], lambda prompts, on_token: [[2]])
    with pytest.raises(ValueError, match=message):
        measure_latency(**{"ways": [way], **change}, min_rounds=1)


def test_ways_must_fit_each_other_and_note_their_tokens() -> None:
    silent = Way("silent", [[1]], lambda prompts, on_token: [[2]])
    with pytest.raises(ValueError, match=r"got \{'silent': 1, 'other': 2\}"):
        measure_latency([silent, Way("other", [[1], [2]], silent.answer)], min_rounds=1)
    with pytest.raises(ValueError, match="each with its own name, got"):
        measure_latency([silent, silent], min_rounds=1)
    with pytest.raises(
        ValueError, match=r"'silent' must give .* got 1 answers for 1 prompts, and 0 calls for 1 tokens"
    ):
        measure_latency([silent], min_rounds=1)


def listen(way: Way, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], int]:
    """Return what a way writes, and how often it notes a token."""
    calls: list[None] = []
    rows = way.answer(prompts, lambda: calls.append(None))
    return rows, len(calls)


def test_every_way_writes_a_batch_as_one_at_a_time(
    make_rim: MakeRim, make_base: MakeBase, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, base = make_rim(), make_base(seed=3)
    # An answer's third token or so ends it for some prompt, so that rows differ in length.
    plain = base.generate(input_ids=torch.tensor([PROMPTS[1]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    eos_id = int(plain[0, len(PROMPTS[1]) + 2])
    ends: dict[str, Any] = {"eos_id": eos_id, "max_new_tokens": 6}
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
    blocks = BlockAnswerer(model, tokenizer, num_blocks=3, max_new_tokens=6)
    thoughts = ThoughtAnswerer(model, tokenizer, num_thoughts=2, max_new_tokens=6)
    ways = [
        by_generate("plain", PROMPTS, base, pad_id=PAD_ID, **ends),
        by_generate("rim", PROMPTS, model, pad_id=PAD_ID, num_blocks=3, **ends),
        by_answerer("decoder", PROMPTS, blocks),
        by_answerer("thoughts", PROMPTS, thoughts),
    ]
    for way in ways:
        rows, num_calls = listen(way, PROMPTS)
        assert rows == [row for prompt in PROMPTS for row in listen(way, [prompt])[0]], way.name
        assert num_calls == max(len(row) for row in rows), way.name
    assert len(listen(ways[0], PROMPTS)[0][1]) <= 3
    assert listen(ways[1], PROMPTS) == listen(ways[2], PROMPTS)
    assert listen(ways[2], PROMPTS)[0] == [answers[0] for answers in blocks.decoder(PROMPTS).token_ids]
    assert listen(ways[3], PROMPTS)[0] == decode_with_thoughts(model, PROMPTS, num_thoughts=2, **ends)
    found = measure_latency(ways, batch_sizes=[1, 3], warm_up=1, reference="plain", min_rounds=1)
    assert [row.batch_size for row in found] == [1] * 4 + [3] * 4
    assert all(0 < row.first_token_ms <= row.answer_ms for row in found)
    assert found[0].prompt_tokens == (3 + 5 + 1 + 2) / 4


@pytest.mark.parametrize(
    ("text", "separator", "num_steps_characters"),
    [
        ("2*3=6, 6+1=7, 7", ", ", len("2*3=6, 6+1=7, ")),
        ("no steps", ", ", 0),
        ("a\nb\n12", "\n", 4),
        ("so #### 42", "####", len("so #### ")),
    ],
)
def test_the_answer_is_counted_behind_the_last_separator(
    tokenizer: Any, text: str, separator: str, num_steps_characters: int
) -> None:
    # One token for each character of the tests' tokenizer.
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS_ID]
    assert count_behind(tokenizer, separator)(tokens) == len(tokens) - num_steps_characters


def test_an_answer_may_hold_separators_itself(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [*tokenizer("1+2, 3, 4", add_special_tokens=False)["input_ids"], EOS_ID]
    alone, pair = (count_behind(tokenizer, ", ", num_inside=number) for number in (0, 1))
    assert (alone(tokens), pair(tokens)) == (2, 5)
    clock = FakeClock(monkeypatch)
    lengths = {0: 5, 1: 5}
    ways = [clock.way(name, lambda question: 0.1, lengths, answer_tokens=of) for name, of in (("a", 2), ("b", [2, 4]))]
    same, each = measure_latency(ways, batch_sizes=[1], num_questions=2, warm_up=0, min_rounds=2)
    assert same.first_token_ms == pytest.approx(1400)
    assert each.first_token_ms == pytest.approx(1300)  # the median of 1400 and 1200


def test_cuda_is_waited_for_and_its_peak_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    peaks = iter([5 * 2**20, 9 * 2**20, 7 * 2**20])

    def synchronize(device: torch.device) -> None:
        clock.now += 0.5  # what was still running

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    way = clock.way("a", lambda question: 0.1, {0: 2, 1: 2, 2: 2}, device="cuda:0")
    (found,) = measure_latency([way], warm_up=0, min_rounds=1)
    assert found.peak_memory_mb == 7.0
    # 1 s and twice 0.1 s, and a wait of 0.5 s for each token; the one before the start doesn't count.
    assert found.first_token_ms == pytest.approx(1600)
    assert found.answer_ms == pytest.approx(2200)
