"""A parsed body → rows for the engine: tokens, sampling, adapter. All of it may be slow; none of it touches HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from serving.api.context import ApiContext
from serving.api.resolve import pin_adapter
from serving.api.sampling import SamplingBody, or_default
from serving.api.schemas import ChatBody, CompletionBody, GenerationBody
from serving.api.values import INT64, Prompt
from serving.errors import ContextLengthExceeded, InvalidValue
from serving.types import Caller, ModelCard, Pin, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One choice: what the engine gets, and the text that is repeated before its answer. `leader` is the index of the
    row with the same prompt that goes first, None for that one itself."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    leader: int | None = None
    echo: str = ""
    pooled: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows ready to submit, those of one prompt together. `pin` is held and must be released by whoever takes this.
    `limit_param` is the field that bounds the answer."""

    rows: tuple[Row, ...]
    pin: Pin | None
    cache_salt: str | None = None
    priority: int = 0
    limit_param: str = "max_tokens"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(row.prompt) for row in self.rows if row.leader is None)

    @property
    def most_tokens(self) -> int:
        """These, and as many as may be generated."""
        return self.prompt_tokens + sum(row.sampling.max_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's tokens, and its text where the answer shall begin with it."""

    tokens: list[int]
    text: str = ""


def prepare_completion(context: ApiContext, caller: Caller, body: CompletionBody) -> Prepared:
    """Raises `InvalidValue`, `ContextLengthExceeded`, then `ModelNotFound`."""
    prompts = [_encoded(context, body, prompt) for prompt in body.prompt]
    return _prepare(context, caller, body, prompts, "prompt", DEFAULT_COMPLETION_TOKENS)


def prepare_chat(context: ApiContext, caller: Caller, body: ChatBody) -> Prepared:
    """Raises `InvalidValue`, `ContextLengthExceeded`, then `ModelNotFound`."""
    messages = [message.message() for message in body.messages]
    tokens = context.codec.encode_chat(messages, body.options())
    prompt = EncodedPrompt(tokens[-or_default(body.truncate_prompt_tokens, 0) :])
    return _prepare(context, caller, body, [prompt], "messages", context.card.max_model_len)


def check_token_ids(card: ModelCard, tokens: Sequence[int], param: str) -> None:
    """Raise `InvalidValue` for an id outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < card.vocab_size:
            raise InvalidValue(f"{param}: token id {token} is not in [0, {card.vocab_size})", param=param)


def encode_prompt(context: ApiContext, prompt: Prompt, special: bool, param: str) -> list[int]:
    """Tokens of a text; token ids as they are, checked."""
    if isinstance(prompt, str):
        return context.codec.encode(prompt, add_special_tokens=special)
    check_token_ids(context.card, prompt, param)
    return list(prompt)


def _encoded(context: ApiContext, body: CompletionBody, prompt: Prompt) -> EncodedPrompt:
    tokens = encode_prompt(context, prompt, or_default(body.add_special_tokens, True), "prompt")
    kept = tokens[-or_default(body.truncate_prompt_tokens, 0) :]
    if not body.echo:
        return EncodedPrompt(kept)
    whole = isinstance(prompt, str) and len(kept) == len(tokens)
    return EncodedPrompt(kept, str(prompt) if whole else context.codec.decode(kept))


def _prepare(
    context: ApiContext,
    caller: Caller,
    body: GenerationBody,
    prompts: Sequence[EncodedPrompt],
    param: str,
    default: int,
) -> Prepared:
    _check_options(body)
    most = longest_answer(context, caller, sum(len(prompt.tokens) for prompt in prompts), len(prompts) * body.choices)
    lengths = [length_of_answer(context.card, body, prompt.tokens, param, default, most) for prompt in prompts]
    params = base_sampling(context, body, logprobs=body.told, prompt_logprobs=body.scored)
    rows: list[Row] = []
    for prompt, length in zip(prompts, lengths, strict=True):
        rows += _choices(prompt, replace(params, max_tokens=length), body.choices, len(rows))
    pin = pin_adapter(context.catalog, caller.tenant, context.card.base_id, body.model, body.adapter_id)
    return Prepared(tuple(rows), pin, body.cache_salt, or_default(body.priority, 0))


def _choices(prompt: EncodedPrompt, params: SamplingParams, number: int, first: int) -> list[Row]:
    """The rows of one prompt; `first` is the index of the first. What is wanted of the prompt, that one computes."""
    tokens = tuple(prompt.tokens)
    rows = [Row(tokens, params, None, prompt.text)]
    for index in range(1, number):
        seed = None if params.seed is None else (params.seed + index + INT64) % (2 * INT64) - INT64
        rows.append(Row(tokens, replace(params, seed=seed, prompt_logprobs=None), first, prompt.text))
    return rows


def base_sampling(context: ApiContext, body: SamplingBody, *, max_tokens: int = 0, **more: Any) -> SamplingParams:
    """What `body` says of sampling, checked against the model, and `more` fields of the result."""
    check_token_ids(context.card, body.stop_token_ids or (), "stop_token_ids")
    check_token_ids(context.card, body.allowed_token_ids or (), "allowed_token_ids")
    check_token_ids(context.card, [int(token) for token in body.logit_bias or ()], "logit_bias")
    structure = body.structure
    return body.sampling(
        max_tokens, bad_words=_bad_words(context, body), structure=structure[0] if structure else None, **more
    )


def _bad_words(context: ApiContext, body: SamplingBody) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens, as it begins a text and as it follows a space."""
    spellings = [spelling for word in body.bad_words or () for spelling in (word, f" {word.lstrip()}")]
    encoded = [tuple(context.codec.encode(spelling, add_special_tokens=False)) for spelling in spellings]
    return tuple(dict.fromkeys(filter(None, encoded)))


def _check_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidValue("stream_options may only be set when stream is true", param="stream_options")
    if body.requested_tokens == 0 and (body.scored is None and not getattr(body, "echo", None)):
        raise InvalidValue("max_tokens may only be 0 with echo or prompt_logprobs", param="max_tokens")
    if body.requested_tokens == 0 and body.choices > 1:
        raise InvalidValue("n must be 1 where nothing is generated", param="n")


@dataclass(frozen=True, slots=True)
class LongestAnswer:
    """The most tokens that a tenant may ask for, and those it gets if it asks for none: what its quota of tokens a
    minute leaves for each answer. None where nothing bounds them."""

    asked: int | None = None
    default: int | None = None

    def check(self, wanted: int, param: str) -> None:
        if self.asked is not None and wanted > self.asked:
            raise InvalidValue(f"{param} is {wanted}, above your limit of {self.asked}", param=param)


def longest_answer(context: ApiContext, caller: Caller, prompt_tokens: int, answers: int) -> LongestAnswer:
    """What the caller's quotas make of a request with so many tokens in its prompts. Off the event loop."""
    limits = context.quotas.limits(caller.tenant)
    rate = limits.tokens_per_minute
    left = None if rate is None else max(1, (rate - prompt_tokens) // answers)
    bounds = [bound for bound in (limits.max_tokens, left) if bound is not None]
    return LongestAnswer(limits.max_tokens, min(bounds, default=None))


def length_of_answer(
    card: ModelCard, body: GenerationBody, prompt: Sequence[int], param: str, default: int, most: LongestAnswer
) -> int:
    """The most tokens to generate after `prompt`. `default` is cut to the room left in the context and the quotas; what
    the client asks for is not, it is refused. Raises `InvalidValue`, `ContextLengthExceeded`."""
    most.check(body.requested_tokens or 0, "max_tokens")
    wanted = fit(card, len(prompt), body.requested_tokens, param, min(default, most.default or default))
    if body.min_tokens is not None and body.min_tokens > wanted:
        raise InvalidValue(f"min_tokens is {body.min_tokens}, above max_tokens = {wanted}", param="min_tokens")
    return wanted


def fit(card: ModelCard, prompt: int, requested: int | None, param: str, default: int) -> int:
    """The most tokens to generate after a prompt of `prompt` tokens, in the field `param`."""
    if not prompt:
        raise InvalidValue(f"{param} must not be empty", param=param)
    room = card.max_model_len - prompt
    wanted = min(default, max(room, 1)) if requested is None else requested
    if wanted > room:
        raise ContextLengthExceeded(
            f"the model's context is {card.max_model_len} tokens; {param} has {prompt} and {wanted} more were asked "
            "for",
            param=param,
        )
    return wanted
