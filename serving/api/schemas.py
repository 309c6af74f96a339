"""Request bodies: their fields, ranges and defaults. Validators see the server's `Caps`; nothing here knows a model.

Sizes that depend on the base model (context, vocabulary) are checked in `prepare.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from serving.api.context import Caps
from serving.api.fields import (
    CHAT_UNSUPPORTED,
    MESSAGE_UNSUPPORTED,
    TOKENIZE_UNSUPPORTED,
    UNSUPPORTED,
    NoEffect,
    has_no_effect,
    unsupported_message,
)
from serving.types import Message, SamplingParams

_INT64 = 2**63
_GREEDY_BELOW = 1e-5
Prompt = str | tuple[int, ...]
T = TypeVar("T")


class RequestModel(BaseModel):
    """A body. `unsupported` maps known fields that it lacks to the values they may have all the same."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, NoEffect]] = {}


def _caps(info: ValidationInfo) -> Caps:
    return info.context if isinstance(info.context, Caps) else Caps()


def _limit(entries: int, most: int) -> None:
    if entries > most:
        raise ValueError(f"at most {most} entries are allowed, got {entries}")


def _is_token_list(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _parse_prompt(value: Any, info: ValidationInfo) -> tuple[Prompt, ...]:
    """One text, one list of token ids, or a list of either kind → the prompts."""
    if isinstance(value, str) or (value and _is_token_list(value)):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, token ids, or a list of those")
    _limit(len(value), _caps(info).prompts)
    if not all(isinstance(item, str) for item in value) and not all(_is_token_list(item) for item in value):
        raise ValueError("must hold either strings only or lists of token ids only")
    if not value or not all(value):
        raise ValueError("must not be empty")
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


def _wrap_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_stop(value: list[str], info: ValidationInfo) -> list[str]:
    _limit(len(value), _caps(info).stop)
    if not all(value):
        raise ValueError("must not hold an empty string")
    return value


def _check_stop_token_ids(value: list[int], info: ValidationInfo) -> list[int]:
    _limit(len(value), _caps(info).stop_token_ids)
    return value


def _check_logit_bias(value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
    _limit(len(value), _caps(info).logit_bias)
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in value):
        raise ValueError("its keys must be token ids")
    return value


def _join_parts(value: Any) -> Any:
    """Content parts of type text, joined; other types are refused."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('must be a string or a list of {"type": "text", "text": string}')
    return "".join(part["text"] for part in value)


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1}, "minItems": 1},
    ]
}
_STOP_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}],
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
Prompts = Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
Content = Annotated[str, BeforeValidator(_join_parts), WithJsonSchema(_CONTENT_SCHEMA)]
StopStrings = Annotated[list[str], BeforeValidator(_wrap_text), AfterValidator(_check_stop)]
TokenIds = Annotated[list[int], AfterValidator(_check_stop_token_ids)]
LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_check_logit_bias)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]


class StreamOptions(BaseModel):
    """`include_usage` asks for a last chunk with the counts of tokens."""

    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class GenerationBody(RequestModel):
    """What the two generating routes share. Null always means: as if absent."""

    model: str
    adapter_id: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT64 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, le=_INT64 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: LogitBias | None = None
    stop: Annotated[StopStrings | None, WithJsonSchema(_STOP_SCHEMA)] = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    request_id: RequestId | None = None
    cache_salt: CacheSalt | None = None

    @property
    def requested_tokens(self) -> int | None:
        """The most tokens to generate, None where the request leaves it open."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How to sample up to `max_tokens`, with the defaults in place of what is absent."""
        temperature = _or(self.temperature, 1.0)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_k=max(_or(self.top_k, 0), 0),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            seed=self.seed,
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=_or(self.min_tokens, 0),
            skip_special_tokens=_or(self.skip_special_tokens, True),
        )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. Without `max_tokens` up to 16 tokens are generated."""

    unsupported = UNSUPPORTED

    prompt: Prompts
    add_special_tokens: bool | None = None


class ChatMessage(RequestModel):
    """One turn. The role `developer` is OpenAI's newer word for `system` and means the same here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            accepted = MESSAGE_UNSUPPORTED.get(name)
            if accepted is not None and not has_no_effect(value, accepted):
                raise ValueError(unsupported_message(name, accepted))
        return data

    def message(self) -> Message:
        return Message("system" if self.role == "developer" else self.role, self.content)


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`. Without `max_tokens` the answer may fill the rest of the context."""

    unsupported = CHAT_UNSUPPORTED

    messages: Messages


class TokenizeBody(RequestModel):
    """`POST /tokenize`: either a `prompt` or the `messages` of a chat."""

    unsupported = TOKENIZE_UNSUPPORTED

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(RequestModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


class ActivateBody(RequestModel):
    """Which revision the bare name shall mean."""

    revision: str


class SetAdapterBody(RequestModel):
    """``name`` follows activation, ``name@revision`` pins, null unsets."""

    adapter: str | None


class LoadAdapterBody(RequestModel):
    """vLLM's body. `load_inplace` replaces an adapter already loaded under that name."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadAdapterBody(RequestModel):
    """vLLM's body."""

    lora_name: str
