"""One row's answer, as it takes shape from its events: text, calls, log probabilities. Knows no engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from serving.api.logprobs import CompletionLogprobsWriter, chat_logprobs, prompt_logprobs
from serving.api.prepare import Prepared, Row
from serving.api.replies import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionChoice,
    CompletionLogprobs,
    FunctionCall,
    PromptLogprobs,
    ToolCallEntry,
)
from serving.api.schemas import ChatBody, CompletionBody
from serving.api.tools import ToolCallReader
from serving.types import GenerationEvent, TextCodec, TokenLogprob


class Choice(ABC):
    """One row's answer, which grows with every event. `leader` is the choice whose row computed the prompt."""

    def __init__(self, index: int, row: Row, leader: Choice | None, codec: TextCodec) -> None:
        self.index = index
        self.row = row
        self.codec = codec
        self.finish_reason: str | None = None
        self.started = False
        self._leader = leader
        self._scores: tuple[TokenLogprob, ...] = ()

    def take(self, event: GenerationEvent) -> dict[str, Any] | None:
        """Add an event; returns what a chunk says of this choice, None if that is nothing."""
        first, self.started = not self.started, True
        if first and self._leader is None:
            self._scores = event.prompt_logprobs
        self.finish_reason = event.finish_reason
        news = self.add(event, first=first)
        if news is None:
            return None
        return {"index": self.index, "logprobs": None, "finish_reason": self.finish_reason, **news}

    @property
    def scores(self) -> tuple[TokenLogprob, ...]:
        """Of the prompt's tokens but the first."""
        return self._scores if self._leader is None else self._leader.scores

    @abstractmethod
    def add(self, event: GenerationEvent, *, first: bool) -> dict[str, Any] | None:
        """Add an event; returns the fields that are new, None if there are none."""


class CompletionState(Choice):
    """A choice of `/v1/completions`."""

    def __init__(self, index: int, row: Row, leader: Choice | None, codec: TextCodec, body: CompletionBody) -> None:
        super().__init__(index, row, leader, codec)
        self.text = ""
        self.logprobs = None if body.logprobs is None else CompletionLogprobs()
        self._body = body
        self._writer = CompletionLogprobsWriter(codec, row.echo)

    def add(self, event: GenerationEvent, *, first: bool) -> dict[str, Any] | None:
        text = (self.row.echo if first else "") + event.text
        self.text += text
        news: dict[str, Any] = {"text": text}
        if self.logprobs is not None:
            lists = self._lists(event, first=first)
            self.logprobs.extend(lists)
            news["logprobs"] = lists.model_dump() if lists.tokens else None
        if first and self._body.prompt_logprobs is not None:
            news["prompt_logprobs"] = dump_prompt(self.prompt_logprobs)
        return news if text or event.logprobs or first or event.finish_reason else None

    def _lists(self, event: GenerationEvent, *, first: bool) -> CompletionLogprobs:
        """The log probabilities that an event brings, before them the echoed prompt's."""
        if not (first and self._body.echo):
            return self._writer.write(event.logprobs)
        lists = self._writer.write(self.scores, self.row.prompt[0])
        lists.extend(self._writer.write(event.logprobs))
        return lists

    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        return None if self._body.prompt_logprobs is None else prompt_logprobs(self.codec, self.scores)

    def whole(self) -> CompletionChoice:
        """The choice in a reply that is not streamed."""
        return CompletionChoice(
            index=self.index,
            text=self.text,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason or "",
            prompt_logprobs=self.prompt_logprobs,
        )


class ChatState(Choice):
    """A choice of `/v1/chat/completions`. Its first chunk carries the role."""

    def __init__(self, index: int, row: Row, leader: Choice | None, codec: TextCodec, body: ChatBody) -> None:
        super().__init__(index, row, leader, codec)
        self.content = ""
        self.logprobs: list[ChatTokenLogprob] | None = [] if body.logprobs else None
        self._named = body.named
        self._tools = ToolCallReader() if body.offered else None

    def add(self, event: GenerationEvent, *, first: bool) -> dict[str, Any] | None:
        text, deltas = self._read(event)
        self.content += text
        delta: dict[str, Any] = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        if deltas:
            delta["tool_calls"] = deltas
        news: dict[str, Any] = {"delta": delta}
        if self.logprobs is not None:
            entries = chat_logprobs(self.codec, event.logprobs)
            self.logprobs += entries
            news["logprobs"] = ChatLogprobs(content=entries).model_dump() if entries else None
        return news if delta or event.logprobs or event.finish_reason else None

    def _read(self, event: GenerationEvent) -> tuple[str, list[dict[str, Any]]]:
        if self._tools is None:
            return event.text, []
        reading = self._tools.read(event.text, last=event.finish_reason is not None)
        if self._tools.calls and event.finish_reason == "stop" and self._named is None:
            self.finish_reason = "tool_calls"  # OpenAI keeps "stop" where the function was named
        return reading.content, reading.deltas

    def whole(self) -> ChatChoice:
        """The choice in a reply that is not streamed."""
        calls = [
            ToolCallEntry(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in (self._tools.calls if self._tools else ())
        ]
        content = self.content if self.content or not calls else None
        return ChatChoice(
            index=self.index,
            message=AssistantMessage(content=content, tool_calls=calls or None),
            logprobs=None if self.logprobs is None else ChatLogprobs(content=self.logprobs),
            finish_reason=self.finish_reason or "",
        )


def completion_choices(prepared: Prepared, codec: TextCodec, body: CompletionBody) -> list[CompletionState]:
    """The choices of a completion, none of which has begun."""
    choices: list[CompletionState] = []
    for index, row in enumerate(prepared.rows):
        leader = None if row.leader is None else choices[row.leader]
        choices.append(CompletionState(index, row, leader, codec, body))
    return choices


def chat_choices(prepared: Prepared, codec: TextCodec, body: ChatBody) -> list[ChatState]:
    """The choices of a chat, none of which has begun."""
    choices: list[ChatState] = []
    for index, row in enumerate(prepared.rows):
        leader = None if row.leader is None else choices[row.leader]
        choices.append(ChatState(index, row, leader, codec, body))
    return choices


def dump_prompt(entries: PromptLogprobs | None) -> list[dict[str, Any] | None] | None:
    """Prompt log probabilities as a chunk holds them."""
    if entries is None:
        return None
    return [entry and {token: score.model_dump() for token, score in entry.items()} for entry in entries]
