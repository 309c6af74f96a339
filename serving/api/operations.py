"""What the specification says of each operation beyond its types: how it can fail, and what a request looks like.

Plain data, by operation id, which is the name of the route's function. Knows no routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.errors import (
    ContextLengthExceeded,
    Draining,
    EngineUnavailable,
    IncompatibleAdapter,
    InternalError,
    InvalidAdapter,
    InvalidApiKey,
    InvalidValue,
    ModelNotFound,
    NotFound,
    Overloaded,
    PermissionDenied,
    RateLimitExceeded,
    RequestTooLarge,
    ServingError,
    StorageUnavailable,
)

Errors = tuple[type[ServingError], ...]
Examples = Mapping[str, Any]

EVERYWHERE: Errors = (InvalidValue, RequestTooLarge, InternalError)
WITH_A_KEY: Errors = (InvalidApiKey, PermissionDenied, Draining)
# What a stored adapter can turn out to be once it is needed.
_PINNING: Errors = (ModelNotFound, InvalidAdapter, IncompatibleAdapter, StorageUnavailable)
_GENERATING: Errors = (ContextLengthExceeded, *_PINNING, RateLimitExceeded, Overloaded, EngineUnavailable)


@dataclass(frozen=True)
class Operation:
    """`errors` come on top of `EVERYWHERE`, and of `WITH_A_KEY` unless it is `public`. A `generating` one names the
    adapter that answered in a header; one that `streams` can answer as events."""

    errors: Errors = ()
    examples: Examples = field(default_factory=dict)
    public: bool = False
    generating: bool = False
    streams: bool = False


_SCHEMA = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
_WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a town.", "parameters": _SCHEMA},
}
_QUESTION = [{"role": "user", "content": "Where is my parcel?"}]
_REVISION = "0f1e2d3c4b5a6978"

OPERATIONS: Mapping[str, Operation] = {
    "create_completion": Operation(
        _GENERATING,
        {
            "an adapter": {"model": "saltspoke", "prompt": "The lighthouse keeper", "max_tokens": 24, "temperature": 0},
            "the base model, several prompts, as a stream": {
                "model": "gemma3-270m",
                "prompt": ["Once upon a time", "In a town by the sea"],
                "max_tokens": 32,
                "seed": 7,
                "stop": ["\n\n"],
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            "score a text": {
                "model": "saltspoke",
                "prompt": "A sea of fog",
                "max_tokens": 0,
                "echo": True,
                "logprobs": 1,
            },
        },
        generating=True,
        streams=True,
    ),
    "create_chat_completion": Operation(
        _GENERATING,
        {
            "an answer": {"model": "saltspoke", "messages": _QUESTION, "max_tokens": 64},
            "an answer that matches a schema": {
                "model": "saltspoke",
                "messages": [{"role": "user", "content": "Name a town."}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": _SCHEMA}},
            },
            "tools": {
                "model": "saltspoke",
                "messages": [{"role": "user", "content": "Do I need a coat in Oslo?"}],
                "tools": [_WEATHER],
                "tool_choice": "auto",
            },
        },
        generating=True,
        streams=True,
    ),
    "create_response": Operation(
        _GENERATING,
        {
            "a text": {
                "model": "saltspoke",
                "instructions": "Be brief.",
                "input": "Where is my parcel?",
                "max_output_tokens": 64,
            }
        },
        generating=True,
        streams=True,
    ),
    "create_embeddings": Operation(
        _GENERATING, {"two texts": {"model": "saltspoke", "input": ["a sea of fog", "a clear day"]}}, generating=True
    ),
    "list_models": Operation(),
    "get_model": Operation((ModelNotFound,)),
    "tokenize": Operation(
        _PINNING,
        {
            "a text": {"prompt": "The lighthouse keeper"},
            "a chat": {"model": "saltspoke", "messages": _QUESTION, "return_token_strs": True},
        },
    ),
    "detokenize": Operation(_PINNING, {"some tokens": {"tokens": [2, 818, 171, 1003]}}),
    "list_adapters": Operation(),
    "get_adapter": Operation((ModelNotFound, NotFound)),
    "upload_adapter": Operation((InvalidAdapter, IncompatibleAdapter, RateLimitExceeded, StorageUnavailable)),
    "activate_adapter": Operation((ModelNotFound, NotFound), {"roll back": {"revision": _REVISION}}),
    "delete_adapter": Operation((ModelNotFound, NotFound)),
    "delete_revision": Operation((ModelNotFound, NotFound)),
    "set_adapter": Operation(
        (ModelNotFound,),
        {
            "the active revision": {"adapter": "saltspoke"},
            "one revision": {"adapter": f"saltspoke@{_REVISION}"},
            "no default": {"adapter": None},
        },
    ),
    "load_lora_adapter": Operation(
        (InvalidAdapter, IncompatibleAdapter, StorageUnavailable),
        {"a folder": {"lora_name": "saltspoke", "lora_path": "/srv/adapters/saltspoke", "load_inplace": True}},
    ),
    "unload_lora_adapter": Operation((ModelNotFound,), {"its name": {"lora_name": "saltspoke"}}),
    "list_tenants": Operation(),
    "create_tenant": Operation(
        (),
        {
            "a customer": {"name": "acme"},
            "a customer with limits": {"name": "acme", "weight": 2, "quotas": {"requests_per_minute": 600}},
            "an operator": {"name": "ops", "role": "operator"},
        },
    ),
    "get_tenant": Operation((NotFound,)),
    "change_tenant": Operation(
        (NotFound,),
        {
            "disable": {"disabled": True},
            "limit": {"quotas": {"tokens_per_minute": 100000, "requests_per_minute": None}},
        },
    ),
    "delete_tenant": Operation((NotFound,)),
    "list_keys": Operation((NotFound,)),
    "create_key": Operation((NotFound,)),
    "revoke_key": Operation((NotFound,)),
    "list_changes": Operation(),
    "list_usage": Operation((Overloaded,)),
    "live": Operation(public=True),
    "ready": Operation((Draining, EngineUnavailable), public=True),
    "health": Operation((Draining, EngineUnavailable), public=True),
    "version": Operation(public=True),
    "metrics": Operation(),
}

EVERY_ERROR: Errors = tuple(
    dict.fromkeys(
        error
        for errors in (EVERYWHERE, WITH_A_KEY, *(operation.errors for operation in OPERATIONS.values()))
        for error in errors
    )
)

NAME_SCHEMA = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}
_REVISION_SCHEMA = {"type": "string", "pattern": "^[0-9a-f]{16}$"}
PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "name": {"description": "The adapter's or the tenant's name.", "schema": NAME_SCHEMA, "example": "saltspoke"},
    "id": {"description": "The key's id.", "schema": {"type": "string"}, "example": "5f0c1d2e3a4b6978"},
    "limit": {"description": "Most entries in the answer.", "example": 100},
    "after": {"description": "The last entry of the page before, its `last_id`.", "example": "2026-01-31/acme/"},
    "tenant": {"description": "Only this tenant's.", "example": "acme"},
    "adapter": {"description": "Only of this one; empty for the base model.", "example": f"saltspoke@{_REVISION}"},
    "from": {"description": "The first day.", "example": "2026-01-31"},
    "to": {"description": "The last day.", "example": "2026-12-31"},
    "format": {"description": "`json` or `csv`.", "example": "json"},
    "revision": {
        "description": "The first 16 hexadecimal digits of the content's hash.",
        "schema": _REVISION_SCHEMA,
        "example": _REVISION,
    },
    "model": {
        "description": "Any name that `model` may have in a request; slashes and all.",
        "schema": {"type": "string"},
        "example": f"saltspoke@{_REVISION}",
    },
}
