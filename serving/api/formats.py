"""Rows' events → the bodies and chunks of the two generating routes. Knows no engine: text and reasons come in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from serving.api.replies import (
    AssistantMessage,
    ChatChoice,
    ChatReply,
    CompletionChoice,
    CompletionReply,
    Usage,
)


@dataclass(slots=True)
class Choice:
    """What one row has produced so far."""

    texts: list[str] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True)
class Format(ABC):
    """One request's reply in OpenAI's shape. `model` echoes the request; `request_id` is what follows the prefix."""

    request_id: str
    model: str
    created: int
    wants_usage: bool = False

    prefix: ClassVar[str]
    chunk_object: ClassVar[str]

    @property
    def id(self) -> str:
        return f"{self.prefix}-{self.request_id}"

    @abstractmethod
    def reply(self, choices: Sequence[Choice], usage: Usage) -> BaseModel:
        """The whole answer."""

    @abstractmethod
    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        """What is new in a choice; `first` marks its first chunk."""

    def chunk(self, index: int, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        """One chunk of a stream."""
        choice = {"index": index, **self.delta(text, first=first), "logprobs": None, "finish_reason": finish_reason}
        return self._envelope([choice], None)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for usage."""
        return self._envelope([], usage)

    def _envelope(self, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if self.wants_usage:
            chunk["usage"] = None if usage is None else usage.model_dump()
        return chunk


class CompletionFormat(Format):
    """`/v1/completions`."""

    prefix = "cmpl"
    chunk_object = "text_completion"

    def reply(self, choices: Sequence[Choice], usage: Usage) -> CompletionReply:
        entries = [
            CompletionChoice(index=index, text=choice.text, finish_reason=choice.finish_reason)
            for index, choice in enumerate(choices)
        ]
        return CompletionReply(id=self.id, created=self.created, model=self.model, choices=entries, usage=usage)

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        return {"text": text}


class ChatFormat(Format):
    """`/v1/chat/completions`. A choice's first chunk carries its role, and no chunk empty content but the first."""

    prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"

    def reply(self, choices: Sequence[Choice], usage: Usage) -> ChatReply:
        entries = [
            ChatChoice(index=index, message=AssistantMessage(content=choice.text), finish_reason=choice.finish_reason)
            for index, choice in enumerate(choices)
        ]
        return ChatReply(id=self.id, created=self.created, model=self.model, choices=entries, usage=usage)

    def delta(self, text: str, *, first: bool) -> dict[str, Any]:
        if first:
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text else {}}
