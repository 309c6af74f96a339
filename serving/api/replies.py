"""Bodies of successful replies, as OpenAI and vLLM shape them. Knows no engine and no catalog."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from serving.types import AdapterInfo, ModelCard, RevisionInfo

OWNER = "vblora"


def _is_none(value: object) -> bool:
    """For fields that a reply only has where they were asked for."""
    return value is None


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


class CompletionLogprobs(BaseModel):
    """An entry a token in each list. The prompt's first token has null in two of them."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = Field(default_factory=list)
    text_offset: list[int] = Field(default_factory=list)

    def extend(self, other: CompletionLogprobs) -> None:
        """Append the entries of `other`."""
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset


class PromptLogprob(BaseModel):
    """One token of the prompt, or one that might have stood in its place."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=_is_none)


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A token and its probability's logarithm; `bytes` are those of its text, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A generated token, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    """A function's name and the JSON text of its arguments."""

    name: str
    arguments: str


class ToolCallEntry(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    """`content` is null where there are only calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallEntry] | None = Field(None, exclude_if=_is_none)


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=_is_none)


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


class ListPage(BaseModel):
    """A part of a list: the next one is that `after` its `last_id`."""

    object: Literal["list"] = "list"
    has_more: bool
    first_id: str | None
    last_id: str | None


def _ends(ids: list[str], limit: int) -> dict[str, Any]:
    """The fields of a page that holds the first `limit` of the entries with these ids."""
    page = ids[:limit]
    return {"has_more": len(ids) > limit, "first_id": page[0] if page else None, "last_id": page[-1] if page else None}


class ModelList(ListPage):
    data: list[ModelEntry]

    @classmethod
    def of(cls, found: list[ModelEntry], limit: int) -> ModelList:
        """The first `limit` of what was `found`; one more tells that there are more."""
        return cls(data=found[:limit], **_ends([entry.id for entry in found], limit))


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


class AdapterList(ListPage):
    data: list[AdapterEntry]

    @classmethod
    def of(cls, found: list[AdapterEntry], limit: int) -> AdapterList:
        """The first `limit` of what was `found`; one more tells that there are more."""
        return cls(data=found[:limit], **_ends([entry.name for entry in found], limit))


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
    token_strs: list[str] | None = None


class DetokenizeReply(BaseModel):
    prompt: str


class HealthReply(BaseModel):
    status: str


class VersionReply(BaseModel):
    version: str
