"""The body and the reply of `POST /v1/responses`. Knows no other route's shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from serving.api.fields import NoEffect, RequestModel
from serving.api.replies import Usage
from serving.api.sampling import SamplingBody
from serving.api.structures import Exact, Schema
from serving.api.values import Content, Int64, fault
from serving.types import Message, Structure

UNSUPPORTED: Mapping[str, NoEffect] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "metadata": ({},),
    "parallel_tool_calls": (True, False),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


class InputMessage(RequestModel):
    """One turn; messages are the only kind of item."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def message(self) -> Message:
        return Message("system" if self.role == "developer" else self.role, self.content)


def _wrap_text(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) and value else value


InputMessages = Annotated[
    list[InputMessage],
    Field(min_length=1),
    BeforeValidator(_wrap_text, json_schema_input_type=Annotated[str, Field(min_length=1)] | list[InputMessage]),
]


class TextFormat(Exact):
    """What the answer must match: `name` and `schema` go with json_schema. It always does, whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise fault("schema", "schema is required with type json_schema, and only there")
        return self


class TextOptions(Exact):
    """`verbosity` has no effect and may only be what it is without it."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseBody(SamplingBody):
    """`POST /v1/responses`. Without `max_output_tokens` the answer may fill the rest of the context."""

    unsupported = UNSUPPORTED

    input: InputMessages = Field(description="A text, or the messages of a chat.", examples=["Describe the sea."])
    instructions: str | None = Field(None, description="A system message before all others.")
    max_output_tokens: Annotated[Int64, Field(ge=1)] | None = None
    text: TextOptions | None = None

    def messages(self) -> list[Message]:
        """The whole chat."""
        given = (
            [item.message() for item in self.input] if isinstance(self.input, list) else [Message("user", self.input)]
        )
        return [Message("system", self.instructions), *given] if self.instructions else given

    @property
    def structure(self) -> tuple[Structure, str] | None:
        kind = self.text.format if self.text else None
        if kind is None or kind.type == "text":
            return super().structure
        if kind.type == "json_object":
            return Structure("json_object"), "text.format"
        return Structure("json_schema", json.dumps(kind.schema_, ensure_ascii=False)), "text.format.schema"


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[dict[str, Any]] = Field(default_factory=list)
    logprobs: list[dict[str, Any]] = Field(default_factory=list)


class OutputMessage(BaseModel):
    type: Literal["message"] = "message"
    id: str
    status: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class CachedTokens(BaseModel):
    cached_tokens: int


class ReasoningTokens(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=CachedTokens(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


class ResponseReply(BaseModel):
    """OpenAI's response object; the constants say what this server does not do."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: str
    background: Literal[False] = False
    error: None = None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] = Field(default_factory=dict)
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: Literal[True] = True
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["auto"] = "auto"
    tools: list[dict[str, Any]] = Field(default_factory=list)
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
