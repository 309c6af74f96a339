"""The fields by which every generating route is told how to choose tokens, and by which adapter. Knows no prompts."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field, model_validator

from serving.api.fields import RequestModel
from serving.api.structures import StructuredOutputs
from serving.api.values import (
    INT64,
    AllowedTokenIds,
    BadWords,
    CacheSalt,
    Count,
    Int64,
    LogitBias,
    Penalty,
    RequestId,
    Stop,
    StopTokenIds,
    fault,
)
from serving.types import SamplingParams, Structure

_GREEDY_BELOW = 1e-5
T = TypeVar("T")


def or_default(value: T | None, default: T) -> T:
    """What a client left out, or gave as null, has its default."""
    return default if value is None else value


class SamplingBody(RequestModel):
    """How the routes that generate choose tokens, and what every one of them shares. Null always means: as if
    absent."""

    model: str = Field(
        description="The base model, an adapter's name, `name@revision`, or `<base id>:<name>`.", examples=["saltspoke"]
    )
    adapter_id: str | None = Field(
        None, description="Which adapter answers, whatever `model` says; `base` or nothing for the base model."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy; 1 without it.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Only the likeliest tokens that together reach this probability."
    )
    top_k: Annotated[int, Field(ge=-1, le=INT64 - 1)] | None = Field(
        None, description="Only so many of the likeliest tokens; 0 or -1 for all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Only tokens of at least this share of the likeliest one's probability."
    )
    seed: Int64 | None = Field(None, description="The same seed gives the same answer; choice i uses seed + i.")
    presence_penalty: Penalty | None = Field(None, description="Taken from the logits of tokens already generated.")
    frequency_penalty: Penalty | None = Field(None, description="The same, once for each time they were.")
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description="Divides what speaks for tokens already in the prompt or the answer."
    )
    logit_bias: LogitBias | None = Field(
        None, description="Added to the logits of tokens, by their ids.", examples=[{"42": -100}]
    )
    stop: Stop = None
    stop_token_ids: StopTokenIds | None = Field(None, description="Tokens at which an answer ends.")
    include_stop_str_in_output: bool | None = Field(None, description="Whether what ended an answer is part of it.")
    ignore_eos: bool | None = Field(None, description="Go on after the end of text.")
    min_tokens: Count | None = Field(None, description="No end before so many tokens.")
    bad_words: BadWords | None = Field(None, description="Words that are never completed.")
    allowed_token_ids: AllowedTokenIds | None = Field(None, description="The only tokens that may be generated.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text; true without it.")
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Only so many of a prompt's last tokens are used."
    )
    priority: Int64 | None = Field(None, description="Lower goes first among the waiting requests of one tenant.")
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    user: str | None = Field(None, description="Accepted and not used.")
    request_id: RequestId | None = Field(None, description="Becomes part of the answer's id.")
    cache_salt: CacheSalt | None = Field(None, description="Cached prefixes are shared only under the same salt.")

    @property
    def structure(self) -> tuple[Structure, str] | None:
        """What answers must match, and the field that says so."""
        return None if self.structured_outputs is None else self.structured_outputs.structure()

    def sampling(self, max_tokens: int, **more: Any) -> SamplingParams:
        """How to sample up to `max_tokens`, with the defaults in place of what is absent."""
        temperature = or_default(self.temperature, 1.0)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_k=max(or_default(self.top_k, 0), 0),
            top_p=or_default(self.top_p, 1.0),
            min_p=or_default(self.min_p, 0.0),
            seed=self.seed,
            presence_penalty=or_default(self.presence_penalty, 0.0),
            frequency_penalty=or_default(self.frequency_penalty, 0.0),
            repetition_penalty=or_default(self.repetition_penalty, 1.0),
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=or_default(self.min_tokens, 0),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            skip_special_tokens=or_default(self.skip_special_tokens, True),
            **more,
        )

    @model_validator(mode="after")
    def _structure_alone_decides_the_end(self) -> SamplingBody:
        rivals = ("ignore_eos", "min_tokens", "allowed_token_ids", "bad_words") if self.structure else ()
        for name in rivals:
            if getattr(self, name):
                raise fault(name, f"{name} cannot be combined with an answer that must match something")
        return self
