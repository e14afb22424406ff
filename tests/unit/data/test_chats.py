"""Chats with tools and variables of their template: how they are read, checked and written."""

from __future__ import annotations

import inspect
import json
from importlib import resources
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rim_peft.data.chat_templates import variables_of
from rim_peft.data.chats import CHAT_COLUMNS, RESERVED, Chat
from rim_peft.data.examples import Example, RowError, Templates, read_example
from rim_peft.data.tokenization import tokenize_example, tokenize_prompts
from rim_peft.export.tokens import set_variables
from rim_peft.tasks import get_task
from tests.conftest import CHAT_TEMPLATE, build_tokenizer
from tests.objectives import prepare_rows

USER = {"role": "user", "content": "What is 1 + 1?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int", "default": None}}}}]
READ_TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}]

# As Qwen3's template: tools before the chat, thinking of earlier turns dropped, an empty thought if it is turned off.
QWEN_LIKE = (
    "{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<eos>{% endif %}"
    "{%- for message in messages %}<|{{ message.role }}|>"
    "{%- if message.role == 'assistant' and '</think>' in message.content %}"
    "{{- message.content.split('</think>')[-1].lstrip('\\n') }}"
    "{%- else %}{{- message.content }}{% endif %}<eos>{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture
def qwen_like() -> PreTrainedTokenizerBase:
    return build_tokenizer(chat_template=QWEN_LIKE)


def written(tokenizer: PreTrainedTokenizerBase, question: Any, **templates: Any) -> str:
    (ids,) = tokenize_prompts([question], tokenizer, Templates(**templates))
    return str(tokenizer.decode(ids))


def test_the_reserved_names_are_the_arguments_of_the_tokenizer() -> None:
    signature = inspect.signature(PreTrainedTokenizerBase.apply_chat_template)
    assert set(signature.parameters) - {"self", "kwargs", "documents"} <= {*RESERVED}


def test_variables_reach_the_template_and_a_rows_own_come_first(qwen_like: PreTrainedTokenizerBase) -> None:
    assert written(qwen_like, [USER]) == "<|user|>What is 1 + 1?<eos><|assistant|>"
    off = written(qwen_like, [USER], chat_template_kwargs={"enable_thinking": False})
    assert off == "<|user|>What is 1 + 1?<eos><|assistant|><think></think>"
    on = Chat([USER], chat_template_kwargs={"enable_thinking": True})
    assert written(qwen_like, on, chat_template_kwargs={"enable_thinking": False}) == written(qwen_like, [USER])
    assert written(qwen_like, Chat([USER], chat_template_kwargs={"enable_thinking": False})) == off


def test_tools_reach_the_template(qwen_like: PreTrainedTokenizerBase) -> None:
    text = written(qwen_like, Chat([USER], tools=TOOLS))
    assert text == f"<|system|>{json.dumps(READ_TOOLS[0])}<eos><|user|>What is 1 + 1?<eos><|assistant|>"


def test_tools_are_refused_where_the_template_does_not_use_them(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RowError, match=r"tools: must be empty, since the tokenizer's chat template does not use tools"):
        written(tokenizer, Chat([USER], tools=TOOLS))
    named = build_tokenizer(chat_template={"default": CHAT_TEMPLATE, "tool_use": QWEN_LIKE})
    assert '"add"' in written(named, Chat([USER], tools=TOOLS))


def test_variables_that_no_template_reads_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        ValueError, match=r"chat_template_kwargs\.enable_thinkng: must be a variable .*which reads add_"
    ):
        written(tokenizer, [USER], chat_template_kwargs={"enable_thinkng": False})
    bare = build_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match=r"chat_template_kwargs\.enable_thinking: .*template, which does not exist"):
        written(bare, "a text", chat_template_kwargs={"enable_thinking": False})
    # A row's own are as in TRL: made for several templates, so one may not read them.
    assert written(tokenizer, Chat([USER], chat_template_kwargs={"other": 1})) == written(tokenizer, [USER])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ([1], r"chat_template_kwargs: must be a mapping of the chat template's variables, .* got \[1\] \(list\)"),
        ("enable_thinking", "chat_template_kwargs: must be a mapping .* got 'enable_thinking'"),
        ({1: 2}, "chat_template_kwargs: must be a mapping"),
        ({"a %}{{ b": 1}, "chat_template_kwargs: must be a mapping"),
        ({"tokenize": True}, r"chat_template_kwargs\.tokenize: must be a variable of the chat template, but is an arg"),
        ({"day": {1, 2}}, "chat_template_kwargs: must have values that JSON can hold"),
        ({"day": float("nan")}, "chat_template_kwargs: must have values that JSON can hold"),
    ],
)
def test_other_variables_are_refused(variables: Any, message: str) -> None:
    for make in (Chat, lambda _, **options: Templates(**options)):
        with pytest.raises(ValueError, match=message):
            make([USER], chat_template_kwargs=variables)


@pytest.mark.parametrize("tools", ["add", [1], {"name": "add"}, 5])
def test_other_tools_are_refused(tools: Any) -> None:
    with pytest.raises(RowError, match="tools: must be a list of JSON schemas, one for each tool, got"):
        read_example({"question": [USER], "answer": "2", "tools": tools})


def test_a_failure_of_the_template_names_the_variables() -> None:
    tokenizer = build_tokenizer(chat_template=CHAT_TEMPLATE + "{{ 1 + day }}")
    with pytest.raises(RowError, match=r"chat_template_kwargs: the chat template fails with \{'day': 'x'"):
        written(tokenizer, Chat([USER], chat_template_kwargs={"day": "x"}))


@pytest.mark.parametrize("as_text", [False, True])
def test_rows_have_the_columns_of_trl(as_text: bool, qwen_like: PreTrainedTokenizerBase) -> None:
    values: dict[str, Any] = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False, "other": None}}
    beside = {name: json.dumps(value) for name, value in values.items()} if as_text else values
    row = {"question": [USER], "answer": "2", "steps": ["1+1=2"], **beside}
    example = read_example(row)
    assert isinstance(example.question, Chat)
    assert (example.question.tools, example.question.chat_template_kwargs) == (READ_TOOLS, {"enable_thinking": False})
    plain = {"question": [USER], "answer": "2", "steps": ["1+1=2"], "tools": None, "chat_template_kwargs": None}
    table = Dataset.from_list([row, {**plain}])  # with structs, whose missing keys are null
    first, second = prepare_rows(table, qwen_like)
    assert first["prompt_ids"] == tokenize_example(example, qwen_like)["prompt_ids"]
    assert second["prompt_ids"] == tokenize_example(Example([USER], "2"), qwen_like)["prompt_ids"]
    assert first["prompt_ids"] != second["prompt_ids"]


def test_the_columns_are_not_those_of_texts() -> None:
    assert read_example({"question": "q", "answer": "a", "tools": "hammer"}) == Example("q", "a")


def test_columns_can_be_read_again() -> None:
    chat = Chat([USER], tools=TOOLS, chat_template_kwargs={"enable_thinking": False})
    again = read_example({"question": list(chat), "answer": "2", **chat.columns()}).question
    assert isinstance(again, Chat)
    assert [getattr(again, name) for name in CHAT_COLUMNS] == [getattr(chat, name) for name in CHAT_COLUMNS]


def test_special_tokens_in_tools_and_variables_of_rows_are_text() -> None:
    tokenizer = build_tokenizer(chat_template=QWEN_LIKE + "{{ day }}")
    spelt = Chat([USER], tools=[{"name": "<eos>"}], chat_template_kwargs={"day": "<bos>"})
    (ids,) = tokenize_prompts([spelt], tokenizer)
    (plain,) = tokenize_prompts([Chat([USER], tools=[{"name": "x"}], chat_template_kwargs={"day": "y"})], tokenizer)
    special = set(tokenizer.added_tokens_decoder)
    assert [token for token in ids if token in special] == [token for token in plain if token in special]
    assert tokenizer.decode(ids).endswith("<bos>")


def test_thinking_of_earlier_turns_is_what_the_template_makes_of_it(qwen_like: PreTrainedTokenizerBase) -> None:
    turns = [USER, {"role": "assistant", "content": "<think>\nsum\n</think>\n\n2"}, {"role": "user", "content": "Why?"}]
    expected = "<|user|>What is 1 + 1?<eos><|assistant|>2<eos><|user|>Why?<eos><|assistant|>"
    assert written(qwen_like, turns) == expected
    kept = build_tokenizer()  # its template keeps contents as they are
    assert "<think>" in written(kept, turns)


@pytest.mark.parametrize(
    ("name", "keeps_thinking", "uses_tools", "variables"),
    [
        ("qwen3", False, True, {"enable_thinking": False}),
        ("deepseek_r1_distill", False, False, {}),
        ("glm4moe", False, True, {"enable_thinking": False}),
        ("qwen2_5", True, True, {}),
        ("llama3", True, False, {}),
        ("gemma3", True, False, {}),
    ],
)
def test_templates_of_published_models(
    name: str, keeps_thinking: bool, uses_tools: bool, variables: dict[str, Any]
) -> None:
    """TRL ships their templates: what becomes of earlier turns' thinking, of tools, and of variables in an export."""
    file = resources.files("trl") / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip("this version of TRL does not ship it")
    tokenizer = build_tokenizer(chat_template=file.read_text(encoding="utf-8"))
    turns = [USER, {"role": "assistant", "content": "<think>\nsum\n</think>\n\n2"}, {"role": "user", "content": "Why?"}]
    trained = written(tokenizer, turns, chat_template_kwargs=variables)
    assert ("sum" in trained) is keeps_thinking
    assert "2" in trained
    assert (trained != written(tokenizer, turns)) is bool(variables)
    assert ("tools" in variables_of(file.read_text(encoding="utf-8"))) is uses_tools
    set_variables(tokenizer, variables)
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == trained


def test_calls_of_tools_are_refused() -> None:
    turns = [USER, {"role": "assistant", "content": "2", "tool_calls": [{"name": "add"}]}, USER]
    with pytest.raises(RowError, match=r"question\[1\]\.tool_calls: must be empty, since calls of tools are not read"):
        read_example({"question": turns, "answer": "2"})
    for row in ({"messages": turns[:2]}, {"prompt": turns[:1], "completion": turns[1:2]}):
        with pytest.raises(RowError, match=r"answer\.tool_calls: must be empty, since calls of tools are not read"):
            get_task("rows").read_row(row)
    assert get_task("rows").read_row({"messages": [USER, {**turns[1], "tool_calls": None}]}).answer == "2"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([{"role": "assistant", "tool_calls": [{"name": "add"}]}], r"answer\.tool_calls: must be empty"),
        ([{"role": "assistant", "content": None, "function_call": {"name": "add"}}], r"answer\.function_call: must be"),
        ([{"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}], "what tools return is not read"),
        (
            [{"role": "assistant", "content": text} for text in "12"],
            r"several messages are not read, got assistant, ass",
        ),
    ],
)
def test_answers_with_tools_or_of_several_messages_say_so(answer: list[dict[str, Any]], message: str) -> None:
    for row in ({"messages": [USER, *answer]}, {"prompt": [USER], "completion": answer}):
        with pytest.raises(RowError, match=message):
            get_task("rows").read_row(row)
    called = [USER, {"role": "assistant", "tool_calls": [{"name": "add"}]}, {"role": "tool", "content": "2"}, USER]
    with pytest.raises(RowError, match=r"question\[1\]\.tool_calls: must be empty"):  # though it has no content
        read_example({"question": called, "answer": "2"})


def test_a_begun_answer_is_no_example_and_must_be_the_assistants() -> None:
    begun = Chat([USER, {"role": "assistant", "content": "It is"}], continue_final_message=True)
    with pytest.raises(RowError, match="question: must end with the user's message in an example"):
        Example(begun, "2")
    with pytest.raises(RowError, match="the last message must be the assistant's with continue_final_message, got one"):
        Example(Chat([USER], continue_final_message=True), "2")
    with pytest.raises(RowError, match="the last message before a begun answer must be the user's, got none"):
        Example(Chat(begun[1:], continue_final_message=True), "2")


def test_variables_are_found_in_templates() -> None:
    assert variables_of(QWEN_LIKE) == {"tools", "messages", "add_generation_prompt", "enable_thinking"}
    assert variables_of("{% set x = x if x is defined else 1 %}{% generation %}{{ x }}{% endgeneration %}") == {"x"}
