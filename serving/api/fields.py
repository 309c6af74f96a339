"""Which fields a body has, and which ones clients of OpenAI or vLLM may send that this server does not act on: the
published list, as data.

A field is refused by name unless its value is null or one that has no effect; a field that nobody knows is ignored
and logged once. Knows no routes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from serving.errors import InvalidValue

NoEffect = tuple[object, ...]

UNSUPPORTED: Mapping[str, NoEffect] = {
    "audio": (),
    "best_of": (1,),
    "detokenize": (True,),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION_UNSUPPORTED: Mapping[str, NoEffect] = {
    **UNSUPPORTED,
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
CHAT_UNSUPPORTED: Mapping[str, NoEffect] = {
    **UNSUPPORTED,
    "add_special_tokens": (False,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
}
MESSAGE_UNSUPPORTED: Mapping[str, NoEffect] = {"audio": (), "function_call": ()}
EMBEDDING_UNSUPPORTED: Mapping[str, NoEffect] = {"dimensions": ()}
TOKENIZE_UNSUPPORTED: Mapping[str, NoEffect] = {"chat_template": (), "documents": ([],)}

_MAX_LOGGED_NAMES = 100
_MAX_LOGGED_LENGTH = 64
_logged: set[str] = set()
_logger = logging.getLogger("serving.api")


class RequestModel(BaseModel):
    """A body or a part of one. `unsupported` maps known fields that it lacks to the values they may have all the
    same."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, NoEffect]] = {}


def check_fields(model: type[RequestModel], data: Mapping[str, Any]) -> None:
    """Raise `InvalidValue` for the first field of `data` which `model` lists as unsupported; log the unknown ones."""
    for name, value in data.items():
        if name in model.model_fields:
            continue
        if name not in model.unsupported:
            _log_unknown(name)
        elif not has_no_effect(value, model.unsupported[name]):
            raise InvalidValue(unsupported_message(name, model.unsupported[name]), param=name)


def has_no_effect(value: object, accepted: NoEffect) -> bool:
    """Null, or equal to an accepted value in type too: 0 is not false."""
    return value is None or any(type(value) is type(entry) and value == entry for entry in accepted)


def unsupported_message(name: str, accepted: NoEffect) -> str:
    """Says that the field is not supported, and what may be sent instead."""
    choices = " or ".join(repr(entry) for entry in accepted)
    return f"{name} is not supported by this server" + (f"; it may only be {choices}" if accepted else "")


def _log_unknown(name: str) -> None:
    shown = name[:_MAX_LOGGED_LENGTH].encode("unicode_escape").decode()
    if shown not in _logged and len(_logged) < _MAX_LOGGED_NAMES:
        _logged.add(shown)
        _logger.warning("unknown_request_field", extra={"field": shown})
