"""Choices → the bodies and chunks of the two generating routes, in OpenAI's shape. Knows no engine: events come in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from serving.api.choices import ChatState, CompletionState, dump_prompt
from serving.api.logprobs import prompt_logprobs
from serving.api.replies import ChatReply, CompletionReply, PromptLogprobs, Usage
from serving.types import GenerationEvent

State = TypeVar("State", CompletionState, ChatState)


@dataclass
class Format(ABC, Generic[State]):
    """One request's reply. `model` echoes the request; `request_id` is what follows the prefix."""

    request_id: str
    model: str
    created: int
    wants_usage: bool
    choices: Sequence[State]

    prefix: ClassVar[str]
    chunk_object: ClassVar[str]

    @property
    def id(self) -> str:
        return f"{self.prefix}-{self.request_id}"

    @abstractmethod
    def reply(self, usage: Usage) -> BaseModel:
        """The whole answer, once all events are in."""

    def take(self, index: int, event: GenerationEvent) -> dict[str, Any] | None:
        """Add an event of row `index`; returns the chunk for it, None if there is nothing to tell."""
        told = self.choices[index].take(event)
        return None if told is None else self._envelope([told], None)

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


class CompletionFormat(Format[CompletionState]):
    """`/v1/completions`."""

    prefix = "cmpl"
    chunk_object = "text_completion"

    def reply(self, usage: Usage) -> CompletionReply:
        choices = [choice.whole() for choice in self.choices]
        return CompletionReply(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


class ChatFormat(Format[ChatState]):
    """`/v1/chat/completions`. The prompt's log probabilities stand beside the choices, in the first chunk."""

    prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"

    def reply(self, usage: Usage) -> ChatReply:
        return ChatReply(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[choice.whole() for choice in self.choices],
            usage=usage,
            prompt_logprobs=self._prompt_logprobs(),
        )

    def take(self, index: int, event: GenerationEvent) -> dict[str, Any] | None:
        first = index == 0 and not self.choices[0].started
        chunk = super().take(index, event)
        if chunk is not None and first and self._wants_scores:
            chunk["prompt_logprobs"] = dump_prompt(self._prompt_logprobs())
        return chunk

    @property
    def _wants_scores(self) -> bool:
        return self.choices[0].row.sampling.prompt_logprobs is not None

    def _prompt_logprobs(self) -> PromptLogprobs | None:
        choice = self.choices[0]
        return prompt_logprobs(choice.codec, choice.scores) if self._wants_scores else None
