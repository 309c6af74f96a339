"""Bodies of successful replies, as OpenAI and vLLM shape them. Knows no engine and no catalog."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from serving.types import AdapterInfo, ModelCard, RevisionInfo

OWNER = "vblora"


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those that were found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Counts of tokens, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> Usage:
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: str


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelEntry(BaseModel):
    """The base model, or an adapter as a model: `parent` is the base it adapts, `root` the content it stands for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = OWNER
    root: str
    parent: str | None
    max_model_len: int
    active_revision: str | None = None
    is_default: bool = False

    @classmethod
    def of_base(cls, card: ModelCard) -> ModelEntry:
        return cls(
            id=card.base_id, created=card.created, root=card.base_id, parent=None, max_model_len=card.max_model_len
        )

    @classmethod
    def of_adapter(cls, card: ModelCard, info: AdapterInfo, model: str, revision: str) -> ModelEntry:
        return cls(
            id=model,
            created=info.created,
            root=f"{info.name}@{revision}",
            parent=card.base_id,
            max_model_len=card.max_model_len,
            active_revision=info.active_revision,
            is_default=info.is_default,
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class RevisionEntry(BaseModel):
    revision: str
    created: int
    bytes: int
    active: bool
    resident: bool


class AdapterEntry(BaseModel):
    """An adapter with its revisions, newest last; `bytes` are those of the active revision."""

    name: str
    active_revision: str
    is_default: bool
    shared: bool
    created: int
    bytes: int
    resident: bool
    revisions: list[RevisionEntry]

    @classmethod
    def of(cls, info: AdapterInfo) -> AdapterEntry:
        active = next(entry for entry in info.revisions if entry.revision == info.active_revision)
        return cls(
            name=info.name,
            active_revision=info.active_revision,
            is_default=info.is_default,
            shared=info.shared,
            created=info.created,
            bytes=active.bytes,
            resident=active.resident,
            revisions=[_revision(entry, info.active_revision) for entry in info.revisions],
        )


def _revision(entry: RevisionInfo, active: str) -> RevisionEntry:
    return RevisionEntry(
        revision=entry.revision,
        created=entry.created,
        bytes=entry.bytes,
        active=entry.revision == active,
        resident=entry.resident,
    )


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterEntry]


class UploadReply(BaseModel):
    """What an upload stored, or found already stored."""

    name: str
    revision: str
    active_revision: str
    created: int
    bytes: int


class DefaultReply(BaseModel):
    """The tenant's default adapter and the revision that answers now; both null when none is set."""

    adapter: str | None
    revision: str | None


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: None = None


class DetokenizeReply(BaseModel):
    prompt: str


class HealthReply(BaseModel):
    status: str


class VersionReply(BaseModel):
    version: str
