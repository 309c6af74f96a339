"""A parsed body → rows for the engine: tokens, sampling, adapter. All of it may be slow; none of it touches HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.api.context import ApiContext
from serving.api.resolve import pin_adapter
from serving.api.schemas import ChatBody, CompletionBody, GenerationBody, Prompt
from serving.errors import ContextLengthExceeded, InvalidValue
from serving.types import Caller, ModelCard, Pin, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows ready to submit, one a prompt. `pin` is held and must be released by whoever takes this."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: tuple[SamplingParams, ...]
    pin: Pin | None
    cache_salt: str | None


def prepare_completion(context: ApiContext, caller: Caller, body: CompletionBody) -> Prepared:
    """Raises `InvalidValue`, `ContextLengthExceeded`, then `ModelNotFound`."""
    special = True if body.add_special_tokens is None else body.add_special_tokens
    prompts = [_encode(context, prompt, special) for prompt in body.prompt]
    return _prepare(context, caller, body, prompts, "prompt", DEFAULT_COMPLETION_TOKENS)


def prepare_chat(context: ApiContext, caller: Caller, body: ChatBody) -> Prepared:
    """Raises `InvalidValue`, `ContextLengthExceeded`, then `ModelNotFound`."""
    prompt = context.codec.encode_chat([message.message() for message in body.messages])
    return _prepare(context, caller, body, [prompt], "messages", context.card.max_model_len)


def check_token_ids(card: ModelCard, tokens: Sequence[int], param: str) -> None:
    """Raise `InvalidValue` for an id outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < card.vocab_size:
            raise InvalidValue(f"{param}: token id {token} is not in [0, {card.vocab_size})", param=param)


def _encode(context: ApiContext, prompt: Prompt, special: bool) -> list[int]:
    if isinstance(prompt, str):
        return context.codec.encode(prompt, add_special_tokens=special)
    check_token_ids(context.card, prompt, "prompt")
    return list(prompt)


def _prepare(
    context: ApiContext, caller: Caller, body: GenerationBody, prompts: list[list[int]], param: str, default: int
) -> Prepared:
    _check_options(context.card, body)
    sampling = tuple(_sampling(context.card, body, prompt, param, default) for prompt in prompts)
    pin = pin_adapter(context.catalog, caller.tenant, context.card.base_id, body.model, body.adapter_id)
    return Prepared(tuple(tuple(prompt) for prompt in prompts), sampling, pin, body.cache_salt)


def _check_options(card: ModelCard, body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidValue("stream_options may only be set when stream is true", param="stream_options")
    check_token_ids(card, body.stop_token_ids or (), "stop_token_ids")
    check_token_ids(card, [int(token) for token in body.logit_bias or ()], "logit_bias")


def _sampling(card: ModelCard, body: GenerationBody, prompt: list[int], param: str, default: int) -> SamplingParams:
    """`default` is cut to the room left in the context; what the client asks for is not, it is refused."""
    if not prompt:
        raise InvalidValue(f"{param} must not be empty", param=param)
    room = card.max_model_len - len(prompt)
    wanted = min(default, max(room, 1)) if body.requested_tokens is None else body.requested_tokens
    if wanted > room:
        raise ContextLengthExceeded(
            f"the model's context is {card.max_model_len} tokens; {param} has {len(prompt)} and "
            f"{wanted} more were asked for",
            param=param,
        )
    if body.min_tokens is not None and body.min_tokens > wanted:
        raise InvalidValue(f"min_tokens is {body.min_tokens}, above max_tokens = {wanted}", param="min_tokens")
    return body.sampling(wanted)
