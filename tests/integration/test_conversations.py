"""Conversations from a file to answers: the same prompts in training and in every command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rim_peft.cli.main import main
from rim_peft.data.chats import Chat
from rim_peft.recipe.syntax import read_yaml
from rim_peft.run import load_run
from tests.conftest import CHAT_TEMPLATE, build_tokenizer, save_base

TEMPLATE = CHAT_TEMPLATE + "{% if add_generation_prompt and enable_thinking is false %}<off>{% endif %}"
OFF = {"enable_thinking": False}


def conversation(n: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"{n} + 1?"},
        {"role": "assistant", "content": f"<think>{n}+1={n + 1}</think>{n + 1}"},
        {"role": "user", "content": "Doubled?"},
        {"role": "assistant", "content": f"{2 * n + 2}", "reasoning_content": f"{n + 1}*2={2 * n + 2}"},
    ]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A recipe for conversations, as the arguments of a command."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_base(tmp_path / "base", "llama", tokenizer=build_tokenizer(chat_template=TEMPLATE))
    rows: list[dict[str, Any]] = [{"messages": conversation(n)} for n in range(12)]
    rows[0]["chat_template_kwargs"] = {"enable_thinking": True, "other": 1}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "model": {"name_or_path": str(tmp_path / "base")},
        "adapter": {"num_blocks": 2, "r": 2},
        "data": {
            "path": str(tmp_path / "rows.jsonl"),
            "options": {"turns": "all", "split_steps": "lines"},
            "chat_template_kwargs": OFF,
            "validation_rows": 2,
            "validation_split": None,
        },
        "evaluation": {"max_new_tokens": 4},
        "grounding": {"per_device_train_batch_size": 4, "max_steps": 1, "save_steps": 1},
        "refinement": None,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return [str(tmp_path / "recipe.yaml")]


def test_every_command_writes_the_prompts_of_the_training(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *command, "data.validation_rows=0"]) == 0
    shown = capsys.readouterr().out
    prompts = [line.partition("prompt ")[2].strip() for line in shown.splitlines() if line.startswith("  row ")]
    assert [prompt.endswith('<off>"') for prompt in prompts] == [False, False, True]
    assert prompts[1] == ('"<|user|>0 + 1?<eos><|assistant|>1<eos><|user|>Doubled?<eos><|assistant|>"')
    assert "2 of 22 training rows have chat_template_kwargs that the chat template does not read (other)" in shown
    assert main(["check", *command, "data.chat_template_kwargs={enable_thinkng: false}"]) == 1
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if "enable_thinkng" in line]
    assert len(lines) == 1, captured.out + captured.err
    assert "chat_template_kwargs.enable_thinkng: must be a variable of the tokenizer's chat template, which" in lines[0]
    assert main(["train", *command]) == 0
    out = tmp_path / "out"
    assert read_yaml((out / "recipe.yaml").read_text())["data"]["chat_template_kwargs"] == OFF
    run = load_run(out)
    answerer = run.answerer()
    user = conversation(3)[0]
    assert answerer.tokenizer.decode(answerer.encode([[user]])[0]).endswith("<|assistant|><off>")
    chats = [
        {"messages": conversation(3)},
        {"messages": conversation(3)[:2], "continue_final_message": True},
        {"question": [user], "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
    ]
    lines = "".join(json.dumps(chat) + "\n" for chat in chats).encode()
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(lines), isatty=lambda: False))
    assert main(["generate", str(out)]) == 1
    captured = capsys.readouterr()
    assert "stdin line 4: question: is empty. It is left unanswered." in captured.err
    earlier = [{name: message[name] for name in ("role", "content")} for message in conversation(3)]
    questions = [
        earlier[:3],
        Chat(earlier[:2], continue_final_message=True),
        Chat([user], chat_template_kwargs={"enable_thinking": True}),
    ]
    answers = [json.loads(line)["answer"] for line in captured.out.splitlines()]
    assert answers == list(answerer.answer(questions))
    assert main(["evaluate", str(out), "--split", "train", "--limit", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 3
    told = answerer.conversation()
    assert told.answer(user["content"]) == next(answerer.answer([[user]]))
