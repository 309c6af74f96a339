"""Types of single fields of request bodies: what they accept, and how their limits read in an error.

Validators see the server's `Caps`; nothing here knows a model or a body.
"""

from __future__ import annotations

import json
from collections.abc import Sized
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from serving.api.context import Caps

INT64 = 2**63
Prompt = str | tuple[int, ...]


def fault(field: str, message: str) -> PydanticCustomError:
    """An error of several fields together that shall be told of this one."""
    return PydanticCustomError("fault", "{message}", {"message": message, "field": field})


def caps_of(info: ValidationInfo) -> Caps:
    """The limits that a validator runs under."""
    return info.context if isinstance(info.context, Caps) else Caps()


def at_most(cap: str) -> AfterValidator:
    """Refuses a list or a text of more entries or characters than the field `cap` of `Caps`."""

    def check(value: Sized, info: ValidationInfo) -> Sized:
        _limit(len(value), getattr(caps_of(info), cap))
        return value

    return AfterValidator(check)


def no_more_than(cap: str) -> AfterValidator:
    """Refuses a number above the field `cap` of `Caps`."""

    def check(value: int, info: ValidationInfo) -> int:
        if value > (most := getattr(caps_of(info), cap)):
            raise ValueError(f"must be at most {most}, got {value}")
        return value

    return AfterValidator(check)


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
    _limit(len(value), caps_of(info).prompts)
    if not all(isinstance(item, str) for item in value) and not all(_is_token_list(item) for item in value):
        raise ValueError("must hold either strings only or lists of token ids only")
    if not value or not all(value):
        raise ValueError("must not be empty")
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


def _wrap_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _no_empty_string(value: list[str]) -> list[str]:
    if not all(value):
        raise ValueError("must not hold an empty string")
    return value


def _token_keys(value: dict[str, float]) -> dict[str, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in value):
        raise ValueError("its keys must be token ids")
    return value


def _join_parts(value: Any) -> Any:
    """Content parts of type text, joined; other types are refused."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError('must be a string or a list of {"type": "text", "text": string}')
    return "".join(part["text"] for part in value)


def _json_object(value: str) -> str:
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError("must be the text of a JSON object")
    return value


_TEXT_PARTS = ("text", "input_text", "output_text")
_PROMPT_SCHEMA = {
    "description": "A text, several, token ids, or several lists of those. Each prompt is a choice of its own.",
    "examples": ["The lighthouse keeper", ["Once", "Twice"]],
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 256},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
            "maxItems": 256,
        },
    ],
}
_STOP_SCHEMA = {
    "description": "Strings at which an answer ends.",
    "examples": ["\n", ["###", "END"]],
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
        {"type": "null"},
    ],
}
CONTENT_SCHEMA = {
    "description": "A text, or parts of type text, which are joined.",
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"enum": list(_TEXT_PARTS)}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ],
}
Prompts = Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
Content = Annotated[str, BeforeValidator(_join_parts), WithJsonSchema(CONTENT_SCHEMA)]
Stop = Annotated[
    Annotated[list[str], BeforeValidator(_wrap_text), at_most("stop"), AfterValidator(_no_empty_string)] | None,
    WithJsonSchema(_STOP_SCHEMA),
]
TokenId = Annotated[int, Field(ge=0)]
BadWords = Annotated[list[Annotated[str, Field(min_length=1)]], at_most("bad_words")]
StopTokenIds = Annotated[list[TokenId], at_most("stop_token_ids")]
AllowedTokenIds = Annotated[list[TokenId], Field(min_length=1), at_most("allowed_token_ids")]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
    at_most("logit_bias"),
    AfterValidator(_token_keys),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=0)]
Choices = Annotated[int, Field(ge=1, json_schema_extra={"maximum": 16}), no_more_than("choices")]
Top = Annotated[int, Field(ge=0, json_schema_extra={"maximum": 20}), no_more_than("logprobs")]
Int64 = Annotated[int, Field(ge=-INT64, le=INT64 - 1)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
JsonObject = Annotated[str, AfterValidator(_json_object)]
StructureText = Annotated[str, Field(min_length=1)]
