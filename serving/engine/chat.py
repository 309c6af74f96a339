"""Turns of a chat as a template takes them, and tools in words for templates that know none. Knows no tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serving.types import TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_CALL_MIDDLE, Message, Tool, ToolCall

TOOLS_IN_TEMPLATE = TOOL_CALL_BEGIN.splitlines()[0]  # a template that writes this writes calls as this server does


def function_of(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI writes it, and templates take it."""
    function = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return {"type": "function", "function": function}


def describe_tools(tools: Sequence[Tool]) -> str:
    """What a model must know to call `tools`."""
    functions = "\n".join(json.dumps(function_of(tool)["function"], ensure_ascii=False) for tool in tools)
    call = f'{TOOL_CALL_BEGIN}"<name>"{TOOL_CALL_MIDDLE}{{...}}{TOOL_CALL_END}'
    return f"You may call these functions:\n{functions}\n\nTo call one, answer with its name and arguments:\n{call}"


def turn(message: Message) -> dict[str, Any]:
    """A message for a template that knows tools."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def plain_turn(message: Message) -> dict[str, Any]:
    """A message for a template that does not: calls are the assistant's text, their results the user's."""
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    calls = [
        f"{TOOL_CALL_BEGIN}{json.dumps(call.name)}{TOOL_CALL_MIDDLE}{call.arguments}{TOOL_CALL_END}"
        for call in message.tool_calls
    ]
    return {"role": message.role, "content": "\n".join([*filter(None, [message.content]), *calls])}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}
