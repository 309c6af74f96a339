"""Chats as templates take them, with tools and without."""

from __future__ import annotations

import json

import pytest

from serving.engine.chat import describe_tools, plain_turn, turn
from serving.engine.codec import ModelCodec
from serving.engine.vocabulary import Vocabulary
from serving.errors import InvalidValue
from serving.types import ChatOptions, Message, Tool, ToolCall
from tests.support import VOCAB_SIZE, tiny_tokenizer

CALLED = Message("assistant", "wait", (ToolCall("c1", "look", '{"a": 1}'),))
RESULT = Message("tool", "seen", tool_call_id="c1", name="look")


def codec() -> ModelCodec:
    return ModelCodec(tiny_tokenizer(), Vocabulary(tiny_tokenizer(), VOCAB_SIZE, frozenset({1})))


def test_calls_and_results_for_both_kinds_of_templates() -> None:
    assert turn(CALLED)["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
    ]
    assert turn(RESULT) == {"role": "tool", "content": "seen", "tool_call_id": "c1", "name": "look"}
    assert plain_turn(CALLED) == {
        "role": "assistant",
        "content": 'wait\n<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>',
    }
    assert plain_turn(RESULT) == {"role": "user", "content": "<tool_response>\nseen\n</tool_response>"}


def test_tools_in_words_carry_name_description_and_schema() -> None:
    text = describe_tools([Tool("look", "Looks.", '{"type": "object"}')])
    assert json.loads(text.splitlines()[1]) == {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object"},
    }
    assert '<tool_call>\n{"name": "<name>", "arguments": {...}}\n</tool_call>' in text


def test_an_open_last_message_must_be_kept_by_the_template() -> None:
    open_end = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    tokens = codec().encode_chat([Message("user", "hi"), Message("assistant", "so")], open_end)
    assert tiny_tokenizer().decode(tokens) == "user: hi\nassistant: so"


def test_arguments_may_not_take_the_place_of_the_servers() -> None:
    for name in ("chat_template", "tokenize", "tools", "add_generation_prompt"):
        with pytest.raises(InvalidValue) as raised:
            codec().encode_chat([Message("user", "hi")], ChatOptions(template_arguments=json.dumps({name: 1})))
        assert raised.value.param == f"chat_template_kwargs.{name}"
