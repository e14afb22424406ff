"""vLLM's plugin without vLLM: which folders have blocks, what is added to a request, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import rim_peft_vllm
from rim_peft.export.embedding_lora import _FORBIDDEN
from rim_peft.export.record import EXPORT_FILE
from rim_peft.export.tokens import MemoryTokens
from rim_peft.tuner.config import MOST_BLOCKS
from rim_peft_vllm import Blocks, add_blocks, find_blocks, register

MEMORY = MemoryTokens(["<b>", "<m>", "</b>"], [7, 8, 9], num_blocks=2, block_size=2)
BLOCKS = Blocks((7, 8, 9), 2, 2)
BLOCK = [7, 8, 8, 9]


def write_record(folder: Path, **record: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXPORT_FILE).write_text(json.dumps(record))
    return folder


def written_at(folder: Path) -> int:
    return (folder / EXPORT_FILE).stat().st_mtime_ns


def make_request(ids: list[int] | None, *, adapter: str | None = None, number: int = 1, **settings: Any) -> Any:
    lora = None if adapter is None else SimpleNamespace(lora_path=adapter, lora_int_id=number)
    params = SimpleNamespace(**{"extra_args": None, "max_tokens": 10, "logit_bias": None, **settings})
    return SimpleNamespace(
        prompt_token_ids=ids,
        prompt_embeds=None,
        resumable=False,
        sampling_params=params,
        lora_request=lora,
        cache_salt=None,
    )


def test_names_are_those_of_the_package() -> None:
    assert (rim_peft_vllm.RECORD, rim_peft_vllm.MOST_BLOCKS) == (EXPORT_FILE, MOST_BLOCKS)
    assert rim_peft_vllm._FORBIDDEN == _FORBIDDEN
    assert BLOCKS.after([]) == MEMORY.block_ids


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, rim_peft_vllm; print(sorted({'torch', 'peft', 'rim_peft', 'vllm'} & sys.modules.keys()))"
    folder = Path(rim_peft_vllm.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout == "[]\n"


def test_adapters_of_both_lora_formats_have_blocks(tmp_path: Path) -> None:
    own = write_record(tmp_path / "own", format="embedding-lora", memory=MEMORY.to_dict())
    assert find_blocks(own) == BLOCKS._replace(written=written_at(own))
    adapters = {"gsm8k": {"memory": MEMORY.to_dict()}}
    shared = write_record(tmp_path / "shared", format="peft-lora", adapters=adapters) / "adapters"
    assert find_blocks(shared / "gsm8k") == BLOCKS._replace(written=written_at(shared.parent))
    assert find_blocks(shared / "other") is None
    assert find_blocks(write_record(tmp_path / "merged", format="merged", memory=MEMORY.to_dict())) is None
    assert find_blocks(tmp_path) is None


def test_a_record_is_read_again_once_it_has_changed(tmp_path: Path) -> None:
    folder = write_record(tmp_path, format="embedding-lora", memory=MEMORY.to_dict())
    assert find_blocks(folder) == BLOCKS._replace(written=written_at(folder))
    (folder / EXPORT_FILE).unlink()
    write_record(tmp_path, format="embedding-lora", memory={**MEMORY.to_dict(), "num_blocks": 5})
    assert find_blocks(folder) == BLOCKS._replace(num_blocks=5, written=written_at(folder))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "embedding-lora"}', '{"format": "embedding-lora", "memory": {}}']
)
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / EXPORT_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{EXPORT_FILE}: must be the record of an export, but is not"):
        find_blocks(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "num_blocks", "expected"),
    [
        ([1, 2], None, [1, 2, *BLOCK, *BLOCK]),
        ([1, 2], 3, [1, 2, *BLOCK, *BLOCK, *BLOCK]),
        ([1, 2], 0, [1, 2]),
        ([1, 2, *BLOCK], None, [1, 2, *BLOCK]),  # the client has appended one
    ],
)
def test_blocks_follow_the_prompt_once(prompt: list[int], num_blocks: int | None, expected: list[int]) -> None:
    assert BLOCKS.after(prompt, num_blocks) == expected


@pytest.mark.parametrize(
    ("prompt", "num_blocks", "problem"),
    [
        ([1, 8, 2], None, "prompt: must have memory tokens only as blocks at its end, got id 8 elsewhere"),
        ([1, 7], None, "got id 7 elsewhere"),
        ([1], -1, "num_blocks: must be an integer from 0 to 4096, got -1"),
        ([1], 2.5, "got 2.5"),
        ([1], True, "got True"),
        ([1], 5000, "got 5000"),
    ],
)
def test_other_prompts_are_refused(prompt: list[int], num_blocks: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BLOCKS.after(prompt, num_blocks)


def test_a_request_gets_blocks_and_keeps_its_options() -> None:
    given = [1, 2]
    request = make_request(given, extra_args={"num_blocks": 1}, logit_bias={4: 2.0, 8: 5.0})
    add_blocks(request, BLOCKS, most_tokens=12)
    assert request.prompt_token_ids == [1, 2, *BLOCK]
    assert given == [1, 2]  # it may be the caller's
    assert request.sampling_params.max_tokens == 6
    assert request.sampling_params.logit_bias == {7: -100.0, 8: 5.0, 9: -100.0, 4: 2.0}
    assert request.cache_salt == "0"
    salted = make_request(given)
    salted.cache_salt = "own "
    add_blocks(salted, BLOCKS._replace(written=5), most_tokens=99)
    assert salted.cache_salt == "own 5"
    speculative = make_request([1])
    add_blocks(speculative, BLOCKS, most_tokens=99, forbid=False)
    assert speculative.sampling_params.logit_bias is None
    pooling = make_request([1])
    pooling.sampling_params = None
    add_blocks(pooling, BLOCKS, most_tokens=99)
    assert pooling.prompt_token_ids == [1]


def test_requests_that_cannot_have_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt and blocks \(9 tokens\) must leave room for an answer in 9 tokens"):
        add_blocks(make_request([1]), BLOCKS, most_tokens=9)
    with pytest.raises(ValueError, match="prompt: must be a text, a chat or token ids in one piece"):
        add_blocks(make_request(None), BLOCKS, most_tokens=9)
    with pytest.raises(ValueError, match="messages: must end where the assistant's turn is opened"):
        add_blocks(make_request([1], extra_args={"rim_continues": True}), BLOCKS, most_tokens=99)
    with pytest.raises(ValueError, match="logit_bias: must have at most 1000 entries"):
        add_blocks(make_request([1], logit_bias=dict.fromkeys(range(1001), 1.0)), BLOCKS, most_tokens=99)


class InputProcessor:
    """What the plugin uses of vLLM's."""

    model_config = SimpleNamespace(max_model_len=64)
    vllm_config = SimpleNamespace(speculative_config=None)

    def process_inputs(self, request: Any) -> Any:
        return request


class ChatCompletionRequest:
    continue_final_message, add_generation_prompt = False, True

    def to_sampling_params(self) -> Any:
        return SimpleNamespace(extra_args={"num_blocks": 1})


class BeamSearch:
    def beam_search(self, prompt: Any, lora_request: Any = None) -> Any:
        return prompt


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A vLLM that has only what the plugin wraps."""
    classes = {
        "entrypoints.generate.beam_search.offline": {"BeamSearchOfflineMixin": type("Offline", (BeamSearch,), {})},
        "entrypoints.generate.beam_search.online": {"BeamSearchOnlineMixin": type("Online", (BeamSearch,), {})},
        "entrypoints.openai.chat_completion.protocol": {
            "ChatCompletionRequest": type("Chat", (ChatCompletionRequest,), {})
        },
        "exceptions": {"VLLMValidationError": type("VLLMValidationError", (Exception,), {})},
        "lora.utils": {"get_adapter_absolute_path": str},
        "v1.engine.input_processor": {"InputProcessor": type("Processor", (InputProcessor,), {})},
    }
    found = SimpleNamespace()
    for path, contents in classes.items():
        parts = f"vllm.{path}".split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
        vars(sys.modules[f"vllm.{path}"]).update(contents)
        vars(found).update(contents)
    return found


def test_registered_twice_it_adds_blocks_once_and_leaves_other_models_alone(vllm: Any, tmp_path: Path) -> None:
    register()
    register()
    adapter = str(write_record(tmp_path / "own", format="embedding-lora", memory=MEMORY.to_dict()))
    process = vllm.InputProcessor().process_inputs
    assert process(make_request([1], adapter=adapter)).prompt_token_ids == [1, *BLOCK, *BLOCK]
    assert process(make_request([1], adapter=str(tmp_path), number=2)).prompt_token_ids == [1]
    assert process(make_request([1])).prompt_token_ids == [1]
    with pytest.raises(vllm.VLLMValidationError, match="got id 8 elsewhere"):
        process(make_request([8, 1], adapter=adapter))
    chat = vllm.ChatCompletionRequest()
    assert chat.to_sampling_params().extra_args == {"num_blocks": 1}
    chat.continue_final_message = True
    assert chat.to_sampling_params().extra_args == {"num_blocks": 1, "rim_continues": True}
    lora = SimpleNamespace(lora_path=adapter, lora_int_id=1)
    for owner in (vllm.BeamSearchOnlineMixin, vllm.BeamSearchOfflineMixin):
        assert owner().beam_search("prompt") == "prompt"
        for adapters in (lora, [None, lora]):
            with pytest.raises(vllm.VLLMValidationError, match="use_beam_search: must be off for a RiM adapter"):
                owner().beam_search("prompt", lora_request=adapters)


def test_what_was_loaded_last_counts(vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_record(tmp_path / "one", format="embedding-lora", memory=MEMORY.to_dict())
    two = write_record(tmp_path / "two", format="embedding-lora", memory={**MEMORY.to_dict(), "num_blocks": 1})
    snapshots = {"someone/adapter": str(one)}  # where the Hub's newest commit is on this machine
    lookups: list[str] = []

    def find(path: str) -> str:
        lookups.append(path)
        return snapshots.get(path, path)

    monkeypatch.setattr(sys.modules["vllm.lora.utils"], "get_adapter_absolute_path", find)
    register()
    process = vllm.InputProcessor().process_inputs
    for _ in range(2):
        assert process(make_request([1], adapter="someone/adapter")).prompt_token_ids == [1, *BLOCK, *BLOCK]
    assert lookups == ["someone/adapter"]
    snapshots["someone/adapter"] = str(two)
    assert process(make_request([1], adapter="someone/adapter", number=2)).prompt_token_ids == [1, *BLOCK]
    (two / EXPORT_FILE).unlink()  # another LoRA in the same place
    assert process(make_request([1], adapter=str(two), number=3)).prompt_token_ids == [1]
    (one / EXPORT_FILE).unlink()
    one.rmdir()
    assert process(make_request([1], adapter="someone/adapter")).prompt_token_ids == [1, *BLOCK, *BLOCK]
    assert process(make_request([1], adapter=str(one), number=4)).prompt_token_ids == [1]


def test_another_vllm_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    with pytest.raises(RuntimeError, match=r"this vLLM must be near version 0\.32"):
        register()
