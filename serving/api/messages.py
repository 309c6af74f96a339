"""Messages of a chat and the tools offered in it, as request bodies hold them. Knows no template."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from serving.api.fields import MESSAGE_UNSUPPORTED, RequestModel, has_no_effect, unsupported_message
from serving.api.values import Content, FunctionName, JsonObject, fault
from serving.types import Message, Tool, ToolCall


class CalledFunction(RequestModel):
    """The name of a function and the JSON text of its arguments."""

    name: FunctionName
    arguments: JsonObject = Field(examples=['{"city": "Oslo"}'])


class RequestedToolCall(RequestModel):
    """A call as an earlier answer holds it."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestModel):
    """One turn. The role `developer` is OpenAI's newer word for `system` and means the same here; a turn of role
    `tool` answers a call of the assistant's."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: FunctionName | None = Field(None, description="For role `tool`: the function that answers.")
    tool_calls: list[RequestedToolCall] | None = Field(None, description="For role `assistant`.")
    tool_call_id: str | None = Field(None, description="For role `tool`: which call this answers.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            accepted = MESSAGE_UNSUPPORTED.get(name)
            if accepted is not None and not has_no_effect(value, accepted):
                raise fault(name, unsupported_message(name, accepted))
        return data

    @model_validator(mode="after")
    def _fields_of_the_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise fault("tool_calls", "only a message of role assistant may have tool_calls")
        if (self.tool_call_id is not None or self.name is not None) and self.role != "tool":
            raise fault("tool_call_id", "only a message of role tool may have a tool_call_id or a name")
        if self.role == "tool" and self.tool_call_id is None:
            raise fault("tool_call_id", "a message of role tool needs the tool_call_id that it answers")
        if self.content is None and not self.tool_calls:
            raise fault("content", "content is required")
        return self

    def message(self) -> Message:
        calls = [ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ()]
        role = "system" if self.role == "developer" else self.role
        return Message(role, self.content or "", tuple(calls), self.tool_call_id, self.name)


class FunctionDefinition(RequestModel):
    """A function that the model may call. Its arguments always match `parameters`, whatever `strict` says."""

    name: FunctionName = Field(examples=["get_weather"])
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None,
        description="JSON schema of the arguments; without it the function takes none.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}],
    )
    strict: bool | None = None


_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class ToolDefinition(RequestModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition

    def tool(self) -> Tool:
        parameters = self.function.parameters
        schema = (
            {"type": "object", "properties": {}, "additionalProperties": False} if parameters is None else parameters
        )
        return Tool(self.function.name, self.function.description or "", json.dumps(schema, ensure_ascii=False))


class NamedFunction(RequestModel):
    name: FunctionName


class ToolRule(RequestModel):
    """Whether and what the model must call: `function` goes with the type `function`, and only there."""

    type: Literal["none", "auto", "required", "function"]
    function: NamedFunction | None = None

    @property
    def must_call(self) -> bool:
        return self.type in ("required", "function")

    @model_validator(mode="after")
    def _function_belongs_to_its_type(self) -> ToolRule:
        if (self.type == "function") != (self.function is not None):
            raise fault("function", "function is required with type function, and only there")
        return self


def _rule(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise ValueError("must be none, auto, required or a function")
        return {"type": value}
    return value


_RULE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            },
            "required": ["type", "function"],
        },
    ]
}
ToolChoice = Annotated[ToolRule, BeforeValidator(_rule), WithJsonSchema(_RULE_SCHEMA)]
