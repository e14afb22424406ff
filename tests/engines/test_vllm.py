"""An adapter in vLLM, in each format that it is exported to: the documented server answers as this package does.

One server a format. Those of the LoRA formats get their blocks from this package's plugin, the merged one runs without.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from benchmarks.engines import Engine
from benchmarks.load import HOST
from rim_peft.export.checking import LEAST_PROMPTS
from tests.documentation import read_blocks, read_page
from tests.engines.conftest import NUM_QUESTIONS, Adapter, Server, blocks_of, chat, completion, serve
from tests.real.conftest import load_smol

pytestmark = [pytest.mark.engines, pytest.mark.slow]

NUM_AT_ONCE = 32
_WRITTEN, _RUNNING = "vllm:generation_tokens_total{", "vllm:num_requests_running{"


class Served:
    """What a server of any format must do."""

    def test_greedy_tokens_are_the_packages_and_others_without_blocks(self, server: Server) -> None:
        items = server.adapter.texts
        assert len({item.prompt for item in items}) == NUM_QUESTIONS
        direct = server.adapter.expected[0]
        no_blocks = {"extra_body": {"vllm_xargs": {"num_blocks": 0}}}  # without the plugin, ids have none anyway
        found, none = server.ask(
            completion([item.prompt for item in items]), completion([item.ids for item in direct], **no_blocks)
        )
        server.compare(found, items)
        server.compare(none, direct, num_blocks=0)
        assert sum(one["tokens"] != other["tokens"] for one, other in zip(none, found, strict=False)) > len(none) / 4

    def test_streams_and_token_ids(self, server: Server) -> None:
        items, blocks = server.adapter.texts[:8], server.blocks.ids(server.adapter.num_blocks)
        ids = [[*item.ids, *blocks] for item in items]
        answers = server.ask(
            completion([item.prompt for item in items], stream=True), completion(ids, stream=True), completion(ids[0])
        )
        for found, wanted in zip(answers, [items, items, items[:1]], strict=True):
            server.compare(found, wanted)

    def test_chats(self, server: Server) -> None:
        items = server.adapter.chats
        answers = server.ask(*(chat(item) for item in items), *(chat(item, stream=True) for item in items))
        server.compare([choice for (choice,) in answers], [*items, *items])

    def test_stop_strings(self, server: Server) -> None:
        items = server.adapter.texts[:4]
        texts = [server.adapter.text_of(item) for item in items]
        stops = [text[len(text) // 2] for text in texts]
        for stream in (False, True):
            asked = [
                completion(item.prompt, stop=[stop], stream=stream) for item, stop in zip(items, stops, strict=True)
            ]
            found = [choice for (choice,) in server.ask(*asked)]
            assert [one["text"] for one in found] == [
                text[: text.index(stop)] for text, stop in zip(texts, stops, strict=True)
            ]
            assert {one["finish"] for one in found} == {"stop"}

    def test_requests_at_once_are_answered_as_one_at_a_time(self, server: Server) -> None:
        items = server.adapter.texts[-NUM_AT_ONCE:]
        asked = [completion(item.prompt, stream=index % 2 == 0) for index, item in enumerate(items)]
        for at_once in (1, NUM_AT_ONCE):
            server.compare([choice for (choice,) in server.ask(*asked, at_once=at_once)], items)

    def test_clients_that_hang_up(self, server: Server) -> None:
        items = server.adapter.texts[:8]
        before = _count(server, _WRITTEN)
        long: Any = {"stream": True, "hang_up": True, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
        cut = server.ask(*(completion(item.prompt, **long) for item in items), at_once=8)
        assert all(len(choice["tokens"]) < 300 for (choice,) in cut)
        found = server.ask(*(completion(item.prompt) for item in items), at_once=4)
        server.compare([choice for (choice,) in found], items)
        end = time.monotonic() + 60
        while _count(server, _RUNNING) and time.monotonic() < end:
            time.sleep(0.2)
        assert _count(server, _RUNNING) == 0
        assert _count(server, _WRITTEN) - before < 8 * 300 / 2  # it does not write on for a client that is gone


class TestMerged(Served):
    @pytest.fixture(scope="class")
    def server(self, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with serve("merged", adapter, tmp_path_factory.mktemp("merged"), VLLM_PLUGINS="") as server:
            yield server


class TestPeftLora(Served):
    @pytest.fixture(scope="class")
    def server(self, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with serve("peft-lora", adapter, tmp_path_factory.mktemp("peft-lora")) as server:
            yield server

    def test_a_request_can_have_another_number_of_blocks(self, server: Server) -> None:
        _check_one_block(server)


class TestEmbeddingLora(Served):
    @pytest.fixture(scope="class")
    def server(self, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with serve("embedding-lora", adapter, tmp_path_factory.mktemp("embedding-lora")) as server:
            yield server

    def test_the_documented_client(self, server: Server) -> None:
        """From adapter to answer by what the page says: the server is started by its commands, too."""
        (code,) = [
            block.code
            for block in read_blocks("docs/vllm.md", read_page("docs/vllm.md"))
            if "from openai import OpenAI" in block.code
        ]
        code = code.replace("localhost:8000", f"{HOST}:{server.vllm.port}")
        done = subprocess.run([server.vllm.command[0], "-c", code], capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        question = "Tom boils Kim's brew. Kim's brew is red. What colour is Tom's brew?"
        run = server.adapter.run
        (text,) = run.answerer(max_new_tokens=4).answer([question])
        (reply,) = run.answerer(max_new_tokens=4, num_blocks=2).answer([[{"role": "user", "content": question}]])
        assert done.stdout.split() == f"{text} {reply}".split()

    def test_a_request_can_have_another_number_of_blocks(self, server: Server) -> None:
        _check_one_block(server)

    def test_the_plain_model_is_untouched(self, server: Server) -> None:
        items = server.adapter.texts[:8]
        base = server.adapter.base
        prompts = [item.prompt for item in items]
        plain, mixed = (
            server.ask(completion(prompts, model=base)),
            server.ask(
                *(completion(item.prompt, model=name) for item in items for name in (base, "potions")), at_once=16
            ),
        )
        run = server.adapter.run
        wanted = Engine("transformers", "float32").run(
            Path(base),
            prompts=[item.ids for item in items],
            eos_id=run.tokenizer.eos_token_id,
            max_new_tokens=server.adapter.max_new_tokens,
        )
        assert [one["prompt"] for one in plain[0]] == [item.ids for item in items]
        assert [one["tokens"] for one in plain[0]] == wanted
        server.compare([choice for (choice,) in mixed[1::2]], items)
        assert [choice["prompt"] for (choice,) in mixed[::2]] == [item.ids for item in items]

    def test_adapters_come_and_go_while_the_server_runs(
        self, server: Server, other_adapter: Adapter, tmp_path: Path
    ) -> None:
        """One name and place: another adapter, whose folder goes, none, a plain LoRA, the first one in its place."""
        place = tmp_path / "adapter"
        blocks = blocks_of(other_adapter.write("embedding-lora", place))
        other = replace(server, adapter=other_adapter, blocks=blocks)
        asked = {"model": "changing"}
        items, others = server.adapter.texts[:8], other_adapter.texts
        _post(server, "load_lora_adapter", lora_name="changing", lora_path=str(place))
        (found,) = other.ask(completion([item.prompt for item in others], **asked))
        other.compare(found, others)
        shutil.rmtree(place)
        (found,) = other.ask(completion([item.prompt for item in others], **asked))
        other.compare(found, others)
        _post(server, "unload_lora_adapter", lora_name="changing")
        (gone,) = server.ask(completion("a", **asked))
        assert gone["error"] == 404

        plain = get_peft_model(load_smol(server.adapter.base), LoraConfig(r=4, target_modules=["q_proj"]))
        plain.save_pretrained(str(place))
        _post(server, "load_lora_adapter", lora_name="changing", lora_path=str(place))
        (found,) = server.ask(completion([item.prompt for item in items], **asked))
        assert [one["prompt"] for one in found] == [item.ids for item in items]

        shutil.rmtree(place)
        server.adapter.write("embedding-lora", place)
        _post(server, "load_lora_adapter", lora_name="changing", lora_path=str(place), load_inplace=True)
        (found,) = server.ask(completion([item.prompt for item in items], **asked))
        server.compare(found, items)

    def test_what_cannot_have_blocks_is_refused(self, server: Server) -> None:
        blocks = server.blocks.ids(1)
        begun = {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
        item = server.adapter.chats[0]
        reply = chat(item, **begun)
        reply["options"]["messages"].append({"role": "assistant", "content": "It"})
        asked = {
            "memory tokens only as blocks": completion([*blocks, 40]),
            "num_blocks: must be": completion("a", extra_body={"vllm_xargs": {"num_blocks": 4097}}),
            "use_beam_search": completion("a", extra_body={"use_beam_search": True, "n": 2}),
            "leave room": completion([40] * 505, max_tokens=1),
            "messages: must": reply,
        }
        for found, problem in zip(server.ask(*asked.values()), asked, strict=True):
            assert isinstance(found, dict), found
            assert found["error"] == 400
            assert problem in found["message"]


def _check_one_block(server: Server) -> None:
    items = server.adapter.expected[1]
    one = {"extra_body": {"vllm_xargs": {"num_blocks": 1}}}
    (found,) = server.ask(completion([item.prompt for item in items], **one))
    assert len(items) == LEAST_PROMPTS
    server.compare(found, items, num_blocks=1)


def _count(server: Server, name: str) -> float:
    """Return one of the server's counters."""
    lines = server.vllm.get("/metrics").decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _post(server: Server, name: str, **body: Any) -> None:
    """Load or unload an adapter."""
    connection = http.client.HTTPConnection(HOST, server.vllm.port, timeout=120)
    with closing(connection):
        connection.request("POST", f"/v1/{name}", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
